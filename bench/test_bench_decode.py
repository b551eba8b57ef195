"""Decode attention over full and ragged caches."""

OPS = ("decode_attention",)


def test_time(workload, backend, timed):
    timed(workload, backend)
