"""Runs the PTX that Triton generates on CPU tensors, and detects races and stray accesses.

    with emulating("sm_90", strict=False) as emulator:   # of ptx_emulator.driver
        flash_attention(q, k, v, causal=True)             # tensors on the CPU
    print(emulator.findings, emulator.records)

README.md says what is modelled and what is not.
"""
