"""The forward kernel for Hopper on random calls: in emulators without a GPU, or on one.

    python -m hopper_forward --cases 1000              as it is written, by gluon_emulator
    python -m hopper_forward --faults                  one synchronisation less at a time
    python -m hopper_forward --ptx --cases 30          as it is compiled, by ptx_emulator
    python -m hopper_forward --ptx --faults            a line of the PTX changed at a time
    timeout 300 python -m hopper_forward --gpu --cases 300         on a GPU, if this machine has one

Every call is held to its error budget. `tests/ops/test_hopper_forward.py` runs a sample.
"""

import functools
import importlib.util
import itertools
import random
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hopper_residue
import random_calls
import torch
from gluon_emulator import load
from poison import PoisonedTorch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gqa_kernels import accuracy, reference
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.runtime.hopper_configs import HopperConfig

_FOLDER = "gqa_kernels.ops.attention.hopper"
_NAMES = (
    *("pipeline", "products", "tiles", "softmax", "options", "blocks", "consumer", "forward"),
)
GLUON = tuple(f"{_FOLDER}.{name}" for name in _NAMES)
_PRIMITIVES = tuple(f"gqa_kernels.primitives.{name}" for name in ("packed", "residue", "soft_cap"))
MODULES = (*_PRIMITIVES, *GLUON)
SHARED_BYTES = 232448


class Case(NamedTuple):
    """A call, the configuration and the number of programs that it runs with."""

    config: HopperConfig
    batch: int = 1
    num_q_heads: int = 2
    num_kv_heads: int = 1
    seq_len_q: int = 200
    seq_len_kv: int = 200
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    return_lse: bool = True
    need_residue: bool = False
    num_programs: int = 2
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of packed queries and keys
    section: int | None = None  # heads; None: all, as the launcher chooses for keys so short


def shared_bytes(config: HopperConfig) -> int:
    rows = 64 * config.num_consumers * (2 if config.own_out else 1)
    return 2 * config.head_dim * (rows + 2 * config.num_stages * config.block_n) + 256


def draw_case(numbers: random.Random) -> Case:
    """Small lengths around the borders of tiles, every form of the configuration that fits."""
    choice = numbers.choice
    head_dim, consumers = choice(
        ((64, 2), (64, 3), (80, 2), (80, 3), (96, 2), (96, 3), (128, 2), (128, 3), (256, 2))
    )
    registers = {2: (240, 24), 3: (160, 32)}[consumers]
    forms = [
        HopperConfig(head_dim, consumers, block_n, stages, own_out, *registers, turns=turns)
        for block_n in (64, 128)
        for stages in (2, 3, 4)
        for own_out in (True, False)
        for turns in (True, True, False)
    ]
    kv_heads = choice((1, 2))
    window = None
    if numbers.random() < 0.4:
        window = choice((None, 0, 1, 63, 64, 100, 128, 250)), choice((None, None, 0, 5, 64, 130))
    bounds = _draw_bounds(numbers) if numbers.random() < 0.3 else None
    case = Case(
        config=choice([form for form in forms if shared_bytes(form) <= SHARED_BYTES]),
        batch=choice((1, 1, 2)),
        num_q_heads=kv_heads * choice((1, 2, 3)),
        num_kv_heads=kv_heads,
        seq_len_q=choice((1, 63, 64, 65, 128, 129, 200, 257, 300, 385)),
        seq_len_kv=choice((1, 63, 64, 127, 128, 129, 255, 256, 300, 513, 640)),
        dtype=choice((torch.bfloat16, torch.float16)),
        causal=numbers.random() < 0.7,
        return_lse=numbers.random() < 0.8,
        need_residue=numbers.random() < 0.5,
        num_programs=choice((1, 2, 3, 5, 132)),
        window=window,
        softcap=choice((None, None, 0.5, 4.0)),
        bounds=bounds,
        section=choice((None, 1, 2, 3)),
    )
    if bounds:  # and a few rows after the last sequence
        rows, keys = (of[-1] + choice((1, 70)) for of in bounds)
        case = case._replace(batch=1, seq_len_q=rows, seq_len_kv=keys)
    return case


