"""The backward kernels for Hopper on random calls: in emulators without a GPU, or on one.

    python -m hopper_backward --cases 500              as they are written, by gluon_emulator
    python -m hopper_backward --faults                 one synchronisation less at a time
    python -m hopper_backward --ptx --cases 10         as they are compiled, by ptx_emulator
    python -m hopper_backward --ptx --faults           a line of the PTX changed at a time
    timeout 300 python -m hopper_backward --gpu --cases 200        on a GPU, if this machine has one

Every gradient is held to its error budget. `tests/ops/test_hopper_backward.py` runs a sample.
"""

import functools
import importlib
import itertools
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import random_calls
import torch
from gluon_emulator import load
from hopper_forward import SHARED_BYTES, Fault, faults, unchanged
from poison import PoisonedTorch
from torch import Tensor

from gqa_kernels import accuracy, reference
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.runtime.hopper_configs import HopperBackwardConfig

_FOLDER = "gqa_kernels.ops.attention.hopper"
_SHARED = tuple(f"{_FOLDER}.{name}" for name in ("pipeline", "tiles", "softmax", "keys"))
KERNELS = tuple(f"{_FOLDER}.{name}" for name in ("dkdv", "dq", "fused"))
GLUON = (*_SHARED, *KERNELS)
LOADED = tuple((*_SHARED, kernel) for kernel in KERNELS)  # what `load` takes


class Case(NamedTuple):
    """A call, and the configuration that it runs with."""

    config: HopperBackwardConfig
    batch: int = 1
    num_q_heads: int = 2
    num_kv_heads: int = 1
    seq_len_q: int = 200
    seq_len_kv: int = 200
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    mean: float = 0.0  # of keys and values
    far: bool = False  # whether all scores are far below 0, where a key of zeros would count most
    fused: bool = False  # whether by the kernel that computes all gradients

    @property
    def kernels(self) -> tuple[str, ...]:
        return KERNELS[2:] if self.fused else KERNELS[:2]


def shared_bytes(config: HopperBackwardConfig, fused: bool = False) -> int:
    exchange = config.block * (2 * 128 + 4 * config.head_dim) if fused else 0
    return 2 * config.head_dim * (256 + 2 * config.num_stages * config.block) + exchange + 2048


def draw_case(numbers: random.Random) -> Case:
    """Small lengths around the borders of tiles."""
    choice = numbers.choice
    kv_heads = choice((1, 2))
    fused = numbers.random() < 0.4
    forms = [
        HopperBackwardConfig(head_dim, block, stages)
        for head_dim, block, stages in itertools.product(
            (64, 64, 128), (64,) if fused else (64, 64, 128), (2, 3)
        )
    ]
    return Case(
        config=choice([form for form in forms if shared_bytes(form, fused) <= SHARED_BYTES]),
        batch=choice((1, 1, 2)),
        num_q_heads=kv_heads * choice((1, 2, 3)),
        num_kv_heads=kv_heads,
        seq_len_q=choice((1, 63, 64, 65, 128, 129, 200, 257, 300)),
        seq_len_kv=choice((1, 63, 64, 127, 128, 129, 255, 256, 300, 385)),
        dtype=choice((torch.bfloat16, torch.float16)),
        causal=numbers.random() < 0.7,
        mean=choice((0.0, 0.0, 3.0)),
        far=numbers.random() < 0.1,
        fused=fused,
    )


def inputs_of(case: Case, seed: int) -> dict[str, Tensor]:
    """q is a view of every head but one; k and v are views with the heads before the rows."""
    generator = torch.Generator().manual_seed(seed)
    _, batch, num_q_heads, num_kv_heads, seq_len_q, seq_len_kv, dtype, *_ = case

    def draw(mean: float, *shape: int) -> Tensor:
        x = torch.randn(*shape, case.config.head_dim, generator=generator) + mean
        return x.to(dtype)

    q = draw(-4.0 if case.far else 0.0, batch, seq_len_q, num_q_heads + 1)[:, :, :num_q_heads]
    k, v = (
        draw(mean, batch, num_kv_heads, seq_len_kv).transpose(1, 2)
        for mean in (4.0 if case.far else case.mean, case.mean)
    )
    return {"q": q, "k": k, "v": v}


Change = Callable[[str, str], str]


def as_written(case: Case, seed: int, change: Change = unchanged) -> Callable[..., Any]:
    """`flash_attention` whose gradients come from the kernels in the emulator of Gluon."""
    return _attend([load((*_SHARED, name), seed, change) for name in case.kernels], case)


def on_gpu(case: Case, seed: int) -> Callable[..., Any]:
    """The same by the kernels on this machine's GPU, twice, with the same bits."""
    modules, case = _as_installed(case)
    return _attend(modules, case, lambda run: _same_bits([run(), run()], case))


def as_compiled(
    case: Case, seed: int, change: Callable[[str, str], str] | None = None
) -> Callable[..., Any]:
    """The same by the kernels' PTX, which must give the same bits under two schedules."""
    from ptx_emulator.driver import emulating

    def run_twice(run: Callable[[], Any]) -> Any:
        results = []
        for schedule in ("lockstep", "random"):
            options = {"schedule": schedule, "seed": seed, "mbarrier_fence": True}
            with emulating("sm_90", mutate=change, **options):
                results.append(run())
        return _same_bits(results, case)

    modules, case = _as_installed(case)
    return _attend(modules, case, run_twice)


