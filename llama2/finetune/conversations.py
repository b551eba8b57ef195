"""Conversations: a model answers the user turns of dialogues, one after another."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from llama2.chat_format import Message
from llama2.finetune.dialogues import Dialogue
from llama2.finetune.sampling import Answer, Prompt, Sampler

_ROUNDS = 4  # a group is this many times the cache's rows


@dataclass
class Conversation:
    """A dialogue's questions and a model's answers.

    Attributes:
        answers: the answers to the first turns; to all of them unless there is a fault or an error.
        fault: the fault of the next answer that ended the conversation: "empty" or "cut".
        error: another reason for its end: the context is full, or logits are not finite.
    """

    dialogue: Dialogue
    answers: list[Answer] = field(default_factory=list)
    fault: str | None = None
    error: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The dialogue's messages with these answers, up to the last answer."""
        opening, questions = _parts(self.dialogue)
        messages = list(opening)
        for question, answer in zip(questions, self.answers, strict=False):
            messages += [question, {"role": "assistant", "content": answer.text}]
        return messages

    @property
    def _is_open(self) -> bool:
        ended = self.fault is not None or self.error is not None
        return not ended and len(self.answers) < len(self.dialogue.trained)

    @property
    def _next_question(self) -> Message:
        return _parts(self.dialogue)[1][len(self.answers)]


def converse(
    sampler: Sampler,
    dialogues: Iterable[Dialogue],
    *,
    system_in_every_turn: bool,
    whole_only: bool,
) -> Iterator[Conversation]:
    """Asks each dialogue's questions in turn; each answer becomes part of the next question's
    history.

    It yields conversations as they finish. Groups of a few times the cache's rows are asked turn by
    turn, each turn in one batch, so that a killed run loses at most one group.

    Args:
        system_in_every_turn: put the system message before every question, not only before the
            first.
        whole_only: an empty or truncated answer is a fault and ends the conversation.
    """
    waiting = iter(dialogues)
    while group := list(islice(waiting, _ROUNDS * sampler.cache.max_batch)):
        going = [Conversation(dialogue) for dialogue in group]
        while going:
            yield from _ask(sampler, going, system_in_every_turn, whole_only)
            going = [conversation for conversation in going if conversation._is_open]


def _ask(
    sampler: Sampler, going: list[Conversation], in_every_turn: bool, whole_only: bool
) -> Iterator[Conversation]:
    """Asks one turn of each conversation and yields those that end with it."""
    prompts, asked = [], []
    for conversation in going:
        messages = [*conversation.messages, conversation._next_question]
        try:
            ids = sampler.encode(messages, system_in_every_turn=in_every_turn)
        except ValueError as error:
            conversation.error = str(error)
            yield conversation
            continue
        place = (
            *place_numbers(conversation.dialogue.file, conversation.dialogue.line),
            len(conversation.answers),
        )
        prompts.append(Prompt(ids, place))
        asked.append(conversation)
    for index, answer in sampler.answers(prompts):
        conversation = asked[index]
        conversation.error = answer.error
        conversation.fault = answer.fault if whole_only and answer.error is None else None
        if conversation.fault is None and conversation.error is None:
            conversation.answers.append(answer)
        if not conversation._is_open:
            yield conversation


def answer_last(
    sampler: Sampler, dialogues: Iterable[Dialogue]
) -> Iterator[tuple[Dialogue, Answer | ValueError]]:
    """Yields, as they finish, the model's answer to the last question of each dialogue, with the
    dialogue's own earlier answers; or the error that prevented it."""
    prompts, asked = [], []
    for dialogue in dialogues:
        try:
            ids = sampler.encode(dialogue.messages[:-1])
        except ValueError as error:
            yield dialogue, error
            continue
        prompts.append(Prompt(ids, place_numbers(dialogue.file, dialogue.line)))
        asked.append(dialogue)
    for index, answer in sampler.answers(prompts):
        error = answer.error and ValueError(answer.error)
        yield asked[index], error or answer


def ghost_dialogue(conversation: Conversation) -> Dialogue:
    """Returns the dialogue on which Ghost attention trains: the system message, which the model got
    in every turn, is only in the first, and only the last answer has a loss.

    Source: Touvron et al. 2023, arXiv:2307.09288, section 3.3.
    """
    num_turns = len(conversation.answers)
    return replace(
        conversation.dialogue,
        messages=tuple(conversation.messages),
        trained=(False,) * (num_turns - 1) + (True,),
    )


def place_numbers(file: Path, line: int) -> tuple[int, int]:
    """Returns the place of a dialogue, file name and line, as numbers for a random seed."""
    return zlib.crc32(file.name.encode(errors="surrogateescape")), line


def _parts(dialogue: Dialogue) -> tuple[list[Message], list[Message]]:
    """Returns the system message, if there is one, and the users' messages."""
    messages = dialogue.messages
    return (
        [message for message in messages if message["role"] == "system"],
        [message for message in messages if message["role"] == "user"],
    )
