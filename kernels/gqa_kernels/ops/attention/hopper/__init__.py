"""Attention for Hopper (sm_90), in Gluon: off by default, as it has not run on a GPU yet.

`forward.py`: the forward kernel; `consumer.py`: its consumers; `softmax.py`: their softmax;
`options.py`: windows, soft cap; `blocks.py`: packed sequences; `dkdv.py`, `dq.py`: the backward
kernels; `fused.py`: both in one, where the order of sums may differ from run to run; `keys.py`:
what it shares with `dkdv.py`; `pipeline.py`: rings of tiles, turns; `products.py`: products of
tiles in parts; `tiles.py`: the order of tiles, masks.
`triton.experimental` may change in every version of Triton, so these are imported only when a call
runs them: `ops/attention/launch.py` chooses by the rows of `runtime/hopper_configs.py`, all of
which say `measured=False`, and `flash_attention` below asks for such a row.
"""

from typing import Any

import triton
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from gqa_kernels.ops.attention.backward import launch_backward
from gqa_kernels.ops.attention.call import Call, batched, check, prepared
from gqa_kernels.ops.attention.launch import hopper_config, launch_forward
from gqa_kernels.runtime import checks, library, target
from gqa_kernels.runtime.hopper_configs import HOPPER_BACKWARD, HOPPER_FORWARD


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gqa_kernels.flash_attention` by the kernels for Hopper, measured or not.

    For benchmarks and tests. Numerics are those of the portable kernels; bits differ.

    Args:
        q: float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`; head_dim 64, 80, 96,
            128 or 256, with a gradient 64 or 128; any strides, without a copy where TMA can
            address them (`layout.fits_tma`).
        k, v: `[batch, seq_len_kv, num_kv_heads, head_dim]`, likewise.
        window, softcap: one of them or, at head_dim 64, both. The portable kernels compute their
            gradient.
        deterministic: False: one kernel with five matrix products computes all gradients
            (`fused.py`), unless the call has a window or a soft cap, q requires no gradient, or
            neither k nor v does. Programs add to the gradient of q in an order that differs from
            run to run, and so do its last bits. Takes float32 memory of q's shape, and Triton 3.8
            or newer.
        All else as in `gqa_kernels.flash_attention`.
    Returns:
        out; or (out, lse) as `gqa_kernels.flash_attention` returns them.
    Raises:
        TypeError, ValueError: as `gqa_kernels.flash_attention`.
        NotImplementedError: another architecture, dtype, head_dim or combination of options;
            deterministic=False with an older Triton.
    """
    call = Call(q, k, v, *[None] * 6, softmax_scale, None, None, softcap)
    return _attend(call, causal, window, return_lse, deterministic)


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gqa_kernels.flash_attention_varlen` by the forward kernel for Hopper, measured or not.

    As `flash_attention`; the portable kernels compute the gradient.

    Args:
        q: `[total_q, num_q_heads, head_dim]`.
        k, v: `[total_kv, num_kv_heads, head_dim]`.
        All else as in `gqa_kernels.flash_attention_varlen` and `flash_attention`.
    Returns:
        As `gqa_kernels.flash_attention_varlen`.
    Raises:
        As `flash_attention`.
    """
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if not isinstance(bounds, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(bounds).__name__}")
    bounds = cu_seqlens_q, cu_seqlens_kv
    call = Call(q, k, v, *bounds, *[None] * 4, softmax_scale, None, None, softcap)
    return _attend(call, causal, window, return_lse)


def _attend(
    call: Call,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    return_lse: bool,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    causal = checks.flag("causal", causal)
    if not checks.flag("deterministic", deterministic):
        _check_additions()
    left, right = checks.window(window)
    call = call._replace(
        softmax_scale=checks.optional_number("softmax_scale", call.softmax_scale),
        window_left=left,
        window_right=0 if causal else right,
        softcap=checks.optional_number("softcap", call.softcap),
    )
    check(*call)
    target.check_device("q", call.q)
    differentiates = library.keeps_for_gradient(call.q, call.k, call.v)
    with target.device_of(call.q):
        _check_covered(prepared(call), differentiates)
    if differentiates:
        out, lse = _Differentiable.apply(deterministic, *call)
    else:
        out, lse, _ = _forward(call, need_lse=return_lse, need_residue=False)
    return (out, lse * call.score_unit) if return_lse else out


def _check_additions() -> None:
    from gqa_kernels.ops.attention.hopper import fused

    if fused.start_add is None:
        raise NotImplementedError(
            "deterministic: expected True with this Triton, as False needs 3.8 or newer; "
            f"got False with Triton {triton.__version__}"
        )


def _check_covered(call: Call, differentiates: bool) -> None:
    head_dim = call.q.shape[-1]
    plain = call._replace(
        cu_seqlens_q=None, cu_seqlens_kv=None, window_left=None, window_right=None, softcap=None
    )
    tables = [(HOPPER_FORWARD, "head_dim 64, 80, 96, 128 or 256")]
    if differentiates:
        tables.append((HOPPER_BACKWARD, "head_dim 64 or 128 with a gradient"))
    for table, sizes in tables:
        if hopper_config(plain, table, unmeasured=True) is None:
            dtype = str(call.q.dtype).removeprefix("torch.")
            raise NotImplementedError(
                f"q: expected float16 or bfloat16, {sizes}, on sm_90; "
                f"got {dtype}, head_dim {head_dim}, on {target.current().arch}"
            )
    if hopper_config(call, HOPPER_FORWARD, unmeasured=True) is None:
        raise NotImplementedError(
            f"window, softcap: expected one of them at head_dim {head_dim}; got both"
        )


def _forward(call: Call, **needs: bool) -> tuple[Tensor | None, ...]:
    results = launch_forward(prepared(call), **needs, unmeasured=True)
    if not call.packed:
        return results
    return tuple(None if x is None else x.squeeze(0) for x in results)


class _Differentiable(Function):
    """(out, lse in score units) of the fields of a call."""

    @staticmethod
    def forward(ctx: FunctionCtx, deterministic: bool, *fields: Any) -> tuple[Tensor, Tensor]:
        call = Call(*fields)
        out, lse, residue = _forward(call, need_lse=True, need_residue=True)
        ctx.save_for_backward(*call[:5], out, lse, residue)
        ctx.numbers, ctx.deterministic = call[5:], deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, residue = ctx.saved_tensors
        call = Call(*tensors, *ctx.numbers)
        need_dq, *need_dkdv = ctx.needs_input_grad[1:4]
        grads = (None, None, None)
        if dout is not None or dlse is not None:
            dout = out.new_zeros(out.shape) if dout is None else dout
            *grads, _ = launch_backward(
                prepared(call),
                *batched(call.packed, dout, dlse, out, lse, residue),
                need_dq=need_dq,
                need_dkdv=any(need_dkdv),
                need_dsinks=False,
                unmeasured=True,
                deterministic=ctx.deterministic,
            )
            if call.packed:
                grads = [None if grad is None else grad.squeeze(0) for grad in grads]
        return None, *grads, *[None] * (len(call) - 3)
