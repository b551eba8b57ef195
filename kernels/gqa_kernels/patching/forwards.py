"""The forwards that `patch` binds to modules of a model.

Each takes the module, then the op to use, then the arguments of the module's own forward. They call
the projections and never read their weights, which may be sharded, quantised or wrapped. They are
bound by `functools.partial`, so they are copied and pickled with their module.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from gqa_kernels.patching import notes

# The names of settings in attention functions, and in attention modules and configs.
SETTINGS = {"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"}


def norm_eps(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _only(*args: Tensor, **kwargs: Tensor) -> Tensor:
    """Returns the only argument, whatever its name in the class."""
    (x,) = (*args, *kwargs.values())
    return x


def rounded_norm(self, rms_norm, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """A norm with Llama's order of roundings: the op itself."""
    x = _only(*args, **kwargs)
    # A noted result has no gradient, not even for the weight.
    y = None if torch.is_grad_enabled() else notes.take(x, self)
    return rms_norm(x, self.weight, norm_eps(self)) if y is None else y


def wide_norm(self, rms_norm, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """A norm that normalises and multiplies in float32 and rounds once."""
    x = _only(*args, **kwargs)
    return rms_norm(x.float(), self.weight.float(), norm_eps(self)).type_as(x)


def wide_offset_norm(self, rms_norm, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """`wide_norm` with 1 + weight, as in Gemma."""
    x = _only(*args, **kwargs)
    return rms_norm(x.float(), 1.0 + self.weight.float(), norm_eps(self)).type_as(x)


def gated_mlp(self, swiglu, *args: Tensor, **kwargs: Tensor) -> Tensor:
    x = _only(*args, **kwargs)
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def packed_mlp(self, swiglu, *args: Tensor, **kwargs: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(_only(*args, **kwargs)).chunk(2, dim=-1)
    return self.down_proj(swiglu(gate, up))


def attention(
    self,
    apply_rope,
    home: str,
    settings: tuple[str, ...],
    cache_style: str,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention layer: projections, rotation, cache, the config's attention function,
    projection.

    Args:
        home: the module whose attention functions the class uses.
        settings: what this class passes to an attention function in addition to scale and dropout.
        cache_style: what the class passes to its cache in addition to k and v: "position": the
            angles and cache_position, as before Transformers 5; "plain": nothing; "kwargs": all
            other keyword arguments, to a cache argument named `cache`, from Transformers 5.24 on.
    """
    q, k, v = _project(self, hidden_states)
    cos, sin = position_embeddings
    q, k = _rotate(apply_rope, q, k, cos, sin)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    cache = kwargs.pop("past_key_values", None)
    if cache_style == "kwargs":
        cache = kwargs.pop("cache", cache)
        beside = {"kwargs": kwargs}
    elif cache_style == "position":
        position = kwargs.pop("cache_position", 0)
        beside = {"cache_kwargs": {"sin": sin, "cos": cos, "cache_position": position}}
    else:
        beside = {}
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx, **beside)
    out, weights = _attention_function(home, self.config._attn_implementation)(
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **{name: _setting(self, SETTINGS[name]) for name in settings},
        **kwargs,
    )
    out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
    return self.o_proj(out), weights


def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v `[batch, seq_len, heads, head_dim]`."""
    heads = (*x.shape[:-1], -1, self.head_dim)
    if hasattr(self, "qkv_proj"):
        num_q, num_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        return self.qkv_proj(x).view(heads).split((num_q, num_kv, num_kv), dim=-2)
    q, k = self.q_proj(x).view(heads), self.k_proj(x).view(heads)
    if getattr(self, "q_norm", None) is not None:
        q, k = self.q_norm(q), self.k_norm(k)
    return q, k, self.v_proj(x).view(heads)


def _rotate(apply_rope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q and k. Transformers passes cos and sin `[batch or 1, seq_len, head_dim]`, with each
    angle twice, rounded to the activations' dtype; the op reads a float32 table."""
    batch, seq_len = q.shape[:2]
    if cos.shape[0] not in (1, batch) or cos.shape[1] not in (1, seq_len):
        raise ValueError(
            f"position_ids: expected [{batch} or 1, {seq_len}]; got {list(cos.shape[:2])}"
        )
    tables = [_table(x, seq_len) for x in (cos, sin)]
    positions = None
    if cos.shape[0] > 1:  # a row for each token; otherwise one for each position
        positions = torch.arange(batch * seq_len, device=q.device).view(batch, seq_len)
    return apply_rope(q, k, *tables, positions)


def _table(angles: Tensor, seq_len: int) -> Tensor:
    """Returns cos or sin as a float32 table. Layers that get the same tensor share one table,
    except while a CUDA graph is captured: a replay would read the old table instead of computing
    it."""
    shared = not (angles.is_cuda and torch.cuda.is_current_stream_capturing())
    table = notes.read(angles, seq_len) if shared else None
    if table is None:
        half = angles.shape[-1] // 2
        table = angles[..., :half].to(torch.float32, copy=True)  # notes must not be views
        table = table.expand(-1, seq_len, -1).reshape(-1, half)
        if shared:
            notes.write(angles, seq_len, table)
    return table


def _attention_function(home: str, implementation: str) -> Any:
    source = sys.modules[home]
    functions, eager = source.ALL_ATTENTION_FUNCTIONS, source.eager_attention_forward
    if hasattr(functions, "get_interface"):  # Transformers 5
        return functions.get_interface(implementation, eager)
    return eager if implementation == "eager" else functions[implementation]


def _setting(self, attribute: str) -> Any:
    if hasattr(self, attribute):
        return getattr(self, attribute)
    return getattr(self.config, attribute, None)


def decoder_layer(
    self,
    add_rms_norm,
    following: nn.Module | None,
    hidden_states: Tensor,
    *args: Any,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A pre-norm layer that fuses its first residual add with its second norm, and its second
    residual add with the following norm.

    Args:
        following: the norm that takes the layer's output, if it is known: the next layer's first or
            the model's last. Its result is stored as a note of that output (`notes`).
    """
    kwargs |= {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
    }
    # Transformers may checkpoint in the class's forward, which this function replaces.
    if args or (self.training and getattr(self, "gradient_checkpointing", False)):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    norm = self.post_attention_layernorm
    if _may_fuse(norm) and update.dtype == hidden_states.dtype:
        y, residual = add_rms_norm(update, hidden_states, norm.weight, norm_eps(norm))
    else:
        residual = hidden_states + update
        y = norm(residual)
    update = self.mlp(y)
    if following is None or not _may_look_ahead(following, update, residual):
        return residual + update
    y, residual = add_rms_norm(update, residual, following.weight, norm_eps(following))
    notes.write(residual, following, y)
    return residual


def _may_look_ahead(norm: nn.Module, update: Tensor, residual: Tensor) -> bool:
    """Whether the following norm may be computed early: without gradients, and if its weight is not
    sharded, offloaded or on another device."""
    weight = norm.weight
    return (
        not torch.is_grad_enabled()
        and notes.can_be_written(residual)
        and _may_fuse(norm)
        and update.dtype == residual.dtype
        and type(weight) is nn.Parameter
        and weight.shape == residual.shape[-1:]
        and weight.device == residual.device
    )


def _may_fuse(norm: nn.Module) -> bool:
    """Whether a call of the norm only calls `rounded_norm`, without hooks or wrappers."""
    forward = norm.forward
    rounded = isinstance(forward, partial) and forward.func is rounded_norm
    return rounded and not has_hooks(norm) and not torch_module._has_any_global_hook()


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )
