"""Fills memory that the ops allocate with NaN, to detect reads before a kernel writes it."""

import functools
import importlib
import pkgutil
import types

import torch

from gqa_kernels import ops


class PoisonedTorch:
    """torch, except that allocations without values are filled with NaN."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **kwargs):
        return _poisoned(torch.empty(*args, **kwargs))

    @staticmethod
    def empty_like(*args, **kwargs):
        return _poisoned(torch.empty_like(*args, **kwargs))


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


@functools.cache
def op_modules() -> list[types.ModuleType]:
    """Returns the modules of ops that may allocate."""
    found = pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")
    modules = [importlib.import_module(module.name) for module in found]
    return [module for module in modules if hasattr(module, "torch")]


def poison_allocations() -> None:
    """Replaces torch in the modules of the ops, for the rest of the process."""
    for module in op_modules():
        module.torch = PoisonedTorch()
