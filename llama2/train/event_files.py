"""TensorBoard event files of a run: the numbers of its log, as scalars by step."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.extras import how_to_install

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 10  # a running TensorBoard sees a step after that time at the latest


class ScalarWriter:
    """Writes log records as scalars; does nothing without a `writer`."""

    def __init__(self, writer: "SummaryWriter | None") -> None:
        self._writer = writer

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes every number of a record, except its "step", under its own name."""
        if self._writer is None:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Hands all scalars so far to the operating system; a killed process loses none of them."""
        if self._writer is not None:
            self._writer.flush()


@contextlib.contextmanager
def scalar_writer(folder: Path | None, first_step: int) -> Iterator[ScalarWriter]:
    """Opens a new event file in `folder`; None opens none.

    Args:
        first_step: the next step of the run. TensorBoard drops the scalars of this and later steps
            from earlier files of the folder: a killed run wrote them after its last saved state,
            and the resumed run writes them again.
    Raises:
        ImportError: as `check_tensorboard`.
    """
    if folder is None:
        yield ScalarWriter(None)
        return
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=first_step, flush_secs=_FLUSH_SECONDS) as writer:
        yield ScalarWriter(writer)


def check_tensorboard() -> None:
    """Raises ImportError, which names the extra to install, if tensorboard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--tensorboard needs tensorboard; {how_to_install('tensorboard')}"
        ) from error
