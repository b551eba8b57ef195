"""Counts on the CPU how many kernels a call launches on a GPU. An operation of PyTorch that
computes or moves something counts as one, an op of this package as its kernels."""

from collections import Counter
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode

# Operations without a launch: views, allocations without values, and reads of metadata.
_FREE = frozenset(
    (
        *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "lift_fresh", "numpy_T"),
        *("permute", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t"),
        *("transpose", "unbind", "unflatten", "unsafe_split", "unsqueeze", "view", "view_as"),
        *("_reshape_alias", "_unsafe_view", "is_same_size", "is_set_to", "sym_size", "sym_stride"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().split("::")[1].split(".")[0]
        if op.namespace != "aten" or name not in _FREE:
            self.launches[name] += 1
        return op(*args, **(kwargs or {}))


def launches_of(call: Callable[[], object]) -> Counter[str]:
    """Counts launches by name. An op of this package counts once, since in a forward pass without
    gradients each is one kernel."""
    with _Counted() as counted:
        call()
    return counted.launches


def per_layer(make_call: Callable[[int], Callable[[], object]]) -> dict[str, int]:
    """Counts launches per layer of a model, by name.

    Args:
        make_call: returns the call of a model with this many layers.
    """
    counts = []
    for num_layers in (1, 2):
        counts.append(launches_of(make_call(num_layers)))
    few, many = counts
    found = {name: many[name] - few[name] for name in many}
    return {name: count for name, count in found.items() if count}