def _draw_bounds(numbers: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count = numbers.choice((1, 2, 3, 5))
    lengths_q = numbers.choices((0, 1, 30, 64, 65, 128, 200), k=count)
    lengths_kv = numbers.choices((0, 1, 63, 64, 65, 129, 200, 256), k=count)
    return tuple(itertools.accumulate(lengths_q, initial=0)), tuple(
        itertools.accumulate(lengths_kv, initial=0)
    )


def inputs_of(case: Case, seed: int) -> dict[str, Tensor]:
    """q is a view of every head but one; k and v are views with the heads before the rows. Where
    the residue is checked, values have a mean, so that the sum of rounded weights matters. Packed
    rows that no other row may see are NaN."""
    generator = torch.Generator().manual_seed(seed)
    _, batch, num_q_heads, num_kv_heads, seq_len_q, seq_len_kv, dtype, *_ = case

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, case.config.head_dim, generator=generator).to(dtype)

    q = draw(batch, seq_len_q, num_q_heads + 1)[:, :, :num_q_heads]
    k, v = (draw(batch, num_kv_heads, seq_len_kv).transpose(1, 2) for _ in range(2))
    v = v + 4 if case.need_residue else v
    if case.bounds is None:
        return {"q": q, "k": k, "v": v}
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    bounds = {"cu_seqlens_q": case.bounds[0], "cu_seqlens_kv": case.bounds[1]}
    for rows, keys in _sequences(case.bounds, q.shape[0], k.shape[0]):
        if not len(keys):
            q[rows.start : rows.stop] = torch.nan
        if not len(rows) or keys.start == case.bounds[1][-1]:
            k[keys.start : keys.stop] = v[keys.start : keys.stop] = torch.nan
    return {"q": q, "k": k, "v": v} | {name: torch.tensor(x) for name, x in bounds.items()}


def _parts(call: Call, case: Case) -> Iterator[tuple[range, range]]:
    """(queries, keys) of each sequence of a batched call."""
    total_q, total_kv = call.q.shape[1], call.k.shape[1]
    if case.bounds is None:
        return iter([(range(total_q), range(total_kv))])
    return _sequences(case.bounds, total_q, total_kv)


def _sequences(bounds: Any, total_q: int, total_kv: int) -> Iterator[tuple[range, range]]:
    """(queries, keys) of packed sequences; then the queries and the keys after the last one."""
    for i in range(len(bounds[0]) - 1):
        yield tuple(range(of[i], of[i + 1]) for of in bounds)
    yield range(bounds[0][-1], total_q), range(total_kv, total_kv)
    yield range(total_q, total_q), range(bounds[1][-1], total_kv)


Attend = Callable[..., Tensor | tuple[Tensor, Tensor]]


def unchanged(name: str, text: str) -> str:
    return text


def as_written(case: Case, seed: int, change: Callable[[str, str], str] = unchanged) -> Attend:
    """`flash_attention` by the kernel in the emulator of Gluon."""
    return _attend(load(MODULES, seed, change), case)


def on_gpu(case: Case, seed: int) -> Attend:
    """`flash_attention` by the kernel on this machine's GPU, twice, with the same bits."""
    from gqa_kernels.ops.attention.hopper import forward

    run = _attend(forward, case)

    def attend(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        first, second = run(*args, **kwargs), run(*args, **kwargs)
        for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "other bits"
        return first

    return attend


def as_compiled(case: Case, seed: int, change: Callable[[str, str], str] | None = None) -> Attend:
    """`flash_attention` by the kernel's PTX, which must give the same bits under two schedules."""
    from ptx_emulator.driver import emulating

    from gqa_kernels.ops.attention.hopper import forward

    run = _attend(forward, case)

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        results = []
        for schedule in ("lockstep", "random"):
            options = {"schedule": schedule, "seed": seed, "mbarrier_fence": True}
            with emulating("sm_90", mutate=change, **options):
                found = run(*args, **kwargs)
            results.append(found if isinstance(found, tuple) else (found,))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "other bits"
        return results[0]

    return attend


def _attend(module: types.ModuleType, case: Case) -> Attend:
    """`flash_attention` by a module's launcher, with NaN in what it allocates."""
    module.torch = PoisonedTorch()

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        return_lse: bool,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
    ) -> Any:
        left, right = window or (None, None)
        right = 0 if causal else right
        bounds = cu_seqlens_q, cu_seqlens_kv
        call = prepared(Call(q, k, v, *bounds, *[None] * 5, left, right, softcap))
        chosen = module.query_heads_in_cache
        section = case.section or case.batch * case.num_q_heads
        module.query_heads_in_cache = lambda *_: section
        try:
            out, lse, residue = module.launch_forward(
                call,
                case.config,
                case.num_programs,
                need_lse=return_lse,
                need_residue=case.need_residue,
            )
        finally:
            module.query_heads_in_cache = chosen
        if case.need_residue:
            hopper_residue.check(call, case.config.block_n, _parts(call, case), out, residue)
        if call.packed:
            out, lse = (None if x is None else x.squeeze(0) for x in (out, lse))
        return (out, lse * call.score_unit) if return_lse else out

    return attend


def measure(case: Case, seed: int, attend: Attend, device: str = "cpu") -> list[accuracy.Measured]:
    """The results of a call with their errors and error budgets."""
    tensors = {name: x.to(device) for name, x in inputs_of(case, seed).items()}
    options = ("causal", "return_lse", "window", "softcap")
    inputs = tensors | {name: getattr(case, name) for name in options}
    oracle = reference.flash_attention if case.bounds is None else reference.flash_attention_varlen
    return accuracy.measure_call(attend, oracle, inputs, ())


complaints = functools.partial(random_calls.complaints, measure)


