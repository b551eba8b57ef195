"""AdamW: one step of a weight, which can also write a copy of it in another dtype.

With g = gradient / grad_scale, in float32, at step t:

    m      = β1 · m + (1 − β1) · g
    v      = β2 · v + (1 − β2) · g²
    weight = (1 − lr · weight_decay) · weight − lr / (1 − β1^t) · m / (sqrt(v / (1 − β2^t)) + eps)
    copy   = weight, rounded

Loshchilov and Hutter 2019, arXiv:1711.05101. One program updates a block of one row; a
contiguous weight is treated as a single row. `grad_scale` clips gradients without a separate pass.
A 16-bit model with float32 master weights needs no conversions: the kernel reads its 16-bit
gradients and writes its weights as `copy`.
"""

import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.runtime import checks, configs, launch, layout, library, target

_LARGEST = 3.4028234663852886e38  # float32's


@triton.jit(do_not_specialize=["blocks_per_row"])
def _step_kernel(
    weight_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    grad_scale_ptr,
    weight_stride,
    gradient_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
    copy_stride,
    width,
    blocks_per_row,
    kept,
    first_share,
    second_kept,
    second_share,
    step_size,
    second_correction,
    eps,
    BLOCK: tl.constexpr,
):
    """One program updates BLOCK numbers of one row."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    columns = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gradient = tl.load(gradient_ptr + row * gradient_stride + columns, mask=mask, other=0.0)
    gradient = gradient.to(tl.float32)  # [BLOCK]
    if grad_scale_ptr is not None:
        gradient = gradient / tl.load(grad_scale_ptr)
    weight_ptr += row * weight_stride + columns
    exp_avg_ptr += row * exp_avg_stride + columns
    exp_avg_sq_ptr += row * exp_avg_sq_stride + columns
    exp_avg = tl.load(exp_avg_ptr, mask=mask, other=0.0)
    exp_avg += first_share * (gradient - exp_avg)
    tl.store(exp_avg_ptr, exp_avg, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr, mask=mask, other=0.0)
    exp_avg_sq = second_kept * exp_avg_sq + second_share * gradient * gradient
    tl.store(exp_avg_sq_ptr, exp_avg_sq, mask=mask)
    # Root before division: v / (1 − β2^t) may overflow where the quotient of the roots does not.
    denominator = tl.sqrt(exp_avg_sq) / second_correction + eps
    weight = tl.load(weight_ptr, mask=mask, other=0.0)
    weight = kept * weight - step_size * exp_avg / denominator
    tl.store(weight_ptr, weight, mask=mask)
    if copy_ptr is not None:
        copy = weight.to(copy_ptr.dtype.element_ty)
        tl.store(copy_ptr + row * copy_stride + columns, copy, mask=mask)


_launch_step = launch.launcher(_step_kernel)


def _rows(x: Tensor, together: bool) -> Tensor:
    """x as `[num_rows, width]`, a view: one row where all tensors are contiguous."""
    return x.view(1, -1) if together else x.view(-1, x.shape[-1])


def _launch(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    grad_scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if weight.numel() == 0:
        return
    written = [x for x in (weight, exp_avg, exp_avg_sq, copy) if x is not None]
    together = all(x.is_contiguous() for x in written)
    if together or gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    weight_rows, gradient_rows = _rows(weight, together), _rows(gradient, together)
    first_rows, second_rows = _rows(exp_avg, together), _rows(exp_avg_sq, together)
    copy_rows = None if copy is None else _rows(copy, together)
    num_rows, width = weight_rows.shape
    blocks_per_row = layout.cdiv(width, configs.ADAMW_BLOCK)
    with target.device_of(weight):
        _launch_step(
            (num_rows * blocks_per_row,),
            weight_ptr=weight_rows,
            gradient_ptr=gradient_rows,
            exp_avg_ptr=first_rows,
            exp_avg_sq_ptr=second_rows,
            copy_ptr=copy_rows,
            grad_scale_ptr=grad_scale,
            weight_stride=weight_rows.stride(0),
            gradient_stride=gradient_rows.stride(0),
            exp_avg_stride=first_rows.stride(0),
            exp_avg_sq_stride=second_rows.stride(0),
            copy_stride=0 if copy is None else copy_rows.stride(0),
            width=width,
            blocks_per_row=blocks_per_row,
            kept=1.0 - lr * weight_decay,
            first_share=1.0 - beta1,
            second_kept=beta2,
            second_share=1.0 - beta2,
            step_size=lr / (1.0 - beta1**step),
            second_correction=(1.0 - beta2**step) ** 0.5,
            eps=eps,
            BLOCK=configs.ADAMW_BLOCK,
            num_warps=configs.ADAMW_NUM_WARPS,
        )


def _check(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    grad_scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    float32 = (checks.FLOATS[0],)
    checks.tensor("weight", weight, dtypes=float32)
    if weight.dim() == 0:
        raise ValueError("weight: expected a dimension or more; got none")
    shape, like = weight.shape, ("weight", weight)
    checks.tensor("gradient", gradient, shape=shape, like=like)
    checks.tensor("exp_avg", exp_avg, dtypes=float32, shape=shape, like=like)
    checks.tensor("exp_avg_sq", exp_avg_sq, dtypes=float32, shape=shape, like=like)
    if copy is not None:
        checks.tensor("copy", copy, shape=shape, like=like)
    if grad_scale is not None:
        checks.tensor("grad_scale", grad_scale, dtypes=float32, shape=(), like=like)
    named = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copy": copy}
    for name, x in named.items():
        if x is not None and not _is_written_in_rows(x):
            raise ValueError(
                f"{name}: expected contiguous rows a fixed distance apart, without overlap; "
                f"got strides {x.stride()} of {list(x.shape)}"
            )
    if step < 1:
        raise ValueError(f"step: expected 1 or more; got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: expected a number from 0 to less than 1; got {beta}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value <= _LARGEST:
            raise ValueError(f"{name}: expected a finite float32 of 0 or more; got {value}")


def _is_written_in_rows(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    return x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _fake(*_: object) -> None:
    return None


_ADAMW_UPDATE = library.Op(
    "adamw_update",
    _launch,
    _fake,
    check=_check,
    mutates=("weight", "exp_avg", "exp_avg_sq", "copy"),
    refuse=library.refuse_gradient("update", "weight"),
)


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None = None,
    grad_scale: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """A step of AdamW, in place; see `reference.adamw_update`.

    Args:
        weight, exp_avg, exp_avg_sq: float32, of one shape, contiguous or `[rows, width]` with
            contiguous rows. Written.
        gradient: float32, float16 or bfloat16, of that shape, any strides.
        copy: float32, float16 or bfloat16, of that shape, laid out as `weight` may be. Written.
        grad_scale: float32 scalar on the device.
        step: counted from 1.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape, layout, range or device.
        NotImplementedError: an argument requires a gradient while autograd records.
        RuntimeError: weight is not on a GPU that Triton drives.
    """
    step = checks.whole("step", step)
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    numbers = [checks.number(name, value) for name, value in numbers.items()]
    return _ADAMW_UPDATE(weight, gradient, exp_avg, exp_avg_sq, copy, grad_scale, step, *numbers)
