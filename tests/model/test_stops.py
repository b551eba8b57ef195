"""Strings that end a text, however they are spread over tokens."""

import pytest

from llama2.checkpoint import SHIPPED
from llama2.stops import StopStrings
from llama2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SHIPPED / "tokenizer.model")


@pytest.mark.parametrize(
    ("text", "strings"),
    [
        ("def f(x):\n    return é\n\ndef", ["\n\n"]),
        ("a🙂b", ["🙂"]),
        ("import os", ["mport o", "never"]),
        ("x = 1", ["", "= 1"]),
        ("aab", ["ab"]),
        ("</s> is text", ["</s>"]),
    ],
)
def test_it_stops_with_the_token_that_completes_a_string(text, strings, tokenizer):
    stop, tokens = StopStrings(tokenizer, strings), tokenizer.encode(text, bos=False)
    for count in range(1, len(tokens) + 1):
        begun = tokenizer.decode(tokens[:count])
        found = any(string in begun for string in strings if string)
        assert stop(tokens[:count]) == found
        if found:
            return
    pytest.fail("no string was found")


def test_without_strings_nothing_stops(tokenizer):
    tokens = tokenizer.encode("x = 1", bos=False)
    assert not StopStrings(tokenizer, [])(tokens) and not StopStrings(tokenizer, [""])(tokens)
