"""The order of a run's rows, which are all in memory, epoch by epoch."""

import math
from fractions import Fraction

import numpy as np


class Epochs:
    """Takes every row once per epoch, in a different order each epoch.

    Attributes:
        num_rows: rows of an epoch.
        num_rows_of_all: rows of all epochs; a partial epoch takes the first rows of its order.
        steps: batches of all epochs.

    Args:
        epochs: passes over all rows.
        seed: random seed of the orders.
    Raises:
        ValueError: `epochs` is not positive, or too large to count.
    """

    def __init__(self, num_rows: int, *, batch_size: int, epochs: float, seed: int) -> None:
        self.num_rows, self._batch_size, self._seed = num_rows, batch_size, seed
        if not 0 < epochs * num_rows < 2**31:
            most = f", at most {2**31 / num_rows:,.0f}" if epochs > 0 else ""
            raise ValueError(f"epochs: expected a positive number{most}; got {epochs}")
        # Computed in decimal: 1.1 epochs of 10 rows are 11 rows, not 12.
        self.num_rows_of_all = math.ceil(Fraction(str(epochs)) * num_rows)
        self.steps = -(-self.num_rows_of_all // batch_size)
        self._order = (-1, np.empty(0, dtype=np.int64))  # of the current epoch

    def rows(self, step: int) -> list[int]:
        """Returns the row numbers of a step: `batch_size`, or fewer in the last step."""
        start = step * self._batch_size
        places = range(start, min(start + self._batch_size, self.num_rows_of_all))
        return [self._row(place) for place in places]

    def _row(self, place: int) -> int:
        """Returns the row number at a position of the run."""
        epoch, within = divmod(place, self.num_rows)
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
            self._order = (epoch, order)
        return int(self._order[1][within])