# --- Faults ----------------------------------------------------------------------------------

_DROPPED = re.compile(
    r"^ +(release|await_turn|pass_turn|mbarrier\.(?:wait|arrive|expect)|tma\.store_wait"
    r"|fence_async_shared)\(.*\)(?:  #.*)?$"
)
_LANDED = re.compile(r"landed\(([\w.]+), (.*)\)((?:\[0\])?)$")
_PRODUCTS = re.compile(r"warpgroup_mma_wait\((\w+)")

# What another synchronisation implies. Before the copy warp fills this stage of keys again, it
# fills a stage of values that is released later than these products end.
IMPLIED = ("scores = warpgroup_mma_wait(NUM_PARTS, deps=[scores_soon]) / release(shared.k, n + i)",)


class Fault(NamedTuple):
    """Lines of a module, the first of them counted from 1, and what stands there instead."""

    module: str
    number: int
    lines: tuple[str, ...]
    instead: tuple[str, ...]

    def apply(self, name: str, text: str) -> str:
        if name != self.module:
            return text
        lines, end = text.split("\n"), self.number - 1 + len(self.lines)
        assert tuple(lines[self.number - 1 : end]) == self.lines
        return "\n".join((*lines[: self.number - 1], *self.instead, *lines[end:]))

    @property
    def text(self) -> str:
        return " / ".join(line.strip() for line in self.lines)

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}:{self.number}: {self.text}"


def faults(modules: Sequence[str] = MODULES, implied: Sequence[str] = IMPLIED) -> Iterator[Fault]:
    """One synchronisation less: a call that is left out, a tile that is used before it lands or
    released before it is read, a wait for fewer products."""
    for name in modules:
        path = Path(importlib.util.find_spec(name).origin)
        before = ""
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if _DROPPED.match(line):
                indent = line[: len(line) - len(line.lstrip())]
                yield Fault(name, number, (line,), (f"{indent}pass",))
            elif found := _LANDED.search(line):
                ring, n, index = found.groups()
                parts = f"tuple(part.index(({n}) % part.shape[0]) for part in {ring}.stages)"
                yield Fault(name, number, (line,), (line[: found.start()] + parts + index,))
            elif found := _PRODUCTS.search(line):
                fewer = _PRODUCTS.sub(f"warpgroup_mma_wait({found[1]} + 1", line)
                yield Fault(name, number, (line,), (fewer,))
            if "release(" in line and ("_wait(" in before or "await_all(" in before):
                early = Fault(name, number - 1, (before, line), (line, before))
                if early.text not in implied:
                    yield early
            before = line


def _shapes() -> Iterator[Case]:
    """Calls in which every synchronisation matters: several blocks for a program, few tiles of keys
    without turns, no memory of its own for out."""
    narrow = HopperConfig(64, 2, 64, 2, own_out=True)
    for _ in range(12):
        yield Case(narrow._replace(head_dim=80), seq_len_q=130, seq_len_kv=200)
        yield Case(narrow, seq_len_q=320, seq_len_kv=640, causal=True)
        yield Case(narrow._replace(own_out=False), seq_len_q=320, seq_len_kv=320, causal=False)
        for turns in (True, False):
            for seq_len_kv in (64, 128):
                config = narrow._replace(turns=turns)
                yield Case(config, 1, 1, 1, 640, seq_len_kv, causal=False, num_programs=1)


how_noticed = functools.partial(random_calls.how_noticed, complaints, as_written, _shapes)


def _ptx_families() -> Iterator[tuple[Case, ...]]:
    """Calls of the same PTX: several blocks for a program; few tiles of keys without turns."""
    narrow = HopperConfig(64, 2, 64, 2, own_out=True)
    some = Case(narrow, 1, 1, 1, 200, 264, num_programs=1)
    yield some, some._replace(seq_len_q=300, seq_len_kv=100)
    few = Case(narrow._replace(turns=False), 1, 1, 1, 300, 128, causal=False, num_programs=1)
    yield few, few._replace(seq_len_kv=300)


_NO_WAIT = "_forward_kernel {}: no wait for an mbarrier {}".format
# What another synchronisation implies, in the PTX of Triton 3.7.
PTX_IMPLIED = (
    # Consumer 1 has its turn when consumer 0 has waited for the same tiles: keys of the first tile;
    # keys and values in the loop with a mask, and in the one without.
    *(_NO_WAIT(0, line) for line in range(8, 13)),
    # The copy warp's first values of a block: it waited for the stage of the queries before.
    *(_NO_WAIT(0, 17), _NO_WAIT(1, 13)),
)


def main() -> None:
    description = __doc__.partition("\n")[0]
    runs = {"written": as_written, "ptx": as_compiled, "gpu": on_gpu}
    random_calls.command(
        description, draw_case, runs, complaints, faults, how_noticed, _ptx_families(), PTX_IMPLIED
    )


if __name__ == "__main__":
    main()
