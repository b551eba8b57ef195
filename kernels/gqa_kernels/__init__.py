"""Triton kernels for Llama-style models: RMSNorm, SwiGLU, RoPE, grouped-query attention, losses.

Importing this package loads neither Triton nor a GPU driver; the first use of a kernel does.
"""

import importlib

from gqa_kernels.backends import get_backend

__version__ = "0.1.0"

OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "apply_rope",
    "rope_append_kv",
    "flash_attention",
    "flash_attention_varlen",
    "decode_attention",
    "prefill_attention",
    "linear_cross_entropy",
    "token_log_probs",
    "adamw_update",
    "sample_tokens",
)

__all__ = [
    "CompilationError",
    "get_backend",
    "patch",
    "scaled_dot_product_attention",
    "unpatch",
    "warm_up",
    *OPS,
]


def __getattr__(name: str) -> object:
    if name in OPS:
        return getattr(get_backend("triton"), name)
    if name == "scaled_dot_product_attention":
        from gqa_kernels.sdpa import scaled_dot_product_attention

        return scaled_dot_product_attention
    if name in ("patch", "unpatch", "patching"):
        # "from gqa_kernels import patching" would call this function again.
        patching = importlib.import_module("gqa_kernels.patching")
        return patching if name == "patching" else getattr(patching, name)
    if name in ("CompilationError", "warm_up"):
        return getattr(importlib.import_module("gqa_kernels.warming"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
