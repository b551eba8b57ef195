"""The calls that `hopper_child.py` makes of the kernels for Hopper, or of the portable ones.

Without a GPU, in a dry run, the kernels run in the emulator of Gluon.
"""

import contextlib
import itertools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import hopper_backward
import hopper_forward
import torch
from hopper_variants import TABLES, Variant
from torch.utils._pytree import tree_leaves

from gqa_kernels import fused
from gqa_kernels.accuracy import Measured
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.runtime import hopper_configs

Attend = Callable[..., Any]
LONG = (1000, 1024, 1537)


class Calls:
    """Random calls of a variant of one pass; of the portable kernels if variant is None."""

    pass_: str
    # Values of (causal, float16, groups of four, …) in which all pairs are met: each is compiled
    # once.
    forms: tuple[tuple[int, ...], ...]
    support: types.ModuleType  # of the tests: random calls and how they are judged
    long_share: float  # of calls with LONG lengths, whose error budget takes longest to compute

    def __init__(self, variant: Variant | None, dry: bool) -> None:
        self.variant, self.dry = variant, dry
        self.device = "cpu" if dry else "cuda"
        self.rows = TABLES[self.pass_] if variant is None else (variant.config,)

    def cases(self, seed: int) -> Iterator[Any]:
        """Random calls, without end, over the rows and forms in turn."""
        numbers = random.Random(seed)
        for config, form in itertools.cycle(itertools.product(self.rows, self.forms)):
            case = self.support.draw_case(numbers)
            lengths = case.seq_len_q, case.seq_len_kv
            if self.dry:
                lengths = [min(length, 130) for length in lengths]
            elif numbers.random() < self.long_share:
                lengths = numbers.choice(LONG), numbers.choice(LONG)
            elif min(lengths) < 63 and numbers.random() < 0.9:
                # The budget of few results needs many draws of eager code: seconds on a GPU.
                lengths = [max(length, 63) for length in lengths]
            causal, half, grouped, *further = form
            case = case._replace(
                config=config,
                seq_len_q=lengths[0],
                seq_len_kv=lengths[1],
                num_q_heads=case.num_kv_heads * (4 if grouped else 1),
                dtype=torch.float16 if half else torch.bfloat16,
                causal=bool(causal),
            )
            yield self.in_form(case, *further)

    def in_form(self, case: Any) -> Any:
        return case

    @property
    def num_forms(self) -> int:
        return len(self.rows) * len(self.forms)

    def emulated(self, case: Any, seed: int) -> Attend:
        return self.support.as_written(case, seed)

    def attend(self, case: Any, seed: int) -> Attend:
        """`flash_attention` by these kernels, called twice, which must give the same bits."""
        if self.variant is None:
            return twice(fused.flash_attention, fused.flash_attention)
        return self.emulated(case, seed) if self.dry else self.support.on_gpu(case, seed)

    def measure(self, case: Any, seed: int) -> list[Measured]:
        return self.support.measure(case, seed, self.attend(case, seed), self.device)

    def inputs(self, case: Any) -> dict[str, Any]:
        drawn = self.support.inputs_of(case, 0)
        return {name: x.to(self.device) for name, x in drawn.items()}


