"""The ops in plain PyTorch: the specification against which every kernel is checked.

Nothing here is optimised. Every function runs on any device and in any floating dtype, is
differentiable by autograd, and keeps intermediate results in `promote_types(dtype, float32)` where
the kernels keep them in float32. Tests evaluate a function in float64 to get exact results.

Layout: `[batch, seq_len, num_heads, head_dim]`. Query head h reads key/value head h // group_size,
where group_size = num_q_heads / num_kv_heads.
"""

from gqa_kernels.reference.adamw import adamw_update
from gqa_kernels.reference.attention import flash_attention, flash_attention_varlen
from gqa_kernels.reference.cache import (
    MAX_NEW_TOKENS,
    decode_attention,
    dequantized,
    prefill_attention,
    rope_append_kv,
)
from gqa_kernels.reference.losses import linear_cross_entropy, token_log_probs
from gqa_kernels.reference.rows import add_rms_norm, apply_rope, rms_norm, swiglu
from gqa_kernels.reference.sampling import sample_tokens

__all__ = [
    "MAX_NEW_TOKENS",
    "adamw_update",
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
    "dequantized",
    "flash_attention",
    "flash_attention_varlen",
    "linear_cross_entropy",
    "prefill_attention",
    "rms_norm",
    "rope_append_kv",
    "sample_tokens",
    "swiglu",
    "token_log_probs",
]
