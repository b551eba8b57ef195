"""Dialogues as token ids with a mask of the loss, in two formats.

"chat" is the format of the released chat models. "separator" is the one that the paper describes
for supervised fine-tuning: prompts and answers in sequence with a special token between them. The
vocabulary of 32,000 has no such token, so BOS is used: text never encodes to it, every Llama
vocabulary has it, and in pre-training a new text begins after it.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama2.chat_format import Message, answered, check_messages, instruction, split_turns
from llama2.finetune.dialogues import Dialogue
from llama2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A dialogue as ids.

    Attributes:
        ids: int32 `[num_tokens]`.
        is_trained: bool `[num_tokens]`: whether the token is a target with a loss, as an answer's
            tokens and the EOS after it are.
    """

    ids: np.ndarray
    is_trained: np.ndarray


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue, form: str = "chat") -> Encoded:
    """Returns the ids of a dialogue:

    - "chat": `<s>[INST] {prompt} [/INST] {answer} </s>` for each turn;
    - "separator": `<s>{prompt}<s>{answer}</s>` for each turn.

    The prompt's ids are those of `encode_prompt`, so that training and generation agree. If the
    tokenizer joins the end of a prompt with the beginning of its answer, that piece belongs to the
    answer.

    Raises:
        ValueError: the tokenizer has no BOS or EOS.
    """
    tokenizer.check_ends()
    ids: list[int] = []
    is_trained: list[bool] = []
    turns = split_turns(dialogue.messages)
    for (prompt, answer), trained in zip(turns, dialogue.trained, strict=True):
        if form == "chat":
            before = tokenizer.encode(instruction(prompt), bos=True)
            turn = tokenizer.encode(answered(prompt, answer), bos=True, eos=True)
        else:
            before = _separated(tokenizer, prompt)
            turn = before + tokenizer.encode(answer, bos=False, eos=True)
        shared = _num_shared(before, turn)
        ids += turn
        is_trained += [False] * shared + [trained] * (len(turn) - shared)
    return Encoded(np.array(ids, dtype=np.int32), np.array(is_trained, dtype=np.bool_))


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    form: str = "chat",
    *,
    system_in_every_turn: bool = False,
) -> list[int]:
    """Returns the ids that the answer to the last user message continues; see `encode_dialogue`.

    Raises:
        TypeError, ValueError: as `Tokenizer.encode_chat`.
    """
    if form == "chat":
        return tokenizer.encode_chat(messages, system_in_every_turn=system_in_every_turn)
    tokenizer.check_ends()
    check_messages(messages)
    ids = []
    for prompt, answer in split_turns(messages, system_in_every_turn=system_in_every_turn):
        ids += _separated(tokenizer, prompt)
        ids += [] if answer is None else tokenizer.encode(answer, bos=False, eos=True)
    return ids


def _separated(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [*tokenizer.encode(prompt, bos=True), tokenizer.bos_id]


def _num_shared(one: list[int], other: list[int]) -> int:
    """Returns the length of the common prefix of two lists."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
