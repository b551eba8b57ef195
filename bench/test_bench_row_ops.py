"""RMSNorm, add + RMSNorm, SwiGLU and RoPE, forward and backward."""

OPS = ("rms_norm", "add_rms_norm", "swiglu", "apply_rope")


def test_time(workload, backend, timed):
    timed(workload, backend)
