"""Makes torch.nn.functional.scaled_dot_product_attention itself use this package's kernels.

PyTorch 2.13 has a registry of flash attention implementations. With this one active, unmodified
models that call `F.scaled_dot_product_attention` run on `flash_attention`, including gradients, and
so does `torch.nn.attention.varlen.varlen_attn`:

    from gqa_kernels.integrations import torch_sdpa

    torch_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("gqa_kernels")
    ...
    torch.nn.attention.restore_flash_attention_impl()

or, temporarily, `with torch_sdpa.activated(): ...`. Both affect the whole process.

PyTorch still chooses which calls it gives to flash attention: float16 and bfloat16 tensors on a
GPU, head_dim up to 256, no mask, equal lengths if `is_causal`, and no other kernel preferred (see
`torch.nn.attention.sdpa_kernel`). Other calls, such as those with a mask or in float32, do not
reach this module. Calls that reach it and are not supported raise: dropout, the debug mask, and
varlen_attn's num_splits above 1. varlen_attn's seqused_k and block_table run on
`prefill_attention`, which reads keys in pages of any size where they are.

This has not been tried on a GPU. The tests run the same functions registered for CPU tensors, so
they cover dispatch, autograd and compilation but not PyTorch's choice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from gqa_kernels.flash_attn.pages import addressed
from gqa_kernels.ops import attention
from gqa_kernels.ops.cache.prefill import prefill_attention
from gqa_kernels.runtime import checks

__all__ = ["NAME", "activated", "register"]

NAME = "gqa_kernels"


def register() -> None:
    """Adds this implementation to PyTorch's registry without activating it.

    Raises:
        RuntimeError: this PyTorch has no such registry.
    """
    if not hasattr(torch_attention, "restore_flash_attention_impl"):
        raise RuntimeError(
            "torch: expected 2.13 or newer, with torch.nn.attention.register_flash_attention_impl; "
            f"got {torch.__version__}. Use gqa_kernels.scaled_dot_product_attention there"
        )
    torch_attention.register_flash_attention_impl(NAME, register_fn=_Kernels)


@contextmanager
def activated() -> Iterator[None]:
    """Registers and activates this implementation; at exit, reactivates the previous one.

    Backward passes have to run inside too: a later one uses the implementation that is active then.

    Raises:
        RuntimeError: as `register`.
    """
    register()
    before = torch_attention.current_flash_attention_impl()
    torch_attention.activate_flash_attention_impl(NAME)
    try:
        yield
    finally:
        if before is None:
            torch_attention.restore_flash_attention_impl()
        else:
            torch_attention.activate_flash_attention_impl(before)


class _Kernels:
    """Registers the functions below in place of aten's, until removed."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._library = torch.library.Library("aten", "IMPL", dispatch_key)
        for function in (
            _scaled_dot_product_flash_attention,
            _scaled_dot_product_flash_attention_backward,
            _flash_attention_forward,
            _flash_attention_forward_no_dropout_inplace,
            _flash_attention_backward,
        ):
            self._library.impl(function.__name__, function)

    def remove(self) -> None:
        self._library = None  # freeing the library removes its registrations


