"""Settings of all tests. Without a GPU, enables Triton's interpreter before kernels are
imported."""

from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    from gqa_kernels import interpreter

    interpreter.enable(check_overflow=True)

# These import the kernels, so they come after the interpreter.
from budget import SEED
from combinations import mark_the_rest
from poison import PoisonedTorch, op_modules

from gqa_kernels.spec.case import standard_normal

# At its first use, torch.device("meta") stores which functions allocate. It must be used before
# these are replaced by the poisoned ones below, or it would really allocate memory.
with torch.device("meta"):
    torch.empty(0)


@pytest.hookimpl(tryfirst=True)  # before what is marked is deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest(items)


def pytest_report_header() -> str:
    return f"TEST_SEED={SEED}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def draw(device: torch.device, generator: torch.Generator) -> Callable[..., torch.Tensor]:
    """Draws normal numbers of a shape, float32 by default; TEST_SEED in the environment is the
    seed."""

    def make(*shape, dtype=torch.float32):
        return standard_normal(shape, generator).to(device, dtype)

    return make


@pytest.fixture(scope="session", autouse=True)
def _own_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives every run an empty compiler cache: PyTorch's compiler would use cached code that was
    compiled for another instruction set (ATEN_CPU_CAPABILITY), with wrong results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills memory that an op allocates with NaN, to detect reads before a kernel writes it."""
    for module in op_modules():
        monkeypatch.setattr(module, "torch", PoisonedTorch())
