"""Rotary position embedding of q and k in one launch.

    (a, b) → (a · cos[p] − b · sin[p], b · cos[p] + a · sin[p])

for each pair of features (a, b) of a head at position p, in float32. Su et al. 2021,
arXiv:2104.09864. Backward is the same kernel with sin negated, the transpose of the rotation.

One program owns BLOCK_H heads, of q or of k, of one token. It addresses q and k by their strides,
so views of a fused projection need no copy. Only the angles are saved for backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gqa_kernels.primitives.rotation import (
    heads_at,
    heads_per_program,
    load_angles,
    load_pairs,
    rotate,
    store_pairs,
)
from gqa_kernels.runtime import checks, launch, layout, library, target


@triton.jit
def _rotate_heads(x, y, cos, sin, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotates heads x into heads y."""
    a, b = load_pairs(x, HEAD_DIM, cos.shape[1], INTERLEAVED)
    a, b = rotate(a, b, cos, sin)
    store_pairs(y, a, b, HEAD_DIM, INTERLEAVED)


# Triton specialises tuples regardless of do_not_specialize, so the strides of positions are
# scalars.
@triton.jit(
    do_not_specialize=["positions_stride_b", "positions_stride_t", "seq_len", "max_seq_len"]
)
def _rotate_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_out_ptr,
    k_out_ptr,
    q_strides,
    k_strides,
    positions_stride_b,
    positions_stride_t,
    seq_len,
    max_seq_len,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One program rotates BLOCK_H heads, of q or of k, of one token."""
    token = tl.program_id(0).to(tl.int64)
    batch, index = token // seq_len, token % seq_len
    position = index
    if positions_ptr is not None:
        position_ptr = positions_ptr + batch * positions_stride_b + index * positions_stride_t
        position = tl.load(position_ptr).to(tl.int64)
    cos, sin = load_angles(cos_ptr, sin_ptr, position, max_seq_len, HEAD_DIM, BLOCK_PAIRS)
    if INVERSE:
        sin = -sin
    NUM_Q_BLOCKS: tl.constexpr = (NUM_Q_HEADS + BLOCK_H - 1) // BLOCK_H
    block = tl.program_id(1)
    if block < NUM_Q_BLOCKS:
        first_head = block * BLOCK_H
        q_ptr += batch * q_strides[0] + index * q_strides[1]
        q_out_ptr += token * NUM_Q_HEADS * HEAD_DIM
        x = heads_at(q_ptr, q_strides[2], first_head, NUM_Q_HEADS, BLOCK_H)
        y = heads_at(q_out_ptr, HEAD_DIM, first_head, NUM_Q_HEADS, BLOCK_H)
        _rotate_heads(x, y, cos, sin, HEAD_DIM, INTERLEAVED)
    else:
        first_head = (block - NUM_Q_BLOCKS) * BLOCK_H
        k_ptr += batch * k_strides[0] + index * k_strides[1]
        k_out_ptr += token * NUM_KV_HEADS * HEAD_DIM
        x = heads_at(k_ptr, k_strides[2], first_head, NUM_KV_HEADS, BLOCK_H)
        y = heads_at(k_out_ptr, HEAD_DIM, first_head, NUM_KV_HEADS, BLOCK_H)
        _rotate_heads(x, y, cos, sin, HEAD_DIM, INTERLEAVED)


_launch_rotate = launch.launcher(_rotate_kernel)


def _rotate(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    *,
    inverse: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Rotates q and k; a tensor that is None is skipped."""
    q = None if q is None else layout.contiguous_features(q)
    k = None if k is None else layout.contiguous_features(k)
    some = k if q is None else q
    batch, seq_len, _, head_dim = some.shape
    num_q_heads = 0 if q is None else q.shape[2]
    num_kv_heads = 0 if k is None else k.shape[2]
    q_out = k_out = None
    if q is not None:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if k is not None:
        k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    block_h = heads_per_program(num_q_heads, num_kv_heads)
    num_blocks = layout.cdiv(num_q_heads, block_h) + layout.cdiv(num_kv_heads, block_h)
    with target.device_of(some):
        _launch_rotate(
            (batch * seq_len, num_blocks),
            # A tensor that is None has no heads, so no program reads it: any pointer will do.
            q_ptr=some if q is None else q,
            k_ptr=some if k is None else k,
            cos_ptr=cos.contiguous(),
            sin_ptr=sin.contiguous(),
            positions_ptr=positions,
            q_out_ptr=k_out if q is None else q_out,
            k_out_ptr=q_out if k is None else k_out,
            q_strides=(some if q is None else q).stride()[:3],
            k_strides=(some if k is None else k).stride()[:3],
            positions_stride_b=0 if positions is None else positions.stride(0),
            positions_stride_t=0 if positions is None else positions.stride(1),
            seq_len=seq_len,
            max_seq_len=cos.shape[0],
            NUM_Q_HEADS=num_q_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_H=block_h,
            BLOCK_PAIRS=layout.power_of_2(head_dim // 2),
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            num_warps=1,
        )
    return q_out, k_out


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    checks.tensor("q", q, shape=("batch", "seq_len", "num_q_heads", "head_dim"))
    batch, seq_len, _, head_dim = q.shape
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"q: expected an even head_dim; got {head_dim}")
    checks.tensor("k", k, shape=(batch, seq_len, "num_kv_heads", head_dim), like=("q", q))
    checks.same_dtype("k", k, "q", q)
    for name, table in (("cos", cos), ("sin", sin)):
        shape = ("max_seq_len" if name == "cos" else cos.shape[0], head_dim // 2)
        checks.tensor(name, table, dtypes=(torch.float32,), shape=shape, like=("q", q))
    if positions is None:
        if seq_len > cos.shape[0]:
            raise ValueError(f"q: expected seq_len up to cos's {cos.shape[0]} rows; got {seq_len}")
    else:
        checks.tensor(
            "positions", positions, dtypes=checks.INTS, shape=(batch, seq_len), like=("q", q)
        )


def _launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, positions, interleaved)


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward(
    dq: Tensor | None,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return _rotate(dq, dk, cos, sin, positions, interleaved, inverse=True)


def _backward_fake(
    dq: Tensor | None, dk: Tensor | None, *_: object
) -> tuple[Tensor | None, Tensor | None]:
    return tuple(None if x is None else x.new_empty(x.shape) for x in (dq, dk))


_BACKWARD = library.Op("apply_rope_backward", _backward, _backward_fake)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.interleaved = inputs
    for name, needs_grad in zip(("cos", "sin"), ctx.needs_input_grad[2:4], strict=True):
        if needs_grad:
            raise NotImplementedError(f"{name}: expected a constant; got one that requires grad")
    ctx.save_for_backward(cos, sin, positions)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: FunctionCtx, dq: Tensor | None, dk: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_dq = ctx.needs_input_grad[0] and dq is not None
    need_dk = ctx.needs_input_grad[1] and dk is not None
    if need_dq or need_dk:
        dq, dk = dq if need_dq else None, dk if need_dk else None
        dq, dk = _BACKWARD(dq, dk, *ctx.saved_tensors, ctx.interleaved)
    return dq if need_dq else None, dk if need_dk else None, None, None, None, None


_APPLY_ROPE = library.Op(
    "apply_rope",
    _launch,
    _fake,
    check=_check,
    setup_context=_setup_context,
    backward=_differentiate,
)


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by the angles of their positions; see `reference.apply_rope`.

    Args:
        q: float32, float16 or bfloat16 `[batch, seq_len, num_q_heads, head_dim]`, any strides.
        k: the same dtype, `[batch, seq_len, num_kv_heads, head_dim]`, any strides.
        cos, sin: float32 `[max_seq_len, head_dim / 2]`; constants without a gradient.
        positions: int32 or int64 `[batch, seq_len]`; None means 0, 1, … seq_len − 1. A position
            outside [0, max_seq_len) gives NaN in its row.
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + head_dim / 2).
    Returns:
        (q, k) rotated, in new contiguous tensors.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: cos or sin requires a gradient while autograd records.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    interleaved = checks.flag("interleaved", interleaved)
    return _APPLY_ROPE(q, k, cos, sin, positions, interleaved)
