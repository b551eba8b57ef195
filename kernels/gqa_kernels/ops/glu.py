"""SwiGLU: silu(gate) · up, with silu(z) = z · σ(z).

Shazeer 2020, arXiv:2002.05202. With s = σ(gate):

    dup   = dy · gate · s
    dgate = dy · up · s · (1 + gate · (1 − s))

One program owns a block of one row. It addresses gate and up by their row strides, so the halves of
a packed projection need no copy. Saved for backward: gate and up; the backward pass recomputes σ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gqa_kernels.runtime import checks, configs, launch, layout, library, target


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * WIDTH + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program differentiates BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    denominator = 1.0 + tl.exp(-gate)
    if dup_ptr is not None:
        # gate / denominator rounds once less than gate · σ.
        dup = dy * (gate / denominator)
        tl.store(dup_ptr + row * WIDTH + columns, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / denominator
        dgate = dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(dgate_ptr + row * WIDTH + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


_launch_forward = launch.launcher(_forward_kernel)
_launch_backward = launch.launcher(_backward_kernel)


def _plan(num_rows: int, width: int) -> tuple[tuple[int, int], int]:
    """(grid, BLOCK)."""
    block = min(configs.SWIGLU_BLOCK, layout.power_of_2(width))
    return (num_rows, layout.cdiv(width, block)), block


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    width = gate.shape[-1]
    gate_rows, gate_stride = layout.rows_and_stride(gate)
    up_rows, up_stride = layout.rows_and_stride(up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grid, block = _plan(gate.numel() // width, width)
    with target.device_of(gate):
        _launch_forward(
            grid,
            gate_ptr=gate_rows,
            up_ptr=up_rows,
            y_ptr=y,
            gate_stride=gate_stride,
            up_stride=up_stride,
            WIDTH=width,
            BLOCK=block,
            num_warps=configs.SWIGLU_NUM_WARPS,
        )
    return y


def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    width = gate.shape[-1]
    dy_rows, dy_stride = layout.rows_and_stride(dy)
    gate_rows, gate_stride = layout.rows_and_stride(gate)
    up_rows, up_stride = layout.rows_and_stride(up)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_dgate else None
    dup = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_dup else None
    grid, block = _plan(gate.numel() // width, width)
    with target.device_of(gate):
        _launch_backward(
            grid,
            dy_ptr=dy_rows,
            gate_ptr=gate_rows,
            up_ptr=up_rows,
            dgate_ptr=dgate,
            dup_ptr=dup,
            dy_stride=dy_stride,
            gate_stride=gate_stride,
            up_stride=up_stride,
            WIDTH=width,
            BLOCK=block,
            num_warps=configs.SWIGLU_NUM_WARPS,
        )
    return dgate, dup


def _check(gate: Tensor, up: Tensor) -> None:
    checks.tensor("gate", gate)
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"gate: expected a last dimension of 1 or more; got {list(gate.shape)}")
    checks.tensor("up", up, shape=gate.shape, like=("gate", gate))
    checks.same_dtype("up", up, "gate", gate)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(
    dy: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    return tuple(gate.new_empty(gate.shape) if need else None for need in (need_dgate, need_dup))


_BACKWARD = library.Op("swiglu_backward", _backward, _backward_fake)


def _setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: FunctionCtx, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:
        return None, None
    need_dgate, need_dup = ctx.needs_input_grad
    dgate, dup = _BACKWARD(dy, *ctx.saved_tensors, need_dgate, need_dup)
    return dgate if need_dgate else None, dup if need_dup else None


_SWIGLU = library.Op(
    "swiglu",
    _forward,
    _fake,
    check=_check,
    setup_context=_setup_context,
    backward=_differentiate,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, in float32, rounded once; see `reference.swiglu`.

    Args:
        gate, up: float32, float16 or bfloat16 `[..., intermediate_size]`, of one shape and dtype,
            any strides.
    Returns:
        `[..., intermediate_size]`, contiguous, in `gate.dtype`.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        RuntimeError: gate is not on a GPU that Triton drives.
    """
    return _SWIGLU(gate, up)
