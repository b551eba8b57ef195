"""Without a GPU the kernels run in Triton's interpreter, switched on before they are imported."""

from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    from gqa_kernels import interpreter

    interpreter.enable(check_overflow=True)

# After the interpreter: they import the kernels.
from budget import SEED
from poison import PoisonedTorch, op_modules

from gqa_kernels.spec.case import standard_normal

# torch.device("meta") remembers, from its first use on, which functions allocate: torch's own, not
# the poisoned ones below, which would let it allocate in earnest.
with torch.device("meta"):
    torch.empty(0)


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
    """Normal numbers of a shape, float32 unless asked otherwise; another TEST_SEED gives others."""

    def make(*shape, dtype=torch.float32):
        return standard_normal(shape, generator).to(device, dtype)

    return make


@pytest.fixture(scope="session", autouse=True)
def _own_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """PyTorch's compiler takes code from its cache that was compiled for another instruction set
    (ATEN_CPU_CAPABILITY), with wrong results: no run uses what another left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates holds NaN until a kernel writes it."""
    for module in op_modules():
        monkeypatch.setattr(module, "torch", PoisonedTorch())
