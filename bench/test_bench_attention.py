"""Prefill and packed attention, forward and backward."""

OPS = ("flash_attention", "flash_attention_varlen")


def test_time(workload, backend, timed):
    timed(workload, backend)
