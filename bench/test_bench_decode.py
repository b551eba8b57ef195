"""The attention of a decode step over its cache, and the append before it."""

from gqa_kernels.spec import cache

OPS = tuple(spec.name for spec in (*cache.OPS, *cache.IN_PLACE_OPS))


def test_time(workload, backend, timed):
    timed(workload, backend)
