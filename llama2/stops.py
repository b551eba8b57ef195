"""Ends of a text: stop ids of a tokenizer and of a checkpoint, and stop strings."""

from collections.abc import Sequence
from pathlib import Path

from llama2.checkpoint.files import CheckpointError, Settings
from llama2.tokenizer import StreamDecoder, Tokenizer


def stop_ids(tokenizer: Tokenizer, folder: Path | None = None) -> list[int]:
    """Returns the stop ids: EOS, BOS, which would begin another document, and the EOS ids of a
    checkpoint's generation_config.json.

    Raises:
        CheckpointError: generation_config.json is malformed.
    """
    ids = [tokenizer.eos_id, tokenizer.bos_id]
    if folder is not None and (file := folder / "generation_config.json").is_file():
        more = Settings.read(file).get("eos_token_id", [])
        more = more if isinstance(more, list) else [more]
        if not all(type(token) is int for token in more):
            raise CheckpointError(f"{file}: eos_token_id: expected ids; got {more!r:.60}")
        ids += more
    return sorted({token for token in ids if 0 <= token < tokenizer.vocab_size})


class StopStrings:
    """A `Request.stop` that ends a request once the text of its new tokens contains one of some
    strings.

    Args:
        strings: empty strings are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer, continues=False)
        self._strings = [string for string in strings if string]
        self._text, self._num_read = "", 0

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Returns whether to stop; `tokens` must be the list of the earlier calls, possibly
        longer."""
        begin = len(self._text)
        self._text += "".join(map(self._decoder.push, tokens[self._num_read :]))
        self._num_read = len(tokens)
        return any(
            self._text.find(string, max(begin - len(string) + 1, 0)) >= 0
            for string in self._strings
        )
