"""Conversion between text and token ids, and Llama 2's chat prompt, with a SentencePiece model."""

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from llama2.chat_format import Message, chat_turns
from llama2.extras import how_to_install

_OFTEN_CHANGED = " a  b\t\ufb01\u2460A\u030a\u3000\u212b\U000e0041 "  # by normalisers


class Tokenizer:
    """A SentencePiece model read from `path`, such as the `tokenizer.model` of a checkpoint.

    With Llama's switches (byte fallback, identity normaliser, no whitespace collapse)
    `decode(encode(text)) == text` for every text without U+2581, which SentencePiece uses for a
    space. Text never encodes to control tokens: "<s>" becomes three characters.

    Attributes:
        vocab_size: number of ids.
        bos_id, eos_id, pad_id: control ids; −1 if the model has none (Llama 2 has no pad).

    Raises:
        ImportError: sentencepiece is not installed.
        FileNotFoundError: no file at `path`.
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                f"Tokenizer needs sentencepiece; {how_to_install('models')}"
            ) from error
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a SentencePiece model file; got none")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a SentencePiece model; got another file") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._model.pad_id()
        # Whether SentencePiece puts a space before the first word (a dummy prefix), as for Llama.
        self.adds_space = "".join(self._model.EncodeAsPieces("a")).startswith("▁")
        self._bytes = [self._token_bytes(token) for token in range(self.vocab_size)]

    @cached_property
    def _most_bytes(self) -> int | None:
        """Returns the most bytes of text that one id can represent: those of the longest piece.
        None if the normaliser changes text, or if there are unknown characters, a run of which is
        one id. Counts the pieces as written, with "▁", which can be a "▁" of the text."""
        if self.decode(self.encode(_OFTEN_CHANGED)) != _OFTEN_CHANGED:
            return None
        return max(len(self._model.IdToPiece(id).encode()) for id in range(self.vocab_size))

    def _token_bytes(self, token: int) -> bytes:
        if self._model.IsControl(token):
            return b""
        if self._model.IsUnknown(token):
            return " ⁇ ".encode()
        piece = self._model.IdToPiece(token)
        if self._model.IsByte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        return piece.replace("▁", " ").encode()

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Returns the ids of `text`, after BOS if `bos` and there is one, and before EOS if `eos`.

        Raises:
            TypeError: `text` is not a str.
            ValueError: it contains a lone surrogate, or `eos` without an EOS in the model.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str; got {type(text).__name__}")
        if eos and self.eos_id < 0:
            raise ValueError("eos: expected a tokenizer with EOS; got one without")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: expected no lone surrogates; {error}") from error
        tokens = self._model.EncodeAsIds(text)
        return [self.bos_id] * (bos and self.bos_id >= 0) + tokens + [self.eos_id] * eos

    def least_ids(self, text: str) -> int:
        """Returns a lower bound of the number of ids of `text`, without encoding it, which takes
        minutes for tens of megabytes."""
        return len(text.encode()) // self._most_bytes if self._most_bytes else 0

    def decode(self, tokens: Iterable[int], *, continues: bool = False) -> str:
        """Returns the text of all ids: control tokens give no text, malformed UTF-8 gives U+FFFD.

        Args:
            continues: as for `StreamDecoder`.
        Raises:
            ValueError: an id is outside [0, vocab_size).
        """
        stream = StreamDecoder(self, continues=continues)
        return "".join([*map(stream.push, tokens), stream.finish()])

    def encode_chat(
        self, messages: Sequence[Message], *, system_in_every_turn: bool = False
    ) -> list[int]:
        """Returns the ids of a Llama 2 chat prompt, which the model's answer continues:

        `<s>[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {answer} </s><s>[INST] …`

        Args:
            messages: `{"role": …, "content": …}`: an optional "system", then "user" and "assistant"
                in turn, a "user" last. Contents are stripped; the first user's after the system's,
                unstripped and between its tags, has been put before it.
            system_in_every_turn: put the system's content before every user's.
        Returns:
            One BOS and one EOS for each finished turn, one BOS for the last.
        Raises:
            TypeError, ValueError: as `check_messages`; or the tokenizer has no BOS or EOS.
        Source: Touvron et al. 2023, arXiv:2307.09288, and the released chat models.
        """
        self.check_ends()
        *finished, last = chat_turns(messages, system_in_every_turn=system_in_every_turn)
        tokens = [token for turn in finished for token in self.encode(turn, bos=True, eos=True)]
        return tokens + self.encode(last, bos=True)

    def check_ends(self) -> None:
        """Raises ValueError if the tokenizer lacks BOS or EOS, which a chat needs."""
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("messages: expected a tokenizer with BOS and EOS; got one without")


def check_fits(tokenizer: Tokenizer, vocab_size: int, where: Path) -> None:
    """Raises ValueError, beginning with `where`, if the tokenizer has more ids than the model."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{where}: expected a tokenizer with at most the model's {vocab_size} ids; got "
            f"{tokenizer.vocab_size}"
        )


def check_same(tokenizer: Tokenizer, other: Tokenizer, where: Path) -> None:
    """Raises ValueError, beginning with `where`, if the other tokenizer has other ids or texts of
    ids."""
    if other.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{where}: expected the model's tokenizer, of {tokenizer.vocab_size} ids; got one of "
            f"{other.vocab_size}"
        )
    for token, (expected, got) in enumerate(zip(tokenizer._bytes, other._bytes, strict=True)):
        if got != expected:
            raise ValueError(
                f"{where}: expected the model's tokenizer, with {expected!r} as id {token}; got "
                f"{got!r}"
            )


class StreamDecoder:
    """Converts ids, one at a time, into pieces of text that concatenate to the whole text.

    A character whose bytes are spread over several ids is returned with the last of them.

    Args:
        continues: the ids continue a text, so a leading space is kept. Otherwise they begin a text,
            and the space that SentencePiece puts before the first word is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = not continues and tokenizer.adds_space

    def push(self, token: int) -> str:
        """Returns the text that `token` completes, possibly "".

        Raises:
            ValueError: `token` is outside [0, vocab_size).
        """
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(
                f"token: expected from 0 to {self._tokenizer.vocab_size - 1}; got {token}"
            )
        data = self._tokenizer._bytes[token]
        if self._drop_space and data:
            self._drop_space = False
            if self._tokenizer._model.IdToPiece(token).startswith("▁"):
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Returns the rest: U+FFFD if the last character is incomplete, otherwise ""."""
        return self._utf8.decode(b"", final=True)
