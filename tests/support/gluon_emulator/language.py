"""Stand-ins for the modules of Gluon and Triton, by the names that kernels import."""

import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gluon_emulator import memory
from gluon_emulator.numbers import Integer
from gluon_emulator.schedule import Event, Fault, Program, meet

SHARED_BYTES = 232448  # of a program on sm_90
_LAYOUTS = (
    *("NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout", "SliceLayout"),
    *("SwizzledSharedLayout", "BlockedLayout", "DistributedLinearLayout"),
)


# --- gluon: functions and kernels ------------------------------------------------------------


def constexpr(value: Any) -> Any:
    """The value itself, which like Triton's constant also is its attribute `value`."""
    kind = type("constexpr", (type(value),), {"value": value})
    return kind(value)


class Kernel:
    """A function decorated with `gluon.jit`: `f(…)` calls it, `f[grid](…)` launches it."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.arg_names = list(function.__code__.co_varnames[: function.__code__.co_argcount])
        self.pre_run_hooks: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        seeds = self.function.__globals__["__seeds__"]

        def launch(*, num_warps: int, enable_fp_fusion: bool, **given: Any) -> None:
            arguments = {name: _argument(given[name]) for name in self.arg_names}
            order = list(range(grid[0]))
            seeds.shuffle(order)
            for number in order:
                Program.running = Program(seeds.getrandbits(32), number, grid[0], num_warps)
                self.function(**arguments)
                Program.running.run()

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return memory.Pointer(value)
    return Integer(value) if type(value) is int else value


def jit(function: Callable | None = None, **options: Any) -> Any:
    return Kernel if function is None else Kernel(function)


# --- language: what partitions compute -------------------------------------------------------


class Registers(Tensor):
    """A tensor of a partition: PyTorch's, but for the conversion. PyTorch does not compare uint32,
    so those are in 64 bits."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        if dtype == torch.uint32:
            return super().to(torch.int64) & 0xFFFFFFFF
        return self.view(dtype) if bitcast else super().to(dtype)


def _in_registers(make: Callable[..., Tensor]) -> Callable[..., Registers]:
    return lambda *args, **kwargs: make(*args, **kwargs).as_subclass(Registers)


def _scalar_or_tensor(of_scalars: Callable, of_tensors: Callable) -> Callable:
    def function(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
        found = of_scalars(a, b)
        return Integer(found) if type(found) is int else found

    return function


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _load(pointer: memory.Pointer, mask: Any = None, other: float = 0.0) -> Any:
    found = pointer.load(mask, other)
    return found.as_subclass(Registers) if isinstance(found, Tensor) else found


def _inline_asm(text: str, constraints: str, args: Sequence[Any], **options: Any) -> Any:
    """The instructions that change the order of things: named barriers. Others return their
    argument."""
    if found := re.match(r"bar\.(sync|arrive) (\d+), (\d+);", text):
        return meet(int(found[2]), int(found[3]), waits=found[1] == "sync")
    (x,) = args
    return x


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any, value: Any = None) -> Any:
    program = Program.running
    if isinstance(layout, MBarrierLayout):
        program.num_bytes += 8 * shape[0]
        return memory.Barriers(shape[0])
    tile = memory.Tile(torch.full(shape, torch.nan, dtype=dtype), f"tile {program.num_bytes}")
    program.num_bytes += tile.num_bytes
    if program.num_bytes > SHARED_BYTES:
        raise Fault(f"{program.num_bytes} bytes of shared memory")
    return tile


def _warp_specialize(
    functions: Sequence[tuple[Callable, tuple]], num_warps: Sequence[int], registers: Sequence[int]
) -> None:
    program = Program.running
    sizes = (program.whole.num_warps, *num_warps)
    for (function, arguments), size in zip(functions, sizes, strict=True):
        program.spawn(function, arguments, size)


