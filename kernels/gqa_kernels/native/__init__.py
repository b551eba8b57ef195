"""The ops in PyTorch's own fused functions: what a CPU computes with, and a GPU that Triton cannot
drive.

The names, signatures and contracts are the reference's, and so are the results, within the error
budget of the kernels (`gqa_kernels.accuracy`). PyTorch's functions give the first derivatives; a
second one of attention or of the loss raises.

    rms_norm, add_rms_norm   F.rms_norm; in 16 bits without its weight, by which it would multiply
                             before it rounds
    swiglu                   F.silu times up, each rounded, as Transformers has it
    flash_attention, …       F.scaled_dot_product_attention, of 16-bit inputs in float32
    linear_cross_entropy     logits of a chunk of tokens at a time, and their gradient with them
    apply_rope               on a CPU: two products per tensor
    rope_append_kv           on a CPU: and writes to the slots alone
    decode_attention         on a CPU: F.scaled_dot_product_attention over the keys that there are
    token_log_probs          the reference
    sample_tokens            the reference
    adamw_update             PyTorch's fused AdamW, and a copy

The reference computes what PyTorch has no fused function for: attention with a window, soft cap,
sinks, ALiBi, key_ranges, key_mask or return_lse, or where a query sees no key; quantised caches;
losses with a soft cap, a z-loss, `reduction="none"` or a vocabulary that ranks share. It also
computes what the table has "on a CPU" everywhere else and under `torch.compile`: which slots and
keys there are is asked of a tensor, which costs nothing on a CPU and would make the host wait for
a GPU. No op asks a GPU for a value, but for `flash_attention_varlen`, as the reference's.

Bits, as measured on a CPU. Every call repeats its bits, with gradients or without. A row of
`rms_norm`, `apply_rope` and, where the width is a multiple of 32, `swiglu` has the same bits alone
and in any batch; so has a sequence in `flash_attention` beside others of its length, and a packed
one. Not the same bits: a sequence of a decode step beside longer ones, and on several threads
beside any; a prompt at once and in parts, or token by token; a row of the loss in another chunk. A
whole model has no more than that, and the products with its weights, whose order of sums depends on
the number of rows on a CPU, on every backend.

Layout and `MAX_NEW_TOKENS` are the reference's.
"""

from gqa_kernels.native.adamw import adamw_update
from gqa_kernels.native.attention import flash_attention, flash_attention_varlen
from gqa_kernels.native.cache import decode_attention, rope_append_kv
from gqa_kernels.native.losses import linear_cross_entropy
from gqa_kernels.native.rows import add_rms_norm, apply_rope, rms_norm, swiglu
from gqa_kernels.reference import sample_tokens, token_log_probs

__all__ = [
    "adamw_update",
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
    "flash_attention",
    "flash_attention_varlen",
    "linear_cross_entropy",
    "rms_norm",
    "rope_append_kv",
    "sample_tokens",
    "swiglu",
    "token_log_probs",
]
