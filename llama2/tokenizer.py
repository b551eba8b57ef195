"""Text to token ids and back, and the Llama 2 chat prompt, over a SentencePiece model."""

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from llama2.chat_format import Message, chat_turns

_OFTEN_CHANGED = " a  b\t\ufb01\u2460A\u030a\u3000\u212b\U000e0041 "  # by normalisers


class Tokenizer:
    """A SentencePiece model read from `path`, such as the `tokenizer.model` of a checkpoint.

    With Llama's switches (byte fallback, identity normaliser, no whitespace collapse)
    `decode(encode(text)) == text` for every text without U+2581, which SentencePiece itself writes
    for a space. Control tokens are never found in text: "<s>" is encoded as three characters.

    Attributes:
        vocab_size: number of ids.
        bos_id, eos_id, pad_id: control ids; −1 where the model has none (Llama 2 has no pad).

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
                "Tokenizer needs sentencepiece: pip install gqa-kernels[models]"
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
        # Whether a text gets a space before its first word (a dummy prefix), as Llama's does.
        self.adds_space = "".join(self._model.EncodeAsPieces("a")).startswith("▁")
        self._bytes = [self._token_bytes(token) for token in range(self.vocab_size)]

    @cached_property
    def _most_bytes(self) -> int | None:
        """Of a text, that an id can stand for: the longest piece's, where a text is not changed
        before it is split and has no unknown characters, of which a run would be one id. As the
        pieces are written: a "▁" of theirs stands for one of the text, too."""
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
        """Ids of `text`, after BOS if `bos` and there is one, and before EOS if `eos`.

        Raises:
            TypeError: `text` is no str.
            ValueError: it has half a character (a lone surrogate), or there is no EOS.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str; got {type(text).__name__}")
        if eos and self.eos_id < 0:
            raise ValueError("eos: expected a tokenizer with EOS; got one without")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: expected whole characters; {error}") from error
        tokens = self._model.EncodeAsIds(text)
        return [self.bos_id] * (bos and self.bos_id >= 0) + tokens + [self.eos_id] * eos

    def least_ids(self, text: str) -> int:
        """Returns how many ids `text` has at least, found without splitting it, which takes minutes
        for tens of megabytes."""
        return len(text.encode()) // self._most_bytes if self._most_bytes else 0

    def decode(self, tokens: Iterable[int], *, continues: bool = False) -> str:
        """Text of whole ids: control tokens give nothing, malformed UTF-8 gives U+FFFD.

        Args:
            continues: as of `StreamDecoder`.
        Raises:
            ValueError: an id is outside [0, vocab_size).
        """
        stream = StreamDecoder(self, continues=continues)
        return "".join([*map(stream.push, tokens), stream.finish()])

    def encode_chat(
        self, messages: Sequence[Message], *, system_in_every_turn: bool = False
    ) -> list[int]:
        """Ids of a Llama 2 chat prompt, to which the model's answer is the continuation:

        `<s>[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {answer} </s><s>[INST] …`

        Args:
            messages: `{"role": …, "content": …}`: an optional "system", then "user" and "assistant"
                in turn, a "user" last. Contents are stripped; the first user's after the system's
                has been put before it, between its tags and as it is.
            system_in_every_turn: it is put before every user's content.
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
        """Raises ValueError for a tokenizer without BOS or EOS, which a chat needs."""
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("messages: expected a tokenizer with BOS and EOS; got another")


def check_fits(tokenizer: Tokenizer, vocab_size: int, where: Path) -> None:
    """Raises ValueError, which begins with `where`, if a model of `vocab_size` lacks an id."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{where}: expected a tokenizer of at most the model's {vocab_size} ids; "
            f"got one of {tokenizer.vocab_size}"
        )


class StreamDecoder:
    """Turns ids, one at a time, into pieces of text whose concatenation is the whole text.

    A character whose bytes are spread over several ids appears with the last of them.

    Args:
        continues: the ids continue a text, so a leading space is theirs. Otherwise they begin one,
            and the space that SentencePiece puts before the first word is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = not continues and tokenizer.adds_space

    def push(self, token: int) -> str:
        """Returns the text that `token` completes, possibly none.

        Raises:
            ValueError: `token` is outside [0, vocab_size).
        """
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(f"token: expected 0 to {self._tokenizer.vocab_size - 1}; got {token}")
        data = self._tokenizer._bytes[token]
        if self._drop_space and data:
            self._drop_space = False
            if self._tokenizer._model.IdToPiece(token).startswith("▁"):
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character is incomplete, otherwise nothing."""
        return self._utf8.decode(b"", final=True)
