"""Bits of texts: what a uniform model gives, and that the sums are those of the loss."""

import math

import numpy as np
import pytest
import torch
from small_llama import lively, small_config

from llama2.evaluation.bits import bits_per_byte, bits_per_document


@pytest.fixture
def model():
    return lively(small_config(), "cpu").double()


@pytest.fixture
def uniform(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def ids(count):
    return np.random.default_rng(count).integers(97, size=count).astype(np.int32)


def bits(model, tokens):
    """Of all tokens but the first, in one window."""
    loss = model.loss(torch.from_numpy(tokens[None].astype(np.int64)))
    return loss.item() * (len(tokens) - 1) / math.log(2)


def test_bits_per_byte_of_a_uniform_model(uniform):
    found = bits_per_byte(uniform, ids(78), 50, seq_len=8, batch_size=4)
    assert found == pytest.approx(77 * math.log2(97) / 50)


def test_bits_per_byte_is_the_loss(model):
    assert bits_per_byte(model, ids(17), 10, seq_len=16) == pytest.approx(bits(model, ids(17)) / 10)


def test_bits_per_byte_of_a_text_shorter_than_a_window(uniform):
    assert bits_per_byte(uniform, ids(3), 10, seq_len=8) == pytest.approx(2 * math.log2(97) / 10)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_bits_of_each_document_are_those_of_its_windows(model, batch_size):
    documents = [ids(count) for count in (30, 2, 9, 17, 1, 0, 8, 25)]
    expected = [sum(bits(model, x[i : i + 9]) for i in range(0, len(x) - 1, 8)) for x in documents]
    assert bits_per_document(model, documents, 8, batch_size) == pytest.approx(expected)
    assert expected[4:6] == [0, 0] and min(expected[:4]) > 0


def test_bits_of_a_document_that_begins_a_stream_are_those_of_the_stream(model):
    (found,) = bits_per_document(model, [ids(78)], seq_len=8)
    assert found == pytest.approx(bits_per_byte(model, ids(78), 1, seq_len=8))
