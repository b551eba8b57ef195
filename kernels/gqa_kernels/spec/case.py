"""The types of a row of the op table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from gqa_kernels.spec.structure import REPEATING, STRUCTURES


class Cost(NamedTuple):
    """The algorithmic minimum of a pass in flops and bytes."""

    read_bytes: int
    write_bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One shape of an op and its source.

    Attributes:
        test: whether it is small enough for the interpreter.
        structure: that of the inputs, a name in `STRUCTURES`.
    """

    sizes: dict[str, Any]
    source: str
    test: bool = False
    structure: str = "normal"

    def __str__(self) -> str:
        return "-".join(f"{name}={size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class OpSpec:
    """A row of the table.

    Attributes:
        tiny: the sizes of a call that the interpreter runs quickly, for tests of how an op is
            called rather than of what it computes.
        wrt: the arguments with gradients; empty for an op without a backward pass.
        backward_cost: of the backward pass, if there is one.
    """

    name: str
    reference: Callable[..., Any]
    kernel: Callable[..., Any]
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    cost: Callable[[Case, torch.dtype], Cost]
    tiny: dict[str, Any]
    wrt: tuple[str, ...] = ()
    backward_cost: Callable[[Case, torch.dtype], Cost] | None = None

    def test_cases(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.test)

    def tiny_case(self, length: int | None = None) -> Case:
        """`tiny`, with another number of tokens."""
        (name,) = {"num_tokens", "seq_len", "seq_len_kv", "total", "max_seq_len"} & set(self.tiny)
        given = {} if length is None else {name: length}
        return Case(self.tiny | given, "tiny", test=True)


def standard_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal float32 numbers on the generator's device. From a CPU generator they are the
    same on every machine, unlike those of torch.randn."""
    if generator.device.type != "cpu":
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
    (seed,) = torch.randint(2**62, (1,), generator=generator, device="cpu").tolist()
    drawn = numpy.random.default_rng(seed).standard_normal(shape, numpy.float32)
    return torch.empty(shape, dtype=torch.float32, device="cpu").copy_(torch.from_numpy(drawn))


class Draw:
    """Draws tensors of one dtype and device from one generator, with the structure of a case;
    tensors requested in another dtype are standard normal."""

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.dtype, self.device, self.generator = dtype, device, generator
        self._structure = STRUCTURES[case.structure]
        self._of_weights = STRUCTURES["normal" if case.structure in REPEATING else case.structure]

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        structure = self._structure if dtype is None else STRUCTURES["normal"]
        return structure(self._normals(*shape), self._normals).to(self.device, dtype or self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """A matrix whose rows differ in every structure. If all rows of a vocabulary were equal,
        the gradient of the hidden states would be 0, and its error that of one rounding."""
        if self.device.type == "meta":
            return self(*shape)
        return self._of_weights(self._normals(*shape), self._normals).to(self.device, self.dtype)

    def _normals(self, *shape: int) -> Tensor:
        return standard_normal(shape, self.generator)
