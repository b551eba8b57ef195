"""Generation from text to text, through a tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llama2.generate import Generator
from llama2.tokenizer import StreamDecoder, Tokenizer


def stream_text(
    generator: Generator,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    stops: Iterable[int],
    **settings: Any,
) -> Iterator[str]:
    """Yields the continuation of one prompt in pieces, until the document ends or `max_new_tokens`.

    Args:
        prompt: token ids, as `encode` and `encode_chat` give them.
        stops: ids that end the text.
        settings: `generate`'s max_new_tokens, temperature, top_p and seed.
    Raises:
        ValueError: as `generate`, at the call; later if the model has ids that the tokenizer lacks.
    """
    steps = generator.stream([prompt], stop_ids=stops, **settings)
    return _decoded(StreamDecoder(tokenizer), steps)


def _decoded(decoder: StreamDecoder, steps: Iterator[tuple[int, int]]) -> Iterator[str]:
    for _, token in steps:
        yield decoder.push(token)
    yield decoder.finish()


def encode_prompt(tokenizer: Tokenizer, text: str, max_seq_len: int) -> list[int]:
    """Returns the ids of `text`.

    Raises:
        ValueError: there are more than `max_seq_len`; a text that is far too long is not tokenised.
    """
    least = tokenizer.least_ids(text)
    if least > max_seq_len:
        raise ValueError(
            f"expected at most max_seq_len ({max_seq_len}) tokens; got {least:,} or more"
        )
    return tokenizer.encode(text)


def require_utf8(name: str, text: str) -> str:
    """Returns `text` decoded as UTF-8, whatever locale Python decoded it with.

    Raises:
        ValueError: it was not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{name}: expected UTF-8; {error}") from error
