"""flash-attn 2.8's functions on this package's kernels.

To port code, use `import gqa_kernels.flash_attn as flash_attn`, or import the functions from here.
Names, signatures, layouts and return values are flash-attn's; the results and their numerics are
those of `flash_attention` and `flash_attention_varlen` in `ops/attention` and, with a block_table,
of `prefill_attention` in `ops/cache`. In every function:

    dropout_p: 0.0.
    softmax_scale: positive; None means 1 / sqrt(headdim).
    causal: query i sees keys j ≤ i + seqlen_k − seqlen_q: the mask ends in the bottom right corner.
    window_size: (left, right): query i sees the keys from i + seqlen_k − seqlen_q − left to
        i + seqlen_k − seqlen_q + right; a negative number, −1, does not limit a side.
    softcap: positive; 0.0 means none.
    alibi_slopes: float32 (nheads,) or (batch, nheads), a constant.
    deterministic: no effect; gradients always have the same bits, also where it is False.
    return_attn_probs: return (out, softmax_lse, S_dmask); S_dmask is empty, as in flash-attn
        without dropout.

Differences to flash-attn: float32 tensors and int64 bounds are accepted; softmax_lse is
differentiable, and −inf, not +inf, for a query that sees no key; max_seqlen is not used, since the
kernels read the bounds on the device; rows after the last sequence give 0.

headdim is any size up to 256. Where it is no multiple of 8, each call copies q, k and v to new
tensors with zeros after their features, as in flash-attn, and out is a view of the first features;
results and gradients are those of the given tensors. Keys in pages are not copied: the kernel reads
their features one by one, which is slow.

Raises, in every function:
    TypeError, ValueError: an argument of another kind, dtype, shape or device; a negative softcap.
        Errors about a part of a packed tensor name the part, q, k or v; errors about bounds name
        cu_seqlens_q and cu_seqlens_kv.
    NotImplementedError: a dropout_p other than 0.0, a headdim above 256, alibi_slopes that require
        a gradient, an input that requires a gradient with a block_table.
    RuntimeError: tensors that are not on a GPU that Triton drives.

Source: Dao 2023, arXiv:2307.08691; github.com/Dao-AILab/flash-attention v2.8.3,
`flash_attn/flash_attn_interface.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from gqa_kernels.flash_attn.kvcache import flash_attn_with_kvcache
from gqa_kernels.flash_attn.pages import addressed
from gqa_kernels.ops import attention
from gqa_kernels.ops.cache.prefill import prefill_attention
from gqa_kernels.runtime import checks

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# The version of flash-attn with this interface, for code that checks it.
__version__ = "2.8.3"

_Result = Tensor | tuple[Tensor, Tensor, Tensor]


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, object]:
    """Converts flash-attn's options to those of `flash_attention`."""
    if checks.number("dropout_p", dropout_p) != 0.0:
        raise NotImplementedError(f"dropout_p: expected 0.0; got {dropout_p!r}")
    checks.switch("deterministic", deterministic)
    if not checks.number("softcap", softcap) >= 0.0:
        raise ValueError(f"softcap: expected a positive number, or 0.0 for none; got {softcap!r}")
    return {
        "causal": checks.switch("causal", causal),
        "softmax_scale": softmax_scale,
        "window": checks.window_size(window_size),
        "softcap": softcap if softcap > 0.0 else None,
        "alibi_slopes": alibi_slopes,
        "return_lse": checks.switch("return_attn_probs", return_attn_probs),
    }


