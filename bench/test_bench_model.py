"""Whole models: prefill, a decode step, a training step."""

OPS = "models"


def test_time(workload, backend, timed):
    timed(workload, backend)
