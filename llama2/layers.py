"""The layers of the network: attention, feed-forward and normalisation.

`ops`, a module of functions, provides the kernels. Parameters have Hugging Face's names.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from gqa_kernels.positions import rope_table
from llama2.cache.kv_cache import CacheStep
from llama2.config import ModelConfig
from llama2.joint_projection import JointProjection


class RotaryTable(nn.Module):
    """Holds cos and sin, which follow the model's device but stay float32 when it is cast."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        cos, sin = self._table(torch.get_default_device())
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        return rope_table(config.head_dim, config.max_seq_len, config.rope_theta, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTable":
        try:
            super()._apply(fn, recurse)
            self.move(self.cos.device)
        except NotImplementedError:  # tensors on the meta device cannot be copied
            self.move(fn(torch.empty(0, dtype=torch.float32, device="cpu")).device)
        return self

    def move(self, device: torch.device) -> None:
        """Computes the table on a device."""
        self.cos, self.sin = self._table(device)


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__()
        settings = {"dtype": torch.get_default_dtype(), "device": torch.get_default_device()}
        self.weight = nn.Parameter(torch.ones(config.hidden_size, **settings))
        self.eps = config.norm_eps
        # The functions, not the module: a copy or pickle of a model refers to functions by name.
        self.rms_norm, self.add_rms_norm = ops.rms_norm, ops.add_rms_norm

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (normalised, residual) of x + residual; the first norm of the network has no
        residual."""
        if residual is None:
            return self.rms_norm(x, self.weight, self.eps), x
        return self.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__()
        self.num_q_heads, self.num_kv_heads = config.num_q_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.rope_interleaved = config.rope_interleaved
        self.apply_rope, self.rope_append_kv = ops.apply_rope, ops.rope_append_kv
        self.flash_attention, self.decode_attention = ops.flash_attention, ops.decode_attention
        self.flash_attention_varlen = ops.flash_attention_varlen
        self.prefill_attention = ops.prefill_attention
        q_size = config.num_q_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self._joint = JointProjection()

    def fuse_projections(self, tenants: Counter[int]) -> None:
        self._joint.fuse(self.q_proj, self.k_proj, self.v_proj, tenants=tenants)

    def release_projections(self) -> None:
        self._joint.release(self.q_proj, self.k_proj, self.v_proj)

    def forward(
        self,
        x: Tensor,
        rope: RotaryTable,
        positions: Tensor | None,
        step: CacheStep | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        # [batch, seq_len, num_heads, head_dim]
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = _projected(x, projections, self._joint, step)
        tokens, head_dim = x.shape[:2], self.head_dim
        q = q.view(*tokens, self.num_q_heads, head_dim)
        k = k.view(*tokens, self.num_kv_heads, head_dim)
        v = v.view(*tokens, self.num_kv_heads, head_dim)
        angles, pairs = (rope.cos, rope.sin, positions), {"interleaved": self.rope_interleaved}
        if step is None:
            q, k = self.apply_rope(q, k, *angles, **pairs)
        else:
            stored = step.stored  # of this layer
            cached = stored.keys, stored.values
            scales = {"k_scale": stored.k_scale, "v_scale": stored.v_scale}
            q, k = self.rope_append_kv(q, k, v, *cached, *angles, step.slots, **scales, **pairs)
        if step is None and cu_seqlens is not None:
            packed = (q.squeeze(0), k.squeeze(0), v.squeeze(0), cu_seqlens, cu_seqlens)
            out = self.flash_attention_varlen(*packed, causal=True).unsqueeze(0)
        elif step is None or step.seq_lens is None:  # sequences start here: all keys are k
            out = self.flash_attention(q, k, v, causal=True)
        else:
            out = self._over_cache(q, step, cu_seqlens)
        return self.o_proj(out.flatten(2))

    def _over_cache(self, q: Tensor, step: CacheStep, cu_seqlens: Tensor | None) -> Tensor:
        """Attends from new tokens `[batch, seq_len, num_q_heads, head_dim]` to the cache, which
        holds their keys and values. Returns the shape of q."""
        keys, values, k_scale, v_scale = step.stored
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        settings = {"block_table": step.block_table} | scales
        if cu_seqlens is None:
            return self.decode_attention(q, keys, values, step.seq_lens, **settings)
        tokens, decoded = q.flatten(0, 1), []
        if step.decoding is not None:
            seq_lens, block_table = step.decoding
            single, tokens = tokens.tensor_split([len(seq_lens)])
            pages = {"block_table": block_table}
            one = self.decode_attention(single[:, None], keys, values, seq_lens, **pages, **scales)
            decoded = [one.squeeze(1)]
        cached = keys, values, cu_seqlens, step.seq_lens
        out = self.prefill_attention(tokens, *cached, **settings)
        return (torch.cat([*decoded, out]) if decoded else out).view_as(q)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__()
        self.swiglu = ops.swiglu
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._joint = JointProjection()

    def fuse_projections(self, tenants: Counter[int]) -> None:
        self._joint.fuse(self.gate_proj, self.up_proj, tenants=tenants)

    def release_projections(self) -> None:
        self._joint.release(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor, step: CacheStep | None = None) -> Tensor:
        projections = self.gate_proj, self.up_proj
        return self.down_proj(self.swiglu(*_projected(x, projections, self._joint, step)))


def _projected(
    x: Tensor,
    projections: Sequence[nn.Module],
    joint: JointProjection,
    step: CacheStep | None,
) -> Sequence[Tensor]:
    """Returns the output of each projection, from one joint product if the call is a step on a
    cache without gradients. A call without a cache never uses it, so that its bits do not depend on
    whether autograd records."""
    if step is None or torch.is_grad_enabled():
        return [projection(x) for projection in projections]
    return joint(x, *projections)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, ops)
        self.self_attn = Attention(config, ops)
        self.post_attention_layernorm = RMSNorm(config, ops)
        self.mlp = FeedForward(config, ops)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rope: RotaryTable,
        positions: Tensor | None,
        step: CacheStep | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (output, residual), whose sum is the layer's output; the next norm adds them."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, rope, positions, step, cu_seqlens)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x, step), residual