class Forward(Calls):
    pass_ = "fwd"
    forms = tuple((a, b, c, a ^ b ^ c, a ^ b) for b in (0, 1) for c in (0, 1) for a in (1, 0))
    support = hopper_forward
    long_share = 0.3

    def in_form(self, case: Any, lse: int, residue: int) -> Any:
        one_each = self.variant is not None and not self.variant.persistent
        return case._replace(
            return_lse=bool(lse),
            need_residue=bool(residue),
            window=None,
            softcap=None,
            bounds=None,
            num_programs=2**30 if one_each else case.num_programs,
        )

    def attend(self, case: Any, seed: int) -> Attend:
        if self.variant is not None and self.dry:
            return twice(*(self.emulated(case, 2 * seed + other) for other in (0, 1)))
        return super().attend(case, seed)

    def emulated(self, case: Any, seed: int) -> Attend:
        change = hopper_forward.unchanged if self.variant.pinned else unpinned
        return hopper_forward.as_written(case, seed, change)

    def install(self) -> None:
        """Makes the kernel this variant, for the rest of the process; the public functions run the
        portable kernels."""
        from triton.experimental import gluon

        from gqa_kernels.ops.attention.hopper import consumer, forward

        hopper_configs.HOPPER_FORWARD = _unmeasured(self.rows)
        hopper_configs.HOPPER_BACKWARD = _unmeasured(TABLES["bwd"])
        if self.variant is not None and not self.variant.pinned:

            @gluon.jit
            def pin(x):
                return x

            consumer.pin = pin
        if self.variant is not None and not self.variant.persistent:
            launch = forward.launch_forward

            def launch_forward(call: Any, config: Any, num_programs: int, **needs: bool) -> Any:
                return launch(call, config, 2**30, **needs)  # at most one per block

            forward.launch_forward = launch_forward

    def compile(self, case: Any) -> None:
        """For a context in which launches only compile."""
        attend = self.attend(case, 0)
        with contextlib.suppress(Exception):  # nothing is computed; the check raises again
            attend(**self.inputs(case), causal=case.causal, return_lse=case.return_lse)

    def kernels(self) -> list[Any]:
        from gqa_kernels.ops.attention.hopper import forward

        return [forward._forward_kernel]


class Backward(Calls):
    pass_ = "bwd"
    forms = tuple((a, b, a ^ b) for b in (0, 1) for a in (1, 0))
    support = hopper_backward
    long_share = 0.1

    def in_form(self, case: hopper_backward.Case) -> hopper_backward.Case:
        return case._replace(fused=False)

    def install(self) -> None:
        """Makes the kernels this variant, for the rest of the process; the forward pass, and the
        public functions, run the portable kernels."""
        hopper_configs.HOPPER_FORWARD = ()
        hopper_configs.HOPPER_BACKWARD = _unmeasured(self.rows)

    def compile(self, case: Any) -> None:
        if self.variant is None:
            return
        from gqa_kernels.ops.attention.hopper import dkdv, dq

        q, k, v = self.inputs(case).values()
        batch, seq_len_q, num_q_heads, _ = q.shape
        number = torch.empty(batch, num_q_heads, seq_len_q, dtype=torch.float32, device=self.device)
        call = prepared(Call(q, k, v, *[None] * 8, 0 if case.causal else None, None))
        for gradient in (dkdv.key_value_gradients, dq.query_gradient):
            with contextlib.suppress(Exception):
                gradient(call, q, number, number, case.config)

    def kernels(self) -> list[Any]:
        from gqa_kernels.ops.attention.hopper import dkdv, dq

        return [dkdv._dkdv_kernel, dq._dq_kernel]


CLASSES = {"fwd": Forward, "bwd": Backward}


def calls_of(variant: Variant | None, dry: bool) -> list[Calls]:
    """Of a variant; those of both passes of the portable kernels if variant is None."""
    if variant is None:
        return [Forward(None, dry), Backward(None, dry)]
    return [CLASSES[variant.pass_](variant, dry)]


def _unmeasured(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(row._replace(measured=False) for row in rows)


def unpinned(name: str, text: str) -> str:
    """The source of a module of the kernel, in which `pin` does nothing."""
    if name.endswith(".pipeline"):
        return text + "\n\n@gluon.jit\ndef pin(x):\n    return x\n"
    return text


def twice(first: Attend, second: Attend) -> Attend:
    """A call that is made twice and must have the same bits."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        results = [tree_leaves(run(*args, **kwargs)) for run in (first, second)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "other bits"
        return results[0][0] if len(results[0]) == 1 else tuple(results[0])

    return attend