# The functions below have aten's names, signatures and results. `is_causal` means the same as in
# `flash_attention`: the mask ends in the bottom right corner. F.scaled_dot_product_attention, whose
# mask begins in the top left corner, uses flash attention for equal lengths only.


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple:
    """aten's function for tensors `[batch, num_heads, seq_len, head_dim]`."""
    out, lse, *rest = _flash_attention_forward(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        None, None, query.shape[2], key.shape[2], dropout_p, is_causal, return_debug_mask,
        scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], *rest


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    grad_out, query, key, value, out = (
        x.transpose(1, 2) for x in (grad_out, query, key, value, out)
    )
    grads = _flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, None, None, max_q, max_k,
        dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
    )  # fmt: skip
    return tuple(grad.transpose(1, 2) for grad in grads)


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """aten's function for `[batch, seq_len, num_heads, head_dim]`, or packed
    `[total, num_heads, head_dim]`."""
    _refuse("dropout_p", dropout_p, 0.0)
    _refuse("return_debug_mask", return_debug_mask, False)
    _refuse("alibi_slopes", alibi_slopes, None)  # aten's backward function does not take them
    _refuse("num_splits", num_splits, None, 0, 1)  # this kernel has no split-KV
    sides = window_size_left, window_size_right
    if seqused_k is not None or block_table is not None:
        out, lse = _over_a_cache(
            query, key, value, cum_seq_q, cum_seq_k, max_k, seqused_k, block_table,
            is_causal, scale, *sides,
        )  # fmt: skip
        residue = None
    else:
        call = _call(query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, *sides)
        # aten records its own backward function; whether it will is not visible here.
        out, lse, residue = attention.outputs(call, need_residue=torch.is_grad_enabled())
    # Without dropout, aten reads neither; it saves the second for backward.
    rng_state = torch.empty(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    kept = unused if residue is None else residue
    return _strided_like(query, out), lse, rng_state, kept, query.new_empty(0)


def _flash_attention_forward_no_dropout_inplace(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Writes to out; returns lse."""
    result, lse, *_ = _flash_attention_forward(query, key, value, *args, **kwargs)
    out.copy_(result)
    return lse


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    _refuse("dropout_p", dropout_p, 0.0)
    call = _call(
        query, key, value, cum_seq_q, cum_seq_k,
        is_causal, scale, window_size_left, window_size_right,
    )  # fmt: skip
    residue = unused if unused.dtype == torch.int8 else None  # None in compiled graphs
    *grads, _ = attention.gradients(
        call, grad_out, None, out, logsumexp / call.score_unit, residue,
        need_dq=True, need_dkdv=True, need_dsinks=False,
    )  # fmt: skip
    return tuple(map(_strided_like, (query, key, value), grads))


def _over_a_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor | None,
    max_k: int,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the first seqused_k keys of each sequence: of its pages, or of its rows of
    packed keys. Nothing is copied."""
    if seqused_k is None:
        raise ValueError("seqused_k: expected a tensor with block_table; got None")
    checks.tensor(
        "seqused_k", seqused_k, dtypes=checks.INTS, shape=("batch",), like=("query", query)
    )
    if block_table is None:  # a page for each key
        ints = {"dtypes": checks.INTS, "like": ("query", query)}
        checks.tensor("cum_seq_k", cum_seq_k, shape=("batch + 1",), **ints)
        key, value = key[:, None], value[:, None]
        bounds = cum_seq_k.long()
        seqused_k = torch.minimum(seqused_k, bounds.diff())
        block_table = bounds[:-1, None] + torch.arange(max_k, device=key.device)
        block_table = block_table.int()
    elif key.shape[1] & (key.shape[1] - 1):
        key, value, block_table = addressed(key, value, block_table)
    return prefill_attention(
        query,
        key,
        value,
        cum_seq_q,
        seqused_k,
        block_table=block_table,
        causal=is_causal,
        softmax_scale=scale,
        window=(_side(window_size_left), _side(window_size_right)),
        return_lse=True,
    )


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
) -> attention.Call:
    right = 0 if is_causal else _side(window_size_right)
    return attention.Call(
        query, key, value, cum_seq_q, cum_seq_k, None, None, None, None, scale,
        _side(window_size_left), right, None,
    )  # fmt: skip


def _refuse(name: str, value: object, *supported: object) -> None:
    if not any(value is x or (x is not None and value == x) for x in supported):
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise NotImplementedError(
            f"{name}: expected {supported[0]!r}; got {got}. "
            "torch.nn.attention.restore_flash_attention_impl() returns to PyTorch's own kernels"
        )


def _side(size: int | None) -> int | None:
    return None if size is None or size < 0 else size


def _strided_like(x: Tensor, result: Tensor) -> Tensor:
    """Returns result with the strides of `torch.empty_like(x)`, which compilers expect."""
    promised = torch.empty_like(x, device="meta").stride()
    sizes = zip(x.shape, promised, result.stride(), strict=True)
    if all(size == 1 or want == got for size, want, got in sizes):
        return result
    return torch.empty_like(x).copy_(result)
