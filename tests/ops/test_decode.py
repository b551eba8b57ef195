"""What is peculiar to decode_attention."""

from functools import partial

import pytest
import torch
from budget import assert_call

from gqa_kernels import native, reference
from gqa_kernels.ops.cache.decode import MAX_NEW_TOKENS, decode_attention
from gqa_kernels.runtime import configs

CHUNK = configs.DECODE_CHUNK


def lengths(*values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def assert_within_budget(q, k_cache, v_cache, seq_lens):
    inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "seq_lens": seq_lens}
    inputs["return_lse"] = True
    assert_call(decode_attention, reference.decode_attention, inputs)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_lengths_around_a_chunk_border(dtype, draw, device):
    values = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
    k, v = draw(len(values), 2 * CHUNK, 1, 16), draw(len(values), 2 * CHUNK, 1, 16)
    for row, length in enumerate(values):
        k[row, length:] = v[row, length:] = float("nan")
    q = draw(len(values), 1, 2, 16)
    seq_lens = lengths(*values, device=device, dtype=dtype)
    assert_within_budget(q, k, v, seq_lens)
    assert torch.equal(decode_attention(q, k, v, seq_lens)[0], torch.zeros_like(q[0]))


@pytest.mark.parametrize("length", (41, 1000, 2**31, 2**32 + 3))
def test_a_length_beyond_the_cache_counts_as_its_end(length, draw, device):
    q, k, v = draw(1, 1, 2, 16), draw(1, 40, 1, 16), draw(1, 40, 1, 16)
    beyond = decode_attention(q, k, v, lengths(length, device=device, dtype=torch.int64))
    assert torch.equal(beyond, decode_attention(q, k, v, lengths(40, device=device)))


def test_without_lengths_every_sequence_fills_the_cache(draw, device):
    q, k, v = draw(2, 3, 4, 16), draw(2, 40, 2, 16), draw(2, 40, 2, 16)
    assert_within_budget(q, k, v, None)
    for ops in (decode_attention, reference.decode_attention, native.decode_attention):
        assert torch.equal(ops(q, k, v, None), ops(q, k, v, lengths(40, 40, device=device)))
    one = draw(2, 1, 2, 16)  # a capacity of 1
    assert_within_budget(draw(2, 1, 4, 16), one, one, None)


def assert_is_flash_attention(q, k, v):
    def decoded(q, k, v):
        whole = lengths(*[k.shape[1]] * len(k), device=k.device)
        return decode_attention(q, k, v, whole, return_lse=True)

    causal = partial(reference.flash_attention, causal=True, return_lse=True)
    assert_call(decoded, causal, {"q": q, "k": k, "v": v})


@pytest.mark.covering(1)
@pytest.mark.parametrize("seq_len_q", (1, 2, 5, 16))
@pytest.mark.parametrize("group_size", (1, 3, 7, 8))
def test_new_tokens_are_causal(seq_len_q, group_size, draw, device):
    """The same as the last rows of a causal attention over the whole sequence."""
    q, k, v = draw(1, seq_len_q, group_size, 32), draw(1, 70, 1, 32), draw(1, 70, 1, 32)
    assert_is_flash_attention(q, k, v)


@pytest.mark.parametrize("length", (1, 70, CHUNK + 7))
def test_lse_is_flash_attentions_and_changes_no_output(length, draw, device):
    """Of one split and of two; `[batch, num_q_heads, seq_len_q]`, where heads are no tokens."""
    q, k, v = draw(2, 3, 6, 16), draw(2, length, 2, 16), draw(2, length, 2, 16)
    seq_lens = lengths(length, length, device=device)
    out, lse = decode_attention(q, k, v, seq_lens, return_lse=True)
    assert torch.equal(out, decode_attention(q, k, v, seq_lens))
    assert lse.shape == (2, 6, 3) and lse.dtype == torch.float32
    assert_is_flash_attention(q, k, v)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("length", (1, 70, CHUNK + 7))
