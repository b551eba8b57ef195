"""A model's answers to many prompts, by continuous batching."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.chat_format import Message, without_tags
from llama2.finetune.encoding import encode_prompt
from llama2.model import Llama2
from llama2.requests import Request, Result, check_request, seed_of
from llama2.serving import serve
from llama2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """How answers are sampled; temperature, top_p and seed as in `generate`.

    Attributes:
        max_new_tokens: most tokens of an answer; fewer where the context ends.
        stop_ids: ids that end an answer.
        form: one of `chat_format.FORMATS`.
    """

    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    form: str = "chat"


class Prompt(NamedTuple):
    """The ids of a prompt to answer.

    Attributes:
        place: ints that, with the seed, determine the random numbers of the answer, which differ
            between places and are the same in a resumed run.
    """

    ids: Sequence[int]
    place: tuple[int, ...] = ()


class Answer(NamedTuple):
    """A model's answer.

    Attributes:
        text: the stripped text without the chat format's tags, as a conversation continues with it.
        finish_reason: "stop", "length" (truncated) or "error".
        num_new_tokens: number of tokens, including the stop token.
        error: the reason of an "error".
    """

    text: str
    finish_reason: str
    num_new_tokens: int
    error: str | None = None

    @property
    def fault(self) -> str | None:
        """Why an answer cannot be trained on: it is "empty" or "cut"; None if it can."""
        if self.finish_reason == "length":
            return "cut"
        return None if self.text else "empty"


class Sampler:
    """Answers prompts with one model and one cache, whose pages later calls reuse.

    Args:
        cache: a cache of the model without sequences in use.
    Raises:
        ValueError: a setting is wrong.
    """

    def __init__(
        self, model: Llama2, tokenizer: Tokenizer, cache: PagedKVCache, settings: Settings
    ) -> None:
        if settings.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1; got {settings.max_new_tokens}")
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.settings = settings
        self.max_seq_len = min(model.config.max_seq_len, cache.max_seq_len)
        drawn = (settings.temperature, settings.top_p, settings.seed)
        check_request(model, cache, Request([0], 1, *drawn, settings.stop_ids))

    def encode(
        self, messages: Sequence[Message], *, system_in_every_turn: bool = False
    ) -> list[int]:
        """Returns the ids of a prompt by `encode_prompt`.

        Raises:
            TypeError, ValueError: as `encode_prompt`; or they leave no room for an answer.
        """
        return encode_for(
            self.tokenizer,
            messages,
            self.settings.form,
            self.max_seq_len,
            system_in_every_turn=system_in_every_turn,
        )

    def answers(self, prompts: Iterable[Prompt]) -> Generator[tuple[int, Answer], None, None]:
        """Yields (index of the prompt, answer) as they finish; reads prompts when there is room.

        Raises:
            ValueError: a prompt leaves no room for an answer.
        """
        requests = (self._request(prompt) for prompt in prompts)
        served = serve(self.model, requests, cache=self.cache, vocab_size=self.tokenizer.vocab_size)
        with closing(served):
            for result in served:
                yield result.index, self._answer(result)

    def _request(self, prompt: Prompt) -> Request:
        settings = self.settings
        room = max(self.max_seq_len - len(prompt.ids), 1)  # without room, serve raises
        return Request(
            prompt.ids,
            min(settings.max_new_tokens, room),
            settings.temperature,
            settings.top_p,
            seed_of(settings.seed, *prompt.place),
            settings.stop_ids,
        )

    def _answer(self, result: Result) -> Answer:
        text = self.tokenizer.decode(result.tokens, continues=True)
        return Answer(
            without_tags(text).strip(), result.finish_reason, len(result.tokens), result.error
        )


def encode_for(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    form: str,
    max_seq_len: int,
    *,
    system_in_every_turn: bool = False,
) -> list[int]:
    """Returns the ids of a prompt that leaves room for an answer.

    Raises:
        TypeError, ValueError: as `encode_prompt`; or there is no room. Texts that are far too long
            are refused without encoding them.
    """
    expected = f"messages: expected fewer tokens before an answer than the context's {max_seq_len}"
    least = sum(tokenizer.least_ids(message["content"].strip()) for message in messages)
    if least >= max_seq_len:
        raise ValueError(f"{expected}; got {least:,} or more")
    ids = encode_prompt(tokenizer, messages, form, system_in_every_turn=system_in_every_turn)
    if len(ids) >= max_seq_len:
        raise ValueError(f"{expected}; got {len(ids)}")
    return ids