class Layout:
    """A layout, which means nothing here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def get_default_for(cls, *args: Any, **kwargs: Any) -> "Layout":
        return cls()


class MBarrierLayout(Layout):
    pass


# --- Hopper: copies and products -------------------------------------------------------------


class _Product:
    """An asynchronous product of a partition; products of one partition finish in order."""

    def __init__(self, a: Any, b: memory.Tile, accumulator: Any, use_acc: bool) -> None:
        self.a, self.b, self.accumulator, self.use_acc = a, b, accumulator, use_acc
        self.result: Tensor | None = None

    def tiles(self) -> list[memory.Tile]:
        return [x for x in (self.a, self.b) if isinstance(x, memory.Tile)]

    def finish(self) -> None:
        if self.result is not None:
            return
        for tile in self.tiles():
            if "a copy" in memory.uses(tile):
                raise Fault(f"a product reads a tile that has not landed: {tile.key}")
        accumulator = self.accumulator
        if isinstance(accumulator, _Product):
            accumulator.finish()
            accumulator = accumulator.result
        a = self.a.data if isinstance(self.a, memory.Tile) else self.a
        product = a.float() @ self.b.data.float()
        total = product + accumulator if self.use_acc else product
        self.result = total.as_subclass(Registers)
        for tile in self.tiles():
            memory.uses(tile).remove("a product")


def _multiply(
    a: Any, b: memory.Tile, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Any:
    program = Program.running
    program.pause()
    me = program.me()
    if me.num_warps != 4:
        raise Fault(f"a product of {me.num_warps} warps")
    product = _Product(a, b, acc, use_acc)
    for tile in product.tiles():
        memory.must_be_fenced(tile.key, "a product")
        memory.uses(tile).append("a product")
    me.products.append(product)

    def is_next() -> bool:
        pending = [p for p in me.products if p.result is None]
        return product.result is not None or pending[:1] == [product]

    program.events.append(Event("product", product.finish, is_next))
    return product if is_async else _wait_for_products(0, deps=[product])


def _wait_for_products(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    program = Program.running
    program.pause()
    products = program.me().products
    while len(products) > num_outstanding:
        products.pop(0).finish()
    results = []
    for x in deps:
        if isinstance(x, _Product):
            if x in products:
                raise Fault("an accumulator is read while its product runs")
            x = x.result
        results.append(x)
    return results[0] if len(results) == 1 else tuple(results)


def _fence() -> None:
    Program.running.pause()
    Program.running.me().unfenced.clear()


def modules() -> dict[str, types.ModuleType]:
    """The stand-ins by module name."""
    dtypes = ("bfloat16", "float16", "float32", "int32", "int64", "int8", "uint32")
    language = {
        **{name: getattr(torch, name) for name in dtypes},
        "constexpr": constexpr,
        "static_range": range,
        "static_assert": lambda condition, message="": None,
        "program_id": lambda axis: Integer(Program.running.id),
        "num_programs": lambda axis: Integer(Program.running.num_programs),
        "minimum": _scalar_or_tensor(min, torch.minimum),
        "maximum": _scalar_or_tensor(max, torch.maximum),
        "where": _where,
        "arange": _in_registers(
            lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32)
        ),
        "zeros": _in_registers(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype)),
        "full": _in_registers(
            lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype)
        ),
        "expand_dims": lambda x, axis: x.unsqueeze(axis),
        "floor": torch.floor,
        "abs": torch.abs,
        "exp2": torch.exp2,
        "math": types.SimpleNamespace(exp2=torch.exp2),
        "log2": torch.log2,
        "sum": lambda x, axis: x.sum(axis),
        "max": lambda x, axis: x.amax(axis),
        "convert_layout": lambda x, layout: x,
        "store": lambda pointer, value, mask=None: pointer.store(value, mask),
        "load": _load,
        "inline_asm_elementwise": _inline_asm,
        "allocate_shared_memory": _allocate,
        "warp_specialize": _warp_specialize,
        **dict.fromkeys(_LAYOUTS, Layout),
    }
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=MBarrierLayout,
        init=lambda barrier, *, count: barrier.init(count),
        wait=lambda barrier, phase: barrier.wait(phase),
        arrive=lambda barrier, *, count=1: barrier.arrive(count),
        expect=lambda barrier, num_bytes: barrier.expect(num_bytes),
    )
    tma = types.SimpleNamespace(
        async_load=memory.start_load,
        async_store=memory.start_store,
        async_atomic_add=lambda d, start, tile: memory.start_store(d, start, tile, add=True),
        store_wait=memory.wait_for_stores,
    )
    hopper = {
        "mbarrier": mbarrier,
        "tma": tma,
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": _wait_for_products,
        "fence_async_shared": _fence,
    }
    gluon = "triton.experimental.gluon"
    found = {
        "triton": {"jit": jit},
        "triton.language": language,
        "triton.experimental": {},
        gluon: {"jit": jit, "constexpr_function": lambda function: function},
        f"{gluon}.language": language,
        f"{gluon}.language.nvidia": {},
        f"{gluon}.language.nvidia.hopper": hopper,
        f"{gluon}.nvidia": {},
        f"{gluon}.nvidia.hopper": {"TensorDescriptor": memory.Descriptor},
    }
    made = {}
    for name, attributes in found.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(attributes)
        parent, _, child = name.rpartition(".")
        if parent in made:
            setattr(made[parent], child, made[name])
    return made