def test_a_lone_row_as_a_vector(length, dtype, draw, device, monkeypatch):
    """One new token of MHA, multiplied without padding."""
    monkeypatch.setattr(configs, "DECODE_LONE_ROW", 1)
    q, k, v = (draw(2, size, 3, 40, dtype=dtype) for size in (1, length, length))
    assert_within_budget(q, k, v, lengths(length, length // 2, device=device))


def test_fewer_keys_than_new_tokens(draw, device):
    q, k, v = draw(1, 4, 2, 16), draw(1, 40, 1, 16), draw(1, 40, 1, 16)
    out = decode_attention(q, k, v, lengths(2, device=device))
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert_within_budget(q, k, v, lengths(2, device=device))


def test_more_rows_than_one_tile(draw, device):
    """16 new tokens × 8 heads of a group are two tiles of 64 rows."""
    q, k, v = draw(1, 16, 8, 16), draw(1, 90, 1, 16), draw(1, 90, 1, 16)
    assert_within_budget(q, k, v, lengths(77, device=device))


def test_a_sequence_does_not_depend_on_the_batch(draw, device):
    q, k, v = draw(3, 1, 4, 32), draw(3, 600, 2, 32), draw(3, 600, 2, 32)
    seq_lens = lengths(600, 300, 7, device=device)
    together = decode_attention(q, k, v, seq_lens)
    for b in range(3):
        row = slice(b, b + 1)
        assert torch.equal(together[row], decode_attention(q[row], k[row], v[row], seq_lens[row]))


def test_caches_of_many_layers_and_strided_lengths(draw, device):
    caches = draw(2, 3, 50, 2, 16)  # [layers, batch, max_seq_len, num_kv_heads, head_dim]
    q = draw(3, 1, 4, 16)
    seq_lens = lengths(9, 99, 50, 99, 1, 99, device=device)[::2]
    out = decode_attention(q, caches[1], caches[0], seq_lens)
    wanted = decode_attention(q, caches[1].clone(), caches[0].clone(), seq_lens.clone())
    assert torch.equal(out, wanted)


def test_offsets_beyond_32_bits(draw, device):
    """Strides of 31 bits whose multiples need more; only the pages that are touched exist."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    cache = storage.as_strided((3, 2, 1, 32), (apart, 32, 32, 1))
    cache.copy_(torch.randn(3, 2, 1, 32))
    q, seq_lens = draw(3, 1, 2, 32, dtype=torch.float16), lengths(2, 1, 2, device=device)
    out = decode_attention(q, cache, cache, seq_lens)
    assert torch.equal(out, decode_attention(q, cache.clone(), cache.clone(), seq_lens))


def test_no_capacity_and_no_batch(draw, device):
    q = draw(2, 1, 2, 16)
    empty = draw(2, 0, 1, 16)
    out, lse = decode_attention(q, empty, empty, lengths(0, 0, device=device), return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((2, 2, 1), -float("inf"), device=device))
    cache = draw(0, 8, 1, 16)
    out = decode_attention(q[:0], cache, cache, lengths(device=device))
    assert out.shape == (0, 1, 2, 16)


def test_wrong_arguments(draw, device):
    q, k = draw(2, 1, 2, 16), draw(2, 8, 1, 16)
    seq_lens = lengths(8, 8, device=device)
    with pytest.raises(ValueError, match=r"seq_lens: expected shape \[2\]; got \[1\]"):
        decode_attention(q, k, k, seq_lens[:1])
    with pytest.raises(TypeError, match="seq_lens: expected dtype int32, int64"):
        decode_attention(q, k, k, seq_lens.float())
    with pytest.raises(NotImplementedError, match="q: expected a seq_len_q of 1 to 16; got 17"):
        decode_attention(draw(2, 17, 2, 16), k, k, seq_lens)
    with pytest.raises(ValueError, match="k_cache: expected contiguous features"):
        decode_attention(
            q,
            k.expand(2, 8, 1, 16).transpose(1, 3)[:, :, :, :16].contiguous().transpose(1, 3),
            k,
            seq_lens,
        )
    with pytest.raises(NotImplementedError, match="q: expected inputs without a gradient"):
        decode_attention(q.requires_grad_(), k, k, seq_lens)


def test_the_kernel_takes_as_many_new_tokens_as_the_reference():
    assert MAX_NEW_TOKENS == reference.MAX_NEW_TOKENS
