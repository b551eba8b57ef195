"""The parts of a Llama layer as modules, with the parameters of published checkpoints.

A module has parameters with the names of a checkpoint's tensors under its prefix:

    RMSNorm    weight                            both, below input_layernorm. and attention_norm., …
    Attention  q_proj, k_proj, v_proj, o_proj    Hugging Face, below self_attn.
               wq, wk, wv, wo                    Meta, below attention.
    SwiGLU     gate_proj, up_proj, down_proj     Hugging Face, below mlp.
               w1, w3, w2                        Meta, below feed_forward.

A module computes on the backend given to its constructor: "triton", the kernels; "torch", PyTorch's
fused functions on any device; or "eager", the reference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels.backends import get_backend
from gqa_kernels.positions import packed_positions, rope_table
from gqa_kernels.reference import MAX_NEW_TOKENS
from gqa_kernels.runtime import arguments

__all__ = ["Attention", "RMSNorm", "SwiGLU", "packed_positions", "rope_table"]

_ATTENTION_NAMES = {
    "hf": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "meta": ("wq", "wk", "wv", "wo"),
}
_SWIGLU_NAMES = {  # gate, up, down
    "hf": ("gate_proj", "up_proj", "down_proj"),
    "meta": ("w1", "w3", "w2"),
}


class RMSNorm(nn.Module):
    """y = cast(x / sqrt(mean(x²) + eps)) · weight, alone or with the residual add before it.

    Args:
        hidden_size: of the last dimension; up to 16384 on "triton".
        eps: added to the mean square.
        backend: "triton", "torch" or "eager".
    Parameters:
        weight `[hidden_size]`, ones at first.
    Raises:
        ValueError: a size that is not positive, an unknown backend.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        backend: str = "triton",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.size("hidden_size", hidden_size)
        self.eps = eps
        ops = get_backend(backend)
        # Functions, not the module, because pickle stores functions by name.
        self._rms_norm, self._add_rms_norm = ops.rms_norm, ops.add_rms_norm
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns y of x; with a residual (y, h), where h = x + residual and y is of h, in one
        pass.

        Args:
            x, residual: `[..., hidden_size]`, of one shape and dtype.
        Raises:
            As `rms_norm` and `add_rms_norm`.
        """
        if residual is None:
            return self._rms_norm(x, self.weight, self.eps)
        return self._add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), the feed-forward network of Llama.

    Args:
        checkpoint_format: "hf" or "meta", the naming of the parameters.
        bias: whether the three projections have one.
        backend: "triton", "torch" or "eager".
    Parameters:
        gate_proj.weight, up_proj.weight `[intermediate_size, hidden_size]`, down_proj.weight
        `[hidden_size, intermediate_size]`; or w1.weight, w3.weight and w2.weight in this order.
    Raises:
        ValueError: a size that is not positive, an unknown checkpoint_format or backend.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        checkpoint_format: str = "hf",
        bias: bool = False,
        backend: str = "triton",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.size("hidden_size", hidden_size)
        arguments.size("intermediate_size", intermediate_size)
        self._projections = _projection_names(_SWIGLU_NAMES, checkpoint_format)
        self._swiglu = get_backend(backend).swiglu
        wide, narrow = (hidden_size, intermediate_size), (intermediate_size, hidden_size)
        for name, sizes in zip(self._projections, (wide, wide, narrow), strict=True):
            self.add_module(name, nn.Linear(*sizes, bias, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the network of x `[..., hidden_size]`; the result has its shape."""
        gate, up, down = (getattr(self, name) for name in self._projections)
        return down(self._swiglu(gate(x), up(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and its four projections.

    Args:
        hidden_size: of the input and the output.
        num_q_heads, num_kv_heads: equal: MHA; num_kv_heads 1: MQA; a divisor between: GQA.
        head_dim: None means hidden_size / num_q_heads.
        checkpoint_format: "hf": Hugging Face's names, and pairs of features (i, i + head_dim / 2)
            that rotate together; "meta": Meta's names and its pairs (2i, 2i + 1). The weights of
            the two differ in the order of q's and k's rows.
        causal, window: as in `flash_attention`. A cache needs causal=True and no window.
        bias: whether the four projections have one.
        backend: "triton", "torch" or "eager".
    Parameters:
        q_proj.weight `[num_q_heads · head_dim, hidden_size]`, k_proj.weight and v_proj.weight
        `[num_kv_heads · head_dim, hidden_size]`, o_proj.weight `[hidden_size, num_q_heads ·
        head_dim]`; or wq.weight, wk.weight, wv.weight, wo.weight.
    Raises:
        ValueError: a size that is not positive, num_q_heads that is not a multiple of num_kv_heads,
            an odd head_dim, a head_dim of None where num_q_heads does not divide hidden_size, an
            unknown checkpoint_format or backend.
        NotImplementedError: with "triton", a head_dim that is not a multiple of 8 up to 256.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        *,
        checkpoint_format: str = "hf",
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        bias: bool = False,
        backend: str = "triton",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.size("hidden_size", hidden_size)
        arguments.size("num_q_heads", num_q_heads)
        arguments.size("num_kv_heads", num_kv_heads)
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads ({num_kv_heads}); "
                f"got {num_q_heads}"
            )
        if head_dim is None:
            if hidden_size % num_q_heads:
                raise ValueError(
                    f"head_dim: expected a number, as hidden_size ({hidden_size}) is not a "
                    f"multiple of num_q_heads ({num_q_heads}); got None"
                )
            head_dim = hidden_size // num_q_heads
        arguments.size("head_dim", head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number; got {head_dim}")
        self._projections = _projection_names(_ATTENTION_NAMES, checkpoint_format)
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_q_heads, self.num_kv_heads = num_q_heads, num_kv_heads
        self.rope_interleaved = checkpoint_format == "meta"
        self.causal, self.window = causal, window
        if backend == "triton" and (head_dim % 8 or head_dim > 256):
            raise NotImplementedError(
                f"head_dim: expected a multiple of 8 up to 256 with triton; got {head_dim}"
            )
        ops = get_backend(backend)
        self._apply_rope, self._rope_append_kv = ops.apply_rope, ops.rope_append_kv
        self._decode_attention = ops.decode_attention
        self._flash_attention = ops.flash_attention
        self._flash_attention_varlen = ops.flash_attention_varlen
        q_size, kv_size = num_q_heads * head_dim, num_kv_heads * head_dim
        sizes = ((hidden_size, q_size), *((hidden_size, kv_size),) * 2, (q_size, hidden_size))
        for name, size in zip(self._projections, sizes, strict=True):
            self.add_module(name, nn.Linear(*size, bias, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kv_cache: tuple[Tensor, Tensor] | None = None,
        seq_lens: Tensor | None = None,
    ) -> Tensor:
        """Computes attention of x to itself and, with a cache, to the cached tokens.

        Args:
            x: `[batch, seq_len, hidden_size]`; packed sequences are `[1, total, hidden_size]`.
            cos, sin: float32 `[max_seq_len, head_dim / 2]`, from `rope_table`.
            positions: int32 or int64 `[batch, seq_len]`: the positions for RoPE. None means 0, 1, …
                in every sequence, after those in the cache. They do not affect the causal mask.
            cu_seqlens: int32 or int64 `[num_sequences + 1]`, the bounds of packed sequences, from 0
                and never decreasing; a sequence does not see the others. Without positions, every
                layer computes `packed_positions`.
            kv_cache: (k_cache, v_cache), each `[batch, capacity, num_kv_heads, head_dim]` in the
                projections' dtype. The keys and values of x are **written into them**: without
                seq_lens into rows 0 … seq_len − 1, for new sequences of any seq_len; with seq_lens
                into the last seq_len rows below it. For inference only.
            seq_lens: int32 or int64 `[batch]`, for 1 to 16 new tokens per sequence: the number of
                cached tokens including the new ones, as in `decode_attention`; in [seq_len,
                capacity]. It is read on the device, where no error can be raised: new tokens that
                it puts outside the cache are not written, and their outputs are undefined. A
                position outside cos and sin gives NaN.
        Returns:
            `[batch, seq_len, hidden_size]`.
        Raises:
            ValueError, TypeError: an argument of another shape, dtype or device; seq_lens without a
                cache; positions or cu_seqlens with one.
            NotImplementedError: a cache with a gradient, with a window, without causal, or with
                seq_lens and more than 16 new tokens.
        """
        arguments.tensor("x", x, shape=("batch", "seq_len", self.hidden_size))
        if kv_cache is not None:
            self._check_cache(x, (cos, sin), positions, cu_seqlens, kv_cache, seq_lens)
        elif seq_lens is not None:
            raise ValueError("seq_lens: expected None without kv_cache; got a tensor")
        if cu_seqlens is not None:
            arguments.tensor("x", x, shape=(1, "total", self.hidden_size))
        if positions is None and cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, x.shape[1])

        q, k, v, o = (getattr(self, name) for name in self._projections)
        # [batch, seq_len, num_heads, head_dim]
        q = q(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = k(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = v(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        pairs = {"interleaved": self.rope_interleaved}
        if kv_cache is None:
            q, k = self._apply_rope(q, k, cos, sin, positions, **pairs)
        else:
            positions, slots = _places(k, v, kv_cache, seq_lens)
            q, k = self._rope_append_kv(q, k, v, *kv_cache, cos, sin, positions, slots, **pairs)
        mask = {"causal": self.causal, "window": self.window}
        if seq_lens is not None:
            out = self._decode_attention(q, *kv_cache, seq_lens)
        elif cu_seqlens is not None:
            packed = (q.squeeze(0), k.squeeze(0), v.squeeze(0), cu_seqlens, cu_seqlens)
            out = self._flash_attention_varlen(*packed, **mask).unsqueeze(0)
        else:
            out = self._flash_attention(q, k, v, **mask)
        return o(out.flatten(2))

    def _check_cache(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        seq_lens: Tensor | None,
    ) -> None:
        """Checks, before anything is written, what the ops cannot check or would check too late."""
        for name, value in (("positions", positions), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ValueError(f"{name}: expected None with kv_cache; got a tensor")
        if self.window is not None or not self.causal:
            raise NotImplementedError(
                "kv_cache: expected causal attention without a window; got "
                f"causal={self.causal}, window={self.window}"
            )
        for name, table in zip(("cos", "sin"), angles, strict=True):
            arguments.tensor(name, table, shape=("max_seq_len", self.head_dim // 2))
        differentiable = (x, *angles, *self.parameters())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
            raise NotImplementedError(
                "kv_cache: expected a call without a gradient (under torch.no_grad()); got x or "
                "parameters that require one"
            )
        batch, seq_len, _ = x.shape
        if not isinstance(kv_cache, tuple | list) or len(kv_cache) != 2:
            raise TypeError(f"kv_cache: expected (k_cache, v_cache); got {type(kv_cache).__name__}")
        shape = (batch, "capacity", self.num_kv_heads, self.head_dim)
        for name, cache in zip(("k_cache", "v_cache"), kv_cache, strict=True):
            arguments.tensor(name, cache, shape=shape)
            shape = tuple(cache.shape)  # v_cache must have the shape of k_cache
            if cache.stride(-1) != 1:
                raise ValueError(
                    f"{name}: expected contiguous features; got strides {cache.stride()}"
                )
            sizes = zip(cache.stride(), cache.shape, strict=True)
            if any(stride == 0 and size > 1 for stride, size in sizes):
                raise ValueError(
                    f"{name}: expected entries that share no memory; got strides {cache.stride()}"
                )
        capacity = shape[1]
        if seq_len > capacity:
            raise ValueError(f"x: expected seq_len up to the cache's {capacity}; got {seq_len}")
        if seq_lens is None:
            if seq_len > angles[0].shape[0]:
                raise ValueError(
                    f"x: expected seq_len up to cos's {angles[0].shape[0]} rows; got {seq_len}"
                )
            return
        arguments.tensor("seq_lens", seq_lens, shape=(batch,), dtypes=arguments.INTS)
        if seq_lens.device != x.device:
            raise ValueError(f"seq_lens: expected x's device {x.device}; got {seq_lens.device}")
        if seq_len > MAX_NEW_TOKENS:
            raise NotImplementedError(
                f"x: expected a seq_len of 1 to {MAX_NEW_TOKENS} with seq_lens; got {seq_len}"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A buffer in early checkpoints of Hugging Face, which is computed from theta.
        state_dict.pop(f"{prefix}rotary_emb.inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, rope_interleaved={self.rope_interleaved}"
        )


def _projection_names(table: dict[str, tuple[str, ...]], checkpoint_format: str) -> tuple[str, ...]:
    if checkpoint_format not in table:
        raise ValueError(
            f"checkpoint_format: expected one of {', '.join(table)}; got {checkpoint_format!r}"
        )
    return table[checkpoint_format]


def _places(
    k: Tensor, v: Tensor, kv_cache: tuple[Tensor, Tensor], seq_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (positions, slots) of new tokens, each `[batch, seq_len]`: the first of their
    sequences, or the last below seq_lens. A token outside the cache has slot −1."""
    for name, cache, new in zip(("k_cache", "v_cache"), kv_cache, (k, v), strict=True):
        # One backend would silently cast what it writes and the other would raise.
        if cache.dtype != new.dtype:
            raise TypeError(f"{name}: expected the new keys' dtype {new.dtype}; got {cache.dtype}")
        if cache.device != k.device:
            raise ValueError(f"{name}: expected x's device {k.device}; got {cache.device}")
    batch, seq_len = k.shape[:2]
    capacity = kv_cache[0].shape[1]
    positions = torch.arange(seq_len, device=k.device).expand(batch, seq_len)
    if seq_lens is not None:
        positions = positions + (seq_lens[:, None] - seq_len)
    first_slots = torch.arange(batch, device=k.device)[:, None] * capacity
    outside = (positions < 0) | (positions >= capacity)
    return positions, (first_slots + positions).masked_fill(outside, -1)
