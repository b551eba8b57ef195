"""The order in which a run takes rows that it has whole in memory, epoch by epoch."""

import math
from fractions import Fraction

import numpy as np


class Epochs:
    """Every epoch all rows once, in an order of its own.

    Attributes:
        num_rows: rows of an epoch.
        num_rows_of_all: of all epochs; of a part of an epoch the first rows of its order come.
        steps: batches of all epochs.

    Args:
        epochs: how often all rows come.
        seed: of the orders.
    Raises:
        ValueError: `epochs` is not positive, or too large to count.
    """

    def __init__(self, num_rows: int, *, batch_size: int, epochs: float, seed: int) -> None:
        self.num_rows, self._batch_size, self._seed = num_rows, batch_size, seed
        if not 0 < epochs * num_rows < 2**31:
            most = f", at most {2**31 / num_rows:,.0f}" if epochs > 0 else ""
            raise ValueError(f"epochs: expected a positive number{most}; got {epochs}")
        # As it is written in decimal: 1.1 epochs of 10 rows are 11, not 12.
        self.num_rows_of_all = math.ceil(Fraction(str(epochs)) * num_rows)
        self.steps = -(-self.num_rows_of_all // batch_size)
        self._order = (-1, np.empty(0, dtype=np.int64))  # of the present epoch

    def rows(self, step: int) -> list[int]:
        """Returns the numbers of the rows of a step: `batch_size`, but for the last step, which may
        have fewer."""
        start = step * self._batch_size
        places = range(start, min(start + self._batch_size, self.num_rows_of_all))
        return [self._row(place) for place in places]

    def _row(self, place: int) -> int:
        """Returns the row at a place of the run."""
        epoch, within = divmod(place, self.num_rows)
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
            self._order = (epoch, order)
        return int(self._order[1][within])
