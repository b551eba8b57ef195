"""The ops in Triton, as a namespace: the same names and signatures as `reference`."""

from gqa_kernels.ops.adamw import adamw_update
from gqa_kernels.ops.attention import flash_attention, flash_attention_varlen
from gqa_kernels.ops.cache.append import rope_append_kv
from gqa_kernels.ops.cache.decode import decode_attention
from gqa_kernels.ops.cache.prefill import prefill_attention
from gqa_kernels.ops.glu import swiglu
from gqa_kernels.ops.linear_cross_entropy import linear_cross_entropy, token_log_probs
from gqa_kernels.ops.norm import add_rms_norm, rms_norm
from gqa_kernels.ops.rope import apply_rope
from gqa_kernels.ops.sampling import sample_tokens

__all__ = [
    "adamw_update",
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
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
