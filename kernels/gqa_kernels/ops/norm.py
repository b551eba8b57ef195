"""RMSNorm, alone and after a residual add.

    h = x + residual                     (rounded to x.dtype; alone: h = x)
    y = cast(h · rstd) · weight          rstd = 1 / sqrt(mean(h²) + eps), the cast to x.dtype

Zhang and Sennrich 2019, arXiv:1910.07467. With n = h · rstd and g = weight · dy:

    dh      = rstd · (g − n · mean(g · n)) + the gradient of h's other uses
    dweight = Σ over rows of dy · n

Forward: one program owns one row and holds it in registers. Backward: a program owns every
num_programs-th row and one row of float32 partial sums of dweight; a second kernel adds the partial
sums in a fixed order. Saved for backward: h, weight and rstd (float32, one per row).

Widths up to 16384. A row whose elements are not contiguous is copied first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gqa_kernels.runtime import checks, configs, launch, layout, library, target


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program normalises one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    # WIDTH is constexpr: the compiler drops the loads of lanes that lie beyond it.
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    h = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)  # [BLOCK]
    dtype = h.dtype
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(h_ptr + row * WIDTH + columns, h, mask=mask)
    h = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h) / WIDTH + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    y = (h * rstd).to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + row * WIDTH + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program differentiates every num_programs-th row and sums its share of dweight."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    partial = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program.to(tl.int64), num_rows, tl.num_programs(0)):
        h = tl.load(h_ptr + row * h_stride + columns, mask=mask, other=0.0)  # [BLOCK]
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0)  # [BLOCK]
        dy = dy.to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normalized = h.to(tl.float32) * rstd
        partial += dy * normalized
        if dx_ptr is not None:
            weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            g = weight * dy
            dx = (g - normalized * (tl.sum(g * normalized) / WIDTH)) * rstd
            if dh_ptr is not None:
                dh = tl.load(dh_ptr + row * dh_stride + columns, mask=mask, other=0.0)
                dx += dh.to(tl.float32)
            tl.store(dx_ptr + row * WIDTH + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        tl.store(partials_ptr + program.to(tl.int64) * WIDTH + columns, partial, mask=mask)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    partials_ptr,
    dweight_ptr,
    num_partials,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds up the partial sums of BLOCK_C columns: first rows that are BLOCK_R apart,
    in order, then the BLOCK_R results as a tree."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in tl.range(0, num_partials, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows[:, None] < num_partials) & (columns[None, :] < WIDTH)
        offsets = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_C]
    dweight = tl.sum(total, axis=0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + columns, dweight, mask=columns < WIDTH)


_launch_forward = launch.launcher(_forward_kernel)
_launch_backward = launch.launcher(_backward_kernel)
_launch_sum_partials = launch.launcher(_sum_partials_kernel)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, save_rstd: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h, rstd); h is x itself without a residual, rstd is None unless saved."""
    width = x.shape[-1]
    x_rows, x_stride = layout.rows_and_stride(x)
    residual_rows, residual_stride = None, 0
    if residual is not None:
        residual_rows, residual_stride = layout.rows_and_stride(residual)
    dtype = x.dtype
    if weight.dtype != dtype:
        dtype = torch.promote_types(dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    h = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if save_rstd else None
    config = configs.row_config(configs.NORM_FORWARD, width)
    with target.device_of(x):
        _launch_forward(
            (x.numel() // width,),
            x_ptr=x_rows,
            residual_ptr=residual_rows,
            weight_ptr=layout.contiguous_features(weight),
            y_ptr=y,
            h_ptr=None if residual is None else h,
            rstd_ptr=rstd,
            x_stride=x_stride,
            residual_stride=residual_stride,
            eps=eps,
            WIDTH=width,
            BLOCK=layout.power_of_2(width),
            num_warps=config.num_warps,
        )
    return y, h, rstd


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight), each None unless needed. dx is the gradient of x and of the residual."""
    width = h.shape[-1]
    h_rows, h_stride = layout.rows_and_stride(h)
    dy_rows, dy_stride = layout.rows_and_stride(dy)
    dh_rows, dh_stride = (None, 0) if dh is None else layout.rows_and_stride(dh)
    num_rows = h.numel() // width
    config = configs.row_config(configs.NORM_BACKWARD, width)
    # Persistent programs serve dweight only, but they cost nothing without it either.
    gpu = target.current()
    num_programs = min(num_rows, config.programs_per_sm * gpu.num_sms)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dx else None
    partials, dweight = None, None
    if need_dweight:
        partials = torch.empty(num_programs, width, dtype=torch.float32, device=h.device)
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    with target.device_of(h):
        _launch_backward(
            (num_programs,),
            dy_ptr=dy_rows,
            dh_ptr=dh_rows,
            h_ptr=h_rows,
            weight_ptr=layout.contiguous_features(weight),
            rstd_ptr=rstd.contiguous(),
            dx_ptr=dx,
            partials_ptr=partials,
            dy_stride=dy_stride,
            dh_stride=dh_stride,
            h_stride=h_stride,
            num_rows=num_rows,
            WIDTH=width,
            BLOCK=layout.power_of_2(width),
            num_warps=min(config.num_warps, gpu.max_warps),
        )
        if need_dweight:
            _launch_sum_partials(
                (layout.cdiv(width, configs.NORM_SUM_COLUMNS),),
                partials_ptr=partials,
                dweight_ptr=dweight,
                num_partials=num_programs,
                WIDTH=width,
                BLOCK_R=configs.NORM_SUM_ROWS,
                BLOCK_C=configs.NORM_SUM_COLUMNS,
                num_warps=configs.NORM_SUM_NUM_WARPS,
            )
    return dx, dweight


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    checks.tensor("x", x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= configs.NORM_MAX_WIDTH:
        raise NotImplementedError(
            f"x: expected a last dimension of 1 to {configs.NORM_MAX_WIDTH}; got {list(x.shape)}"
        )
    checks.tensor("weight", weight, shape=(x.shape[-1],), like=("x", x))


def _add_check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _check(x, weight, eps)
    checks.tensor("residual", residual, shape=x.shape, like=("x", x))
    checks.same_dtype("residual", residual, "x", x)


def _launch(
    x: Tensor, weight: Tensor, eps: float, *, save_rstd: bool = True
) -> tuple[Tensor, Tensor | None]:
    y, _, rstd = _forward(x, None, weight, eps, save_rstd=save_rstd)
    return y, rstd


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    # rstd has the shape of the rows, so that it is sharded like them.
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _add_launch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, save_rstd: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _forward(x, residual, weight, eps, save_rstd=save_rstd)


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake(x, weight, eps)
    return y, x.new_empty(x.shape), rstd


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return (
        h.new_empty(h.shape) if need_dx else None,
        weight.new_empty(weight.shape) if need_dweight else None,
    )


_BACKWARD = library.Op("rms_norm_backward", _backward, _backward_fake)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    # Otherwise autograd would allocate a gradient of zeros for rstd in every backward pass.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: FunctionCtx, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    need_dx, need_dweight, _ = ctx.needs_input_grad
    dx, dweight = _BACKWARD(dy, None, *ctx.saved_tensors, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None


_RMS_NORM = library.Op(
    "rms_norm",
    _launch,
    _fake,
    check=_check,
    setup_context=_setup_context,
    backward=_differentiate,
)


def _add_setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    _, _, weight, _ = inputs
    _, h, rstd = output
    ctx.save_for_backward(h, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_differentiate(
    ctx: FunctionCtx, dy: Tensor | None, dh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    need_x, need_residual, need_dweight, _ = ctx.needs_input_grad
    if dy is None:  # the loss depends on h only, the sum
        dx, dweight, need_dweight = dh, None, False
    else:
        need_dx = need_x or need_residual
        dx, dweight = _BACKWARD(dy, dh, *ctx.saved_tensors, need_dx, need_dweight)
    return (
        dx if need_x else None,
        dx if need_residual else None,
        dweight if need_dweight else None,
        None,
    )


_ADD_RMS_NORM = library.Op(
    "add_rms_norm",
    _add_launch,
    _add_fake,
    check=_add_check,
    setup_context=_add_setup_context,
    backward=_add_differentiate,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = cast(x / sqrt(mean(x²) + eps)) · weight; see `reference.rms_norm`.

    Args:
        x: float32, float16 or bfloat16 `[..., hidden_size]`, hidden_size ≤ 16384, any strides.
        weight: float32, float16 or bfloat16 `[hidden_size]`.
    Returns:
        `[..., hidden_size]`, contiguous, in `promote_types(x.dtype, weight.dtype)`.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: hidden_size above 16384.
        RuntimeError: x is not on a GPU that Triton drives.
    """
    eps = checks.number("eps", eps)
    return _RMS_NORM(x, weight, eps, save_rstd=False)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = rms_norm(h, weight, eps), in one pass; see `reference.add_rms_norm`.

    The backward pass processes the gradients of y and h together.

    Args:
        x, residual: float32, float16 or bfloat16 `[..., hidden_size]`, of one shape and dtype,
            hidden_size ≤ 16384, any strides.
        weight: float32, float16 or bfloat16 `[hidden_size]`.
    Returns:
        (y, h), contiguous; y in `promote_types(x.dtype, weight.dtype)`, h in `x.dtype`.
    Raises:
        As `rms_norm`.
    """
    eps = checks.number("eps", eps)
    return _ADD_RMS_NORM(x, residual, weight, eps, save_rstd=False)[:2]
