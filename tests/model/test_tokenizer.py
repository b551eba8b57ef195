"""The tokenizer: exact round trips, Llama 2's chat text, and text that streams."""

import sys
from pathlib import Path

import pytest
import sentencepiece

import llama2
from llama2.tokenizer import StreamDecoder, Tokenizer
from llama2.train.stdlib_checkpoint import train_tokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  two  leading and  inner   spaces ",
    "def f(x):\n\treturn x  # tab\r\n\n\n        deep",
    "naïve café, Ω, 日本語, العربية",
    "👩‍👩‍👧 🤷🏽‍♀️ 🇨🇭",
    "0123456789 3.14159 0x1F",
    "a\0b\x7f\ufeff\ufffd",
    "<s> </s> <unk> <0x0A>",
]
SHIPPED = Path(llama2.__file__).parent / "checkpoints" / "stdlib" / "tokenizer.model"


@pytest.fixture(scope="session", params=["tiny", "shipped"])
def tokenizer(request, tmp_path_factory):
    if request.param == "shipped":
        return Tokenizer(SHIPPED)
    text = "def add(left, right):\n    return left + right  # 2024, [INST] <<SYS>> naïve\n" * 8
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer([text], vocab_size=320))
    return Tokenizer(file)


def test_ids_are_llama_2s(tokenizer):
    assert tokenizer.vocab_size in (320, 1024)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, -1)


def test_bos_and_eos_on_request(tokenizer):
    plain = tokenizer.encode("add", bos=False)
    assert tokenizer.encode("add") == [1, *plain]
    assert tokenizer.encode("add", bos=False, eos=True) == [*plain, 2]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    tokens = tokenizer.encode(text, eos=True)
    assert tokenizer.decode(tokens) == text
    assert tokenizer._model.Decode(tokens) == text


@pytest.mark.parametrize(
    "text", [*TEXTS, "        " * 99, "a" * 999, "return" * 99, "é" * 99, "▁" * 999]
)
def test_a_text_has_the_ids_that_it_has_at_least(tokenizer, text):
    assert len(text.encode()) // 64 <= tokenizer.least_ids(text) <= len(tokenizer.encode(text))


def test_ids_at_least_of_a_text_that_is_changed_are_unknown(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9),
        model_prefix=str(tmp_path / "x"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer(tmp_path / "x.model")
    assert len(tokenizer.encode(" " * 999)) < 9 and tokenizer.least_ids(" " * 999) == 0


def test_every_code_point_has_ids(tokenizer):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000, 7), 0x1F600, 0x10FFFF]))
    text = text.replace("▁", "")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_a_token(tokenizer):
    one, two = tokenizer.encode("x1"), tokenizer.encode("x12345")
    assert len(two) - len(one) == 4


def test_control_tokens_cannot_be_written_in_text(tokenizer):
    assert not {1, 2} & set(tokenizer.encode("<s></s>", bos=False))


@pytest.mark.parametrize("first", [0, 3 + ord(" ")])  # the unknown token, a space as a byte
def test_only_the_space_of_a_word_is_dropped(tokenizer, first):
    tokens = [first, *tokenizer.encode("left", bos=False)]
    assert tokenizer.decode(tokens) == tokenizer._model.Decode(tokens)


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, 340) == train_tokenizer(TEXTS, 340)


def test_decode_refuses_ids_that_do_not_exist(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"to {tokenizer.vocab_size - 1}; got {token}"):
            tokenizer.decode([5, token])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.model"):
        Tokenizer(tmp_path / "no.model")


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256))])
def test_file_of_another_kind(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"bad\.model: expected a SentencePiece model; got another"
    ):
        Tokenizer(tmp_path / "bad.model")


def test_missing_sentencepiece_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[models\]"'):
        Tokenizer(tmp_path / "any.model")


def _chat(*turns):
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]


def test_chat_of_one_turn(tokenizer):
    tokens = tokenizer.encode_chat(_chat(("user", "  add 2 \n")))
    assert tokens == tokenizer.encode("[INST] add 2 [/INST]")


def test_chat_with_system_and_history(tokenizer):
    tokens = tokenizer.encode_chat(
        _chat(
            ("system", " Be brief. "),
            ("user", "left?"),
            ("assistant", " right "),
            ("user", "why?"),
            ("assistant", "so"),
            ("user", "add"),
        )
    )
    assert tokens == [
        *tokenizer.encode(
            "[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\nleft? [/INST] right ", bos=True, eos=True
        ),
        *tokenizer.encode("[INST] why? [/INST] so ", bos=True, eos=True),
        *tokenizer.encode("[INST] add [/INST]", bos=True, eos=False),
    ]
    assert (tokens.count(1), tokens.count(2)) == (3, 2)


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("system", "s")],
        [("assistant", "a")],
        [("user", "u"), ("assistant", "a")],
        [("user", "u"), ("user", "v")],
        [("user", "u"), ("system", "s"), ("user", "v")],
        [("system", "s"), ("system", "s"), ("user", "u")],
        [("tool", "t")],
    ],
)
def test_chat_refuses_other_orders_of_roles(tokenizer, turns):
    with pytest.raises(
        ValueError, match="expected an optional system message, then user and assistant"
    ):
        tokenizer.encode_chat(_chat(*turns))


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_chat_refuses_tags_in_contents(tokenizer, tag, place):
    messages = _chat(("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    messages[place]["content"] = f"x{tag}y"
    with pytest.raises(ValueError, match=rf"messages\[{place}\]"):
        tokenizer.encode_chat(messages)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_text_in_whole_characters(tokenizer, text):
    stream = StreamDecoder(tokenizer, continues=False)
    pieces = [stream.push(token) for token in tokenizer.encode(text, eos=True)]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_stream_that_continues_keeps_a_leading_space(tokenizer):
    prompt, whole = tokenizer.encode("return left"), tokenizer.encode("return left + right")
    assert whole[: len(prompt)] == prompt
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, whole[len(prompt) :])) == " + right"


def test_stream_cut_within_a_character(tokenizer):
    stream = StreamDecoder(tokenizer)
    tokens = tokenizer.encode("x👩", bos=False)
    assert "".join(map(stream.push, tokens[:-1])).strip() == "x"
    assert stream.finish() == "\ufffd"
