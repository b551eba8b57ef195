"""Text in and text out: generation through a tokenizer."""

from collections.abc import Iterator, Sequence
from typing import Any

from llama2.generate import Generator
from llama2.tokenizer import StreamDecoder, Tokenizer


def stream_text(
    generator: Generator, tokenizer: Tokenizer, prompt: Sequence[int], **settings: Any
) -> Iterator[str]:
    """The continuation of one prompt, piece by piece, until the document ends or `max_new_tokens`.

    Args:
        prompt: token ids, as `encode` and `encode_chat` give them.
        settings: `generate`'s max_new_tokens, temperature, top_p and seed.
    Raises:
        ValueError: as `generate`, at the call; later if the model has ids that the tokenizer lacks.
    """
    steps = generator.stream([prompt], stop_ids=stop_ids(tokenizer), **settings)
    return _decoded(StreamDecoder(tokenizer), steps)


def _decoded(decoder: StreamDecoder, steps: Iterator[tuple[int, int]]) -> Iterator[str]:
    for _, token in steps:
        yield decoder.push(token)
    yield decoder.finish()


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """EOS; and BOS, which would begin another document."""
    return [token for token in (tokenizer.eos_id, tokenizer.bos_id) if token >= 0]


def require_utf8(name: str, text: str) -> str:
    """`text` as the UTF-8 that it was before Python decoded it, in whatever locale.

    Raises:
        ValueError: it was not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{name}: expected UTF-8; {error}") from error
