"""Prefill and packed attention, forward and backward."""

from gqa_kernels.spec import attention

OPS = tuple(spec.name for spec in attention.OPS)


def test_time(workload, backend, timed):
    timed(workload, backend)
