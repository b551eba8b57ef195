"""Prefill attention, forward and backward."""

OPS = ("flash_attention",)


def test_time(workload, backend, timed):
    timed(workload, backend)
