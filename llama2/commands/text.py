"""Text in and text out: generation through a tokenizer."""

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
    """Yields the continuation of one prompt, piece by piece, until the document ends or
    `max_new_tokens`.

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
        ValueError: they are more than a model takes; said at once of a text that is far too long.
    """
    least = tokenizer.least_ids(text)
    if least > max_seq_len:
        raise ValueError(
            f"expected at most max_seq_len ({max_seq_len}) tokens; got {least:,} or more"
        )
    return tokenizer.encode(text)


def require_utf8(name: str, text: str) -> str:
    """`text` as the UTF-8 that it was before Python decoded it, in whatever locale.

    Raises:
        ValueError: it was not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{name}: expected UTF-8; {error}") from error
