"""Runs the kernels without a GPU, in Triton's CPU interpreter with corrections and speed-ups.

The interpreter (every version up to 3.9) stores bfloat16 as uint16. It multiplies those integers
where a kernel multiplies bfloat16, in `tl.dot` too, and truncates where a GPU rounds to nearest
even. It converts the NaN of float8_e4m3fn to a number, and cannot convert float8_e4m3fn to
bfloat16. It adds the accumulator to a float32 product at the end, whereas a GPU begins with it and
rounds every sum. `enable` replaces these operations, so that results have the bits of PyTorch or of
a GPU, and removes needless work from every operation. The interpreter is for checking kernels, not
for measuring speed.
"""

import os
import sys
import threading
from typing import Any


def enable(*, check_overflow: bool = False) -> None:
    """Switches the interpreter on for this process; further calls are no-ops.

    Args:
        check_overflow: from now on, an int32 sum, difference or product that overflows, as an
            offset in a large tensor may, raises an AssertionError, in every kernel of the process,
            also in masked lanes.
    Raises:
        RuntimeError: Triton was imported before without the interpreter, which fixes the mode of
            every kernel already defined.
    """
    if "triton" in sys.modules and not is_enabled():
        raise RuntimeError(
            "interpreter: expected enable() to come before the first import of triton; "
            "set TRITON_INTERPRET=1 in the environment instead"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter as triton_interpreter

    if not hasattr(triton_interpreter.InterpreterBuilder, "_bfloat16_repaired"):
        _repair(triton_interpreter)
        _speed_up(triton_interpreter)
        triton_interpreter.InterpreterBuilder._bfloat16_repaired = True
    if check_overflow:
        semantic = triton_interpreter.interpreter_semantic
        semantic.binary_op_sanitize_overflow_impl = _check_overflow


def is_enabled() -> bool:
    """Whether kernels of this process run in the interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _repair(module: Any) -> None:
    import numpy as np
    import torch
    import triton.language as tl

    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    float8_values = codes.view(torch.float8_e4m3fn).float().numpy()  # by code

    builder, handle_type = module.InterpreterBuilder, module.TensorHandle

    def is_bfloat16(handle: Any) -> bool:
        return handle.dtype.scalar.name == "bf16"

    def widen(handle: Any) -> Any:
        """Converts to float32 where that is exact; bfloat16 is its upper half."""
        if handle.dtype.scalar == tl.float8e4nv:
            return handle_type(float8_values[handle.data], tl.float32)
        if not is_bfloat16(handle):
            return handle
        bits = np.asarray(handle.data, dtype=np.uint32) << 16
        return handle_type(bits.view(np.float32), tl.float32)

    def narrow(data: Any) -> Any:
        """Rounds float32 to bfloat16, to nearest even; every NaN becomes the quiet NaN."""
        data = np.ascontiguousarray(data, dtype=np.float32).reshape(np.shape(data))
        bits = data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
        return handle_type(rounded, tl.bfloat16)

    original_cast = builder.cast_impl
    original_fp_to_fp = builder.create_fp_to_fp
    original_dot = builder.create_dot

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        wide = widen(src)
        if dst_type.scalar == tl.bfloat16:
            return narrow(wide.data)
        return original_cast(self, wide, dst_type)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        narrow_source = src.dtype.scalar in (tl.bfloat16, tl.float8e4nv)
        if narrow_source or dst_type.scalar == tl.bfloat16:
            return cast(self, src, dst_type)
        return original_fp_to_fp(self, src, dst_type, rounding_mode)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.float32 and b.dtype.scalar == tl.float32:
            return handle_type(multiply_add(a.data, b.data, d.data), d.dtype.scalar)
        return original_dot(self, widen(a), widen(b), d, *rest)

    def multiply_add(a: Any, b: Any, total: Any) -> Any:
        """Adds float32 products one by one to the accumulator, each with one rounding, as a GPU
        does."""
        columns = np.moveaxis(a, -1, 0).astype(np.float64)[..., None]
        rows = np.moveaxis(b, -2, 0).astype(np.float64)[..., None, :]
        total = np.array(total, dtype=np.float32)
        exact = np.empty(total.shape, dtype=np.float64)
        for column, row in zip(columns, rows, strict=True):
            np.multiply(column, row, out=exact)
            np.add(exact, total, out=exact)
            np.copyto(total, exact, casting="same_kind")
        return total

    def through_float32(original: Any) -> Any:
        """Wraps an operation so that on bfloat16 it computes in float32 and rounds once."""

        def operation(self: Any, *operands: Any) -> Any:
            for x in operands:
                if isinstance(x, handle_type) and is_bfloat16(x):
                    break
            else:
                return original(self, *operands)
            wide = [widen(x) if isinstance(x, handle_type) else x for x in operands]
            result = original(self, *wide)
            return narrow(result.data) if result.data.dtype == np.float32 else result

        return operation

    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = dot
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_fabs"):
        setattr(builder, name, through_float32(getattr(builder, name)))

    original_patch = module._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        """Converts loop bounds, arrays of one element that NumPy 2.4 does not convert to int."""
        original_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())

    module._patch_lang_tensor = patch_tensor


def _speed_up(module: Any) -> None:
    """Removes work that the interpreter needlessly repeats; results do not change."""
    original_dtype = module._get_np_dtype
    dtypes: dict[str, Any] = {}  # NumPy's, by Triton's names

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = original_dtype(dtype)
        return dtypes[name]

    module._get_np_dtype = get_np_dtype

    original_launch, original_call = (
        module.GridExecutor.__call__,
        module.InterpretedFunction.__call__,
    )
    original_patch = module._patch_lang
    launching = threading.RLock()  # a launch patches globals and keeps its grid position in one
    patched: list[set[int]] = []  # for each running launch: modules whose globals are patched

    blocks = _compute_once_per_type(module)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with launching:
            patched.append(set())
            try:
                return original_launch(self, *args, **kwargs)
            finally:
                patched.pop()
                if not patched:
                    blocks.clear()  # a launch has pointer types of its own

    def patch_lang(function: Any) -> Any:
        if patched:
            patched[-1].add(id(function.__globals__))
        return original_patch(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Patches the language once per module and launch, not at every call of a function."""
        if not patched or id(self.fn.__globals__) not in patched[-1]:
            return original_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise module.InterpreterError(repr(error)) from error

    module._patch_lang = patch_lang
    module.GridExecutor.__call__ = launch
    module.InterpretedFunction.__call__ = call
    # Triton spends ten operations on checking for int32 overflow and does not use the result.
    module.interpreter_semantic.binary_op_sanitize_overflow_impl = lambda *_: None


def _compute_once_per_type(module: Any) -> dict[Any, dict[str, Any]]:
    """Keeps what Triton computes anew for every tensor although it follows from the tensor's type:
    shapes, as tuples of typed constants, and the names of types. Skips conversions and broadcasts
    to the type that a tensor has.

    Returns:
        The attributes of the block types seen, by element type and shape.
    """
    core, semantic = module.tl.core, module.interpreter_semantic
    original_block, original_tensor = core.block_type.__init__, core.tensor.__init__
    original_broadcast, original_cast = semantic.broadcast_impl_value, semantic.cast
    blocks: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(x.value if isinstance(x, core.constexpr) else x for x in shape)
        key = (id(element_ty), sizes)  # unique: what is kept holds the element type
        if key in blocks:
            self.__dict__.update(blocks[key])
        else:
            original_block(self, element_ty, shape)
            blocks[key] = self.__dict__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_of_tensors")
        if known is None:
            original_tensor(self, handle, type)
            known = {name: x for name, x in self.__dict__.items() if name != "handle"}
            type._of_tensors = known
        else:
            self.__dict__.update(known)
            self.handle = handle

    def broadcast(lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and list(left.shape) == list(right.shape):
            return lhs, rhs
        return original_broadcast(lhs, rhs)

    def cast(input: Any, dst_ty: Any, *rest: Any) -> Any:
        return input if input.dtype is dst_ty else original_cast(input, dst_ty, *rest)

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    semantic.broadcast_impl_value = broadcast
    semantic.cast = cast
    return blocks


def _check_overflow(a: Any, b: Any, operation: Any) -> None:
    import numpy as np

    if a.type.scalar.name == "int32":
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](
            a.handle.data, b.handle.data, dtype=np.int64
        )
        fits = (exact >= -(2**31)) & (exact < 2**31)
        assert fits.all(), f"int32 overflow detected for operation {operation.__name__}"
