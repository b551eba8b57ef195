"""Without a GPU the kernels run in Triton's interpreter, switched on before they are imported."""

import sys

import pytest
import torch

if not torch.cuda.is_available():
    from gqa_kernels import interpreter

    interpreter.enable()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the package allocates holds NaN until a kernel writes it."""

    def poison(allocate):
        def allocate_and_fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("gqa_kernels") and out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return allocate_and_fill

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
