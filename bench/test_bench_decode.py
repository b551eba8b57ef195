"""A decode step's attention over its cache, and the append before it."""

OPS = ("decode_attention", "rope_append_kv")


def test_time(workload, backend, timed):
    timed(workload, backend)