def _parts(name: str, packed: Tensor, count: int, shape: str) -> tuple[Tensor, ...]:
    """Returns views of the tensors packed in the third-last dimension. The gradient of the views is
    one stacked tensor."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(packed).__name__}")
    if packed.dim() != shape.count(",") + 1 or packed.shape[-3] != count:
        raise ValueError(f"{name}: expected shape [{shape}]; got {list(packed.shape)}")
    return packed.unbind(-3)


def _result(result: Tensor | tuple[Tensor, Tensor]) -> _Result:
    if isinstance(result, tuple):
        out, softmax_lse = result
        return out, softmax_lse, out.new_empty(0)
    return result


def _attend(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, **options: object
) -> _Result:
    """Calls `attend`, which takes a headdim that is a multiple of 8, with any headdim."""
    headdim = q.shape[-1] if isinstance(q, Tensor) and q.dim() else 0
    if headdim % 8 == 0 or headdim > 256:
        return _result(attend(q, k, v, *bounds, **options))
    if not is_compiling():  # before their headdims become others
        for name, x in (("k", k), ("v", v)):
            checks.tensor(name, x, shape=(*["*"] * (q.dim() - 1), headdim), like=("q", q))
    q, k, v = (F.pad(x, (0, -headdim % 8)) for x in (q, k, v))
    options["softmax_scale"] = checks.softmax_scale(options["softmax_scale"], headdim)
    result = attend(q, k, v, *bounds, **options)
    if isinstance(result, tuple):
        out, softmax_lse = result
        return _result((out[..., :headdim], softmax_lse))
    return result[..., :headdim]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """Softmax attention with grouped heads; options and errors: see the module.

    Args:
        q: float32, float16 or bfloat16 (batch, seqlen_q, nheads, headdim), any strides.
        k, v: the same dtype, (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of
            nheads_k, and query head h reads head h // (nheads / nheads_k).
    Returns:
        out (batch, seqlen_q, nheads, headdim); or (out, softmax_lse, S_dmask), softmax_lse float32
        (batch, nheads, seqlen_q).
    """
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip
    return _attend(attention.flash_attention, q, k, v, **options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` with keys and values in one tensor, which is not copied.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        kv: (batch, seqlen_k, 2, nheads_k, headdim).
    """
    k, v = _parts("kv", kv, 2, "batch, seqlen_k, 2, nheads_k, headdim")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` with queries, keys and values in one tensor, which is not copied.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim).
    """
    q, k, v = _parts("qkv", qkv, 3, "batch, seqlen, 3, nheads, headdim")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> _Result:
    """`flash_attn_func` of packed sequences; a sequence does not see the others.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim); with a block_table (num_pages, page_size, nheads_k,
            headdim), any page_size; pages of no power of two are read in parts, without a copy
            where `flash_attn_with_kvcache` makes none.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (batch + 1,): sequence b has the rows from
            cu_seqlens[b] up to cu_seqlens[b + 1]; with a block_table, only the difference of two
            bounds of keys counts, the number of keys of the sequence.
        max_seqlen_q, max_seqlen_k: not used.
        block_table: int32 (batch, max_pages): key j of sequence b is
            k[block_table[b, j // page_size], j % page_size]. A page outside k has no keys that a
            query sees. The keys are read where they are.
    Returns:
        out (total_q, nheads, headdim); or (out, softmax_lse, S_dmask), softmax_lse float32
        (nheads, total_q).
    """
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip
    if block_table is None:
        bounds = cu_seqlens_q, cu_seqlens_k
        return _attend(attention.flash_attention_varlen, q, k, v, *bounds, **options)
    if not is_compiling():  # checks are not traced
        _check_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
    page_size = k.shape[1]
    if page_size & (page_size - 1):
        k, v, block_table = addressed(k, v, block_table)
    lengths = cu_seqlens_q, cu_seqlens_k.diff()
    return _result(prefill_attention(q, k, v, *lengths, block_table=block_table, **options))


def _check_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor,
) -> None:
    """Checks what `prefill_attention` would report under another name, and that k has q's dtype."""
    like = ("q", q)
    checks.tensor("q", q, shape=("total_q", "nheads", "headdim"))
    bounds = {"dtypes": checks.INTS, "like": like}
    checks.tensor("cu_seqlens_q", cu_seqlens_q, shape=("batch + 1",), **bounds)
    checks.tensor("cu_seqlens_k", cu_seqlens_k, shape=tuple(cu_seqlens_q.shape), **bounds)
    shape = ("num_pages", "page_size", "nheads_k", q.shape[2])
    checks.tensor("k", k, shape=shape, like=like)
    checks.tensor("v", v, shape=tuple(k.shape), like=like)
    for name, pages in (("k", k), ("v", v)):
        checks.same_dtype(name, pages, *like)
    table = (cu_seqlens_q.shape[0] - 1, "max_pages")
    checks.tensor("block_table", block_table, dtypes=(torch.int32,), shape=table, like=like)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` with keys and values in one tensor, which is not copied.

    Args:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim).
    """
    k, v = _parts("kv", kv, 2, "total_k, 2, nheads_k, headdim")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor, which is not copied.

    Args:
        qkv: (total, 3, nheads, headdim).
        cu_seqlens: the bounds of queries and keys.
    """
    q, k, v = _parts("qkv", qkv, 3, "total, 3, nheads, headdim")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip
