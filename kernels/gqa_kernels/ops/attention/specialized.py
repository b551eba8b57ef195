"""Attention whose dk and dv `dkdv_specialized.py` computes, for benchmarks and tests."""

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from gqa_kernels.ops.attention.backward import launch_backward
from gqa_kernels.ops.attention.call import Call, check, prepared
from gqa_kernels.ops.attention.launch import launch_forward
from gqa_kernels.runtime import checks, target
from gqa_kernels.runtime.hopper_configs import SPECIALIZED_DKDV, hopper_config


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """`gqa_kernels.flash_attention` with dk and dv of `dkdv_specialized.py`, measured or not.

    Numerics are those of the portable kernels; the bits of dk and dv differ.

    Args:
        q: float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`; head_dim 64 or 128.
        k, v: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        causal, softmax_scale: as in `gqa_kernels.flash_attention`.
    Raises:
        TypeError, ValueError: as `gqa_kernels.flash_attention`.
        NotImplementedError: another architecture than sm_90, dtype or head_dim.
    """
    causal = checks.flag("causal", causal)
    call = Call(
        q, k, v, *[None] * 6,
        checks.optional_number("softmax_scale", softmax_scale), None, 0 if causal else None, None,
    )  # fmt: skip
    check(*call)
    target.check_device("q", q)
    with target.device_of(q):
        config = hopper_config(
            SPECIALIZED_DKDV, target.current().arch, q.element_size(), q.shape[-1], unmeasured=True
        )
        if config is None:
            dtype = str(q.dtype).removeprefix("torch.")
            raise NotImplementedError(
                "q: expected float16 or bfloat16, head_dim 64 or 128, on sm_90; "
                f"got {dtype}, head_dim {q.shape[-1]}, on {target.current().arch}"
            )
    return _Differentiable.apply(*call)


class _Differentiable(Function):
    """out of the fields of a call."""

    @staticmethod
    def forward(ctx: FunctionCtx, *fields: Any) -> Tensor:
        call = Call(*fields)
        out, lse, residue = launch_forward(prepared(call), need_lse=True, need_residue=True)
        ctx.save_for_backward(*call[:3], out, lse, residue)
        ctx.numbers = call[3:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, residue = ctx.saved_tensors
        need_dq, *need_dkdv = ctx.needs_input_grad[:3]
        *grads, _ = launch_backward(
            prepared(Call(q, k, v, *ctx.numbers)), dout, None, out, lse, residue,
            need_dq=need_dq, need_dkdv=any(need_dkdv), need_dsinks=False, specialize=True,
        )  # fmt: skip
        return *grads, *[None] * len(ctx.numbers)
