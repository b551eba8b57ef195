"""The backend "torch": the ops in PyTorch's own fused functions, for a CPU and for a GPU that
Triton cannot drive.

Names, signatures and contracts are those of `gqa_kernels.reference`; results agree with it within
the error budget of the kernels (`gqa_kernels.accuracy`). The ops have first derivatives; a second
derivative of attention or of the loss raises.

    rms_norm, add_rms_norm   F.rms_norm. In 16 bits the weight is multiplied separately, because
                             F.rms_norm multiplies by it before it rounds.
    swiglu                   F.silu, rounded, times up, as in Transformers
    flash_attention, flash_attention_varlen
                             F.scaled_dot_product_attention, on float32 copies of 16-bit inputs
    linear_cross_entropy     a chunk of tokens at a time: its logits and their gradient together
    apply_rope               CPU only: a product and a multiply-add, on q and k together
    rope_append_kv           CPU only: writes to the given slots of the cache and nowhere else
    decode_attention, prefill_attention
                             CPU only: F.scaled_dot_product_attention over the keys in use
    adamw_update             PyTorch's fused AdamW, and a rounding to `copy`
    token_log_probs, sample_tokens
                             the reference's functions

The reference also computes what PyTorch has no fused function for: attention with a window, soft
cap, sinks, ALiBi, key_ranges, key_mask or return_lse, or with a query that sees no key; decode
steps on quantised caches; losses with a soft cap, a z-loss, `reduction="none"` or a vocabulary
sharded over ranks. It computes the ops marked "CPU only" on other devices and under
`torch.compile`: these ops read slots and lengths from tensors, which would make the host wait for a
GPU. On a GPU only `flash_attention_varlen` and `prefill_attention` read values back, like the
reference.

Reproducibility, measured on a CPU: the same call gives the same bits, with gradients or without.
    The
batch does not change the bits of a row of `rms_norm`, of `apply_rope` and, if the width is a
multiple of 32, of `swiglu`; of a sequence in `flash_attention` in a batch of equal lengths; or of a
packed sequence. Bits may differ for a sequence in a decode step with longer ones, or with several
threads in any batch; for a prompt computed at once, in parts or token by token; for a row of the
loss in another chunk. In a whole model, the products with the weights add to this: on a CPU their
order of summation depends on the number of rows, on every backend.

Layout and `MAX_NEW_TOKENS` are those of the reference.
"""

from gqa_kernels.native.adamw import adamw_update
from gqa_kernels.native.attention import flash_attention, flash_attention_varlen
from gqa_kernels.native.cache import decode_attention, prefill_attention, rope_append_kv
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
    "prefill_attention",
    "rms_norm",
    "rope_append_kv",
    "sample_tokens",
    "swiglu",
    "token_log_probs",
]
