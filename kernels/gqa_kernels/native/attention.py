"""Attention by `F.scaled_dot_product_attention`; contracts as in `reference.attention`."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_kernels import reference
from gqa_kernels.native.rows import own_dtype, wide
from gqa_kernels.reference.attention import packed_bounds


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    *,
    visible: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention, `[batch, seq_len, num_heads, head_dim]`; each query must see a key.

    16-bit inputs are converted to float32. On a CPU that is faster than PyTorch's function in
    bfloat16 or float16, whose gradients also exceed the error budget
    (bench/results/gradients.json). The queries are scaled before the call: PyTorch's backward pass
    recomputes the weights from the lse of the forward pass, so it has to round the scores as the
    forward pass did.

    Args:
        visible: bool, broadcast to `[batch, num_q_heads, seq_len_q, seq_len_kv]`.
        causal: query i sees keys j ≤ i.
    """
    dtype, grouped = q.dtype, q.shape[2] != k.shape[2]
    q = wide(q) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    heads_first = (x.transpose(1, 2) for x in (q, wide(k), wide(v)))
    with own_dtype(q):
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=visible, is_causal=causal, scale=1.0, enable_gqa=grouped
        )
    return out.transpose(1, 2).to(dtype)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.flash_attention`, which computes every option but `causal`."""
    options = {
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "key_ranges": key_ranges,
        "key_mask": key_mask,
    }
    seq_len_q, seq_len_kv = q.shape[1], k.shape[1]
    sees_nothing = seq_len_kv == 0 or (causal and seq_len_q > seq_len_kv)
    plain = not return_lse and all(x is None for x in options.values())
    if not plain or sees_nothing or q.numel() == 0:
        options |= {"causal": causal, "softmax_scale": softmax_scale, "return_lse": return_lse}
        return reference.flash_attention(q, k, v, **options)
    visible = None
    if causal and 1 < seq_len_q < seq_len_kv:  # a single query sees all keys
        visible = torch.ones(seq_len_q, seq_len_kv, dtype=torch.bool, device=q.device)
        visible = visible.tril(seq_len_kv - seq_len_q)
    square = causal and seq_len_q == seq_len_kv
    return attend(q, k, v, softmax_scale, visible=visible, causal=square)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.flash_attention_varlen`, which computes every option but `causal`."""
    options = {
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    settings = {"causal": causal, "softmax_scale": softmax_scale}
    if return_lse or any(x is not None for x in options.values()):
        packed = (q, k, v, cu_seqlens_q, cu_seqlens_kv)
        return reference.flash_attention_varlen(
            *packed, **settings, **options, return_lse=return_lse
        )
    queries = _sequences("cu_seqlens_q", q, cu_seqlens_q, tail=True)
    keys, values = (_sequences("cu_seqlens_kv", x, cu_seqlens_kv, tail=False) for x in (k, v))
    each = zip(queries, keys, values, strict=True)
    outs = [flash_attention(*(x[None] for x in sequence), **settings)[0] for sequence in each]
    return torch.cat(outs)


def _sequences(name: str, x: Tensor, cu_seqlens: Tensor, *, tail: bool) -> tuple[Tensor, ...]:
    """Splits x into the packed sequences and, with `tail`, the rows after them."""
    bounds = packed_bounds(name, cu_seqlens, len(x))
    end = len(x) if tail else bounds[-1]
    # The gradient of a split is one tensor; each slice would have a gradient of the size of x.
    return x[:end].split([j - i for i, j in pairwise([*bounds, end])])
