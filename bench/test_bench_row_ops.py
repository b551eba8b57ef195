"""The ops that are neither attention nor on a cache, forward and backward."""

from gqa_kernels.spec import OPS as TABLE
from gqa_kernels.spec import attention, cache

OPS = tuple(spec.name for spec in TABLE if spec not in (*attention.OPS, *cache.OPS))


def test_time(workload, backend, timed):
    timed(workload, backend)