def _as_installed(case: Case) -> tuple[list[types.ModuleType], Case]:
    """The modules for a case; with a Triton before 3.8, which cannot compile `fused`, the other
    ones."""
    from gqa_kernels.ops.attention.hopper.pipeline import start_add

    case = case._replace(fused=case.fused and start_add is not None)
    return [importlib.import_module(name) for name in case.kernels], case


def _same_bits(results: list[tuple[Tensor, ...]], case: Case) -> tuple[Tensor, ...]:
    """One of the results, which have the same bits, but for dq where it is summed in any order."""
    for one, other in list(zip(*results, strict=True))[case.fused :]:
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), "other bits"
    return results[0]


def _attend(
    modules: Sequence[types.ModuleType],
    case: Case,
    run: Callable[[Callable[[], Any]], Any] = lambda kernels: kernels(),
) -> Callable[..., Any]:
    """`flash_attention` whose gradients come from these modules' launchers, with NaN in what they
    allocate. Its outputs, and the statistics that the kernels take, are exact ones, rounded."""
    for module in modules:
        module.torch = PoisonedTorch()

    def gradients(*given: Any) -> tuple[Tensor, ...]:
        if case.fused:
            return modules[0].gradients(*given)
        dkdv, dq = modules
        return dq.query_gradient(*given), *dkdv.key_value_gradients(*given)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            ctx.call = prepared(Call(q, k, v, *[None] * 8, 0 if case.causal else None, None))
            ctx.out, ctx.lse = reference.flash_attention(
                q.double(), k.double(), v.double(), causal=case.causal, return_lse=True
            )
            return ctx.out.to(q.dtype), ctx.lse.float()

        @staticmethod
        def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
            delta = (ctx.out * dout.double()).sum(-1).transpose(1, 2) - dlse
            lse = ctx.lse / ctx.call.score_unit
            # The heads of dout lie beside those of another tensor.
            dout = torch.cat([dout, dout], 2)[:, :, : dout.shape[2]]
            given = (ctx.call, dout, *(x.float().contiguous() for x in (lse, delta)), case.config)
            return run(lambda: gradients(*given))

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, return_lse: bool) -> Any:
        return Attention.apply(q, k, v)

    return attend


def measure(
    case: Case, seed: int, attend: Callable[..., Any], device: str = "cpu"
) -> list[accuracy.Measured]:
    """The results and gradients of a call with their errors and error budgets."""
    tensors = {name: x.to(device) for name, x in inputs_of(case, seed).items()}
    inputs = tensors | {"causal": case.causal, "return_lse": True}
    return accuracy.measure_call(attend, reference.flash_attention, inputs, ("q", "k", "v"))


complaints = functools.partial(random_calls.complaints, measure)


# What another synchronisation implies. Before the copy warp fills these stages again, it fills one
# that is released after a later product of the same consumer. The other consumer has waited for its
# keys before this one multiplies them.
IMPLIED = (
    "dv, _ = warpgroup_mma_wait(1, deps=[dv_soon, rounded]) / release(shared.d_out, n + i)",
    "dv, _ = warpgroup_mma_wait(3, deps=[dv_soon, rounded]) / release(shared.d_out, n + i)",
    "landed(shared.k, 1 - CONSUMER)",
    "d_weights = warpgroup_mma_wait(0, deps=[d_weights_soon]) / release(shared.v, i)",
)


def all_faults() -> list[Fault]:
    found = faults(GLUON, IMPLIED)
    return [fault for fault in found if fault.text not in IMPLIED]


def _shapes() -> Iterator[Case]:
    """Calls in which every synchronisation matters: several rounds of every ring."""
    narrow = HopperBackwardConfig(64, 64, 2)
    for _ in range(8):
        for fused, causal in itertools.product((False, True), (True, False)):
            yield Case(narrow, seq_len_q=320, seq_len_kv=320, causal=causal, fused=fused)


how_noticed = functools.partial(random_calls.how_noticed, complaints, as_written, _shapes)


def _ptx_families() -> Iterator[tuple[Case, ...]]:
    """Calls of the same PTX."""
    yield (Case(HopperBackwardConfig(64, 64, 2), 1, 1, 1, 264, 264),)


# What another synchronisation implies, in the PTX of Triton 3.7, kernel and family, kind, and which
# of its lines.
PTX_IMPLIED = tuple(
    f"{kernel} 0: {kind} {line}"
    for kernel, kinds, lines in (
        # The copy warp waits for two stages each that it fills once: they are free. In the loop,
        # the consumers release the second stage of a step before the first one: values before
        # keys, dO before queries.
        ("_dq_kernel", ("no wait for an mbarrier",), (12, 13, 14, 15, 17)),
        ("_dkdv_kernel", ("no wait for an mbarrier",), (10, 11, 12, 13, 15)),
        # dO is released once dv is computed; the queries of the step, which the copy warp waits for
        # before it brings the next dO, later, once dk is computed.
        ("_dkdv_kernel", ("no wait for products", "a wait for one product less"), (1, 5)),
    )
    for kind in kinds
    for line in lines
)


def main() -> None:
    description = __doc__.partition("\n")[0]
    runs = {"written": as_written, "ptx": as_compiled, "gpu": on_gpu}
    random_calls.command(
        description,
        draw_case,
        runs,
        complaints,
        all_faults,
        how_noticed,
        _ptx_families(),
        PTX_IMPLIED,
    )


if __name__ == "__main__":
    main()
