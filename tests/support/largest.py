"""Measures the size of the largest tensor of a computation."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """A context in which `numel` tracks the largest output of any operation; allocations inside an
    op of a library are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **kwargs or {})
        sizes = (x.numel() for x in tree_leaves(outputs) if isinstance(x, Tensor))
        self.numel = max(self.numel, *sizes, 0)
        return outputs
