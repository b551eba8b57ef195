"""The ops that are neither attention nor on a cache, forward and backward, and the optimiser."""

from gqa_kernels.spec import OPS as TABLE
from gqa_kernels.spec import attention, cache, optimizer

ROWS = tuple(spec for spec in TABLE if spec not in (*attention.OPS, *cache.OPS))
OPS = tuple(spec.name for spec in (*ROWS, *optimizer.IN_PLACE_OPS))


def test_time(workload, backend, timed):
    timed(workload, backend)
