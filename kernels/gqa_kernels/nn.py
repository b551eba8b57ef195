"""The parts of a Llama layer as modules, with the parameters of published checkpoints.

A module takes the tensors that a checkpoint holds under its prefix, by the names they have there:

    RMSNorm    weight                            both, below input_layernorm. and attention_norm., …
    Attention  q_proj, k_proj, v_proj, o_proj    Hugging Face, below self_attn.
               wq, wk, wv, wo                    Meta, below attention.
    SwiGLU     gate_proj, up_proj, down_proj     Hugging Face, below mlp.
               w1, w3, w2                        Meta, below feed_forward.

Modules compute on the backend that they are built with: "triton", the kernels, or "eager", plain
PyTorch on any device.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels.backends import get_backend

__all__ = ["Attention", "RMSNorm", "SwiGLU", "packed_positions", "rope_table"]

_INTS = (torch.int32, torch.int64)
_MAX_NEW_TOKENS = 16  # of one sequence in `decode_attention`

_ATTENTION_NAMES = {
    "hf": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "meta": ("wq", "wk", "wv", "wo"),
}
_SWIGLU_NAMES = {  # gate, up, down
    "hf": ("gate_proj", "up_proj", "down_proj"),
    "meta": ("w1", "w3", "w2"),
}


def rope_table(
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i / head_dim), computed in float64.

    Returns:
        (cos, sin), float32 `[max_seq_len, head_dim / 2]`.
    Raises:
        ValueError: an odd head_dim, or a size that is not positive.
    """
    _check_size("head_dim", head_dim)
    _check_size("max_seq_len", max_seq_len)
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number; got {head_dim}")
    feature = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    position = torch.arange(max_seq_len, dtype=torch.float64, device=device)
    angle = position[:, None] * theta ** (-feature / head_dim)
    return angle.cos().float(), angle.sin().float()


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Positions `[1, total]` of packed tokens: from 0 in every sequence, without a device sync.

    Tokens after the last sequence are at position 0.

    Args:
        cu_seqlens: int32 or int64 `[num_sequences + 1]`, from 0 and never decreasing.
    Raises:
        TypeError, ValueError: cu_seqlens of another kind, dtype or shape.
    """
    _check_tensor("cu_seqlens", cu_seqlens, ("num_sequences + 1",), _INTS)
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens: expected the bounds of one sequence or more; got none")
    row = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1  # never an empty one
    return (row - cu_seqlens[sequence]).masked_fill(row >= cu_seqlens[-1], 0)[None]


class RMSNorm(nn.Module):
    """y = cast(x / sqrt(mean(x²) + eps)) · weight, alone or with the residual add before it.

    Args:
        hidden_size: of the last dimension; up to 16384 on "triton".
        eps: added to the mean square.
        backend: "triton" or "eager".
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
        _check_size("hidden_size", hidden_size)
        self.eps = eps
        ops = get_backend(backend)
        # The functions, not the module: copies and pickles carry them by name.
        self._rms_norm, self._add_rms_norm = ops.rms_norm, ops.add_rms_norm
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y of x; with a residual (y, h): h = x + residual, and y of h, in one pass.

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
        checkpoint_format: "hf" or "meta": whose names the parameters have.
        bias: whether the three projections have one.
        backend: "triton" or "eager".
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
        _check_size("hidden_size", hidden_size)
        _check_size("intermediate_size", intermediate_size)
        self._projections = _projection_names(_SWIGLU_NAMES, checkpoint_format)
        self._swiglu = get_backend(backend).swiglu
        wide, narrow = (hidden_size, intermediate_size), (intermediate_size, hidden_size)
        for name, sizes in zip(self._projections, (wide, wide, narrow), strict=True):
            self.add_module(name, nn.Linear(*sizes, bias, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Of x `[..., hidden_size]`, in its shape."""
        gate, up, down = (getattr(self, name) for name in self._projections)
        return down(self._swiglu(gate(x), up(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, between its four projections.

    Args:
        hidden_size: of the input and the output.
        num_q_heads, num_kv_heads: equal: MHA; num_kv_heads 1: MQA; a divisor between: GQA.
        head_dim: None means hidden_size / num_q_heads.
        checkpoint_format: "hf": Hugging Face's names, and pairs of features (i, i + head_dim / 2)
            that rotate together; "meta": Meta's names and its pairs (2i, 2i + 1). The weights of
            the two differ in the order of q's and k's rows.
        causal, window: as in `flash_attention`. With a cache, causal and without a window.
        bias: whether the four projections have one.
        backend: "triton" or "eager".
    Parameters:
        q_proj.weight `[num_q_heads · head_dim, hidden_size]`, k_proj.weight and v_proj.weight
        `[num_kv_heads · head_dim, hidden_size]`, o_proj.weight `[hidden_size, num_q_heads ·
        head_dim]`; or wq.weight, wk.weight, wv.weight, wo.weight.
    Raises:
        ValueError: a size that is not positive, num_q_heads that are no multiple of num_kv_heads, a
            head_dim that is odd or that does not follow from the sizes, an unknown
            checkpoint_format or backend.
        NotImplementedError: with "triton", a head_dim that is no multiple of 8 up to 256.
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
        _check_size("hidden_size", hidden_size)
        _check_size("num_q_heads", num_q_heads)
        _check_size("num_kv_heads", num_kv_heads)
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads ({num_kv_heads}); "
                f"got {num_q_heads}"
            )
        if head_dim is None:
            if hidden_size % num_q_heads:
                raise ValueError(
                    f"head_dim: expected a number where hidden_size ({hidden_size}) is no multiple "
                    f"of num_q_heads ({num_q_heads}); got None"
                )
            head_dim = hidden_size // num_q_heads
        _check_size("head_dim", head_dim)
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
        self._apply_rope, self._decode_attention = ops.apply_rope, ops.decode_attention
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
        """Attention of x to itself, or to what a cache holds as well.

        Args:
            x: `[batch, seq_len, hidden_size]`; packed sequences are `[1, total, hidden_size]`.
            cos, sin: float32 `[max_seq_len, head_dim / 2]`, from `rope_table`.
            positions: int32 or int64 `[batch, seq_len]`: what RoPE rotates by. None means 0, 1, …
                in every sequence, after those in the cache. It does not move the causal mask.
            cu_seqlens: int32 or int64 `[num_sequences + 1]`, the bounds of packed sequences, from 0
                and never decreasing; none sees another. Without positions, every layer computes
                `packed_positions`.
            kv_cache: (k_cache, v_cache), each `[batch, capacity, num_kv_heads, head_dim]` in the
                projections' dtype. The keys and values of x are **written into them**: without
                seq_lens into rows 0 … seq_len − 1, for sequences that begin here, of any seq_len;
                with seq_lens into the last seq_len rows below it. For inference only.
            seq_lens: int32 or int64 `[batch]`, for 1 to 16 new tokens per sequence: how many tokens
                the cache holds with the new ones, as in `decode_attention`; in [seq_len, capacity].
                It is read on the device, where no error can name it: with a larger one the write
                fails, with a smaller one it wraps to the cache's last rows and outputs have no
                meaning. A position beyond cos and sin gives NaN.
        Returns:
            `[batch, seq_len, hidden_size]`.
        Raises:
            ValueError, TypeError: an argument of another shape, dtype or device, seq_lens without a
                cache, positions or cu_seqlens with one.
            NotImplementedError: with a cache: a gradient, a window, attention that is not causal,
                more than 16 new tokens with seq_lens.
        """
        _check_tensor("x", x, ("batch", "seq_len", self.hidden_size))
        if kv_cache is not None:
            self._check_cache(x, positions, cu_seqlens, kv_cache, seq_lens)
        elif seq_lens is not None:
            raise ValueError("seq_lens: expected None without kv_cache; got a tensor")
        if cu_seqlens is not None:
            _check_tensor("x", x, (1, "total", self.hidden_size))
        if positions is None and cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, x.shape[1])
        if seq_lens is not None:
            steps = torch.arange(-x.shape[1], 0, dtype=seq_lens.dtype, device=seq_lens.device)
            positions = seq_lens[:, None] + steps

        q, k, v, o = (getattr(self, name) for name in self._projections)
        # [batch, seq_len, num_heads, head_dim]
        q = q(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = k(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = v(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        q, k = self._apply_rope(q, k, cos, sin, positions, interleaved=self.rope_interleaved)
        if kv_cache is not None:
            _write(kv_cache, k, v, positions)
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
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        seq_lens: Tensor | None,
    ) -> None:
        """Before anything is written: what the ops cannot check, or would check too late."""
        for name, value in (("positions", positions), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ValueError(f"{name}: expected None with kv_cache; got a tensor")
        if self.window is not None or not self.causal:
            raise NotImplementedError(
                "kv_cache: expected causal attention without a window; got "
                f"causal={self.causal}, window={self.window}"
            )
        if torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        ):
            raise NotImplementedError(
                "kv_cache: expected a call without a gradient (under torch.no_grad()); got x or "
                "parameters that require one"
            )
        batch, seq_len, _ = x.shape
        if not isinstance(kv_cache, tuple | list) or len(kv_cache) != 2:
            raise TypeError(f"kv_cache: expected (k_cache, v_cache); got {type(kv_cache).__name__}")
        shape = (batch, "capacity", self.num_kv_heads, self.head_dim)
        for name, cache in zip(("k_cache", "v_cache"), kv_cache, strict=True):
            _check_tensor(name, cache, shape)
            shape = tuple(cache.shape)  # of the second as of the first
            if cache.stride(-1) != 1:
                raise ValueError(
                    f"{name}: expected contiguous features; got strides {cache.stride()}"
                )
        capacity = shape[1]
        if seq_len > capacity:
            raise ValueError(f"x: expected seq_len up to the cache's {capacity}; got {seq_len}")
        if seq_lens is None:
            return
        _check_tensor("seq_lens", seq_lens, (batch,), _INTS)
        if seq_len > _MAX_NEW_TOKENS:
            raise NotImplementedError(
                f"x: expected a seq_len of 1 to {_MAX_NEW_TOKENS} with seq_lens; got {seq_len}"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A buffer that early checkpoints of Hugging Face hold; it follows from theta.
        state_dict.pop(f"{prefix}rotary_emb.inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, rope_interleaved={self.rope_interleaved}"
        )


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int; got {value!r}")


def _check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """A string in a shape stands for any size. What the ops take they check themselves."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}; got {value.dtype}")
    if value.dim() != len(shape) or any(
        not isinstance(want, str) and got != want
        for got, want in zip(value.shape, shape, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{wanted}]; got {list(value.shape)}")


def _projection_names(table: dict[str, tuple[str, ...]], checkpoint_format: str) -> tuple[str, ...]:
    if checkpoint_format not in table:
        raise ValueError(
            f"checkpoint_format: expected one of {', '.join(table)}; got {checkpoint_format!r}"
        )
    return table[checkpoint_format]


def _write(kv_cache: tuple[Tensor, Tensor], k: Tensor, v: Tensor, positions: Tensor | None) -> None:
    k_cache, v_cache = kv_cache
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        # An assignment would cast and copy in silence.
        if cache.dtype != k.dtype:
            raise TypeError(f"{name}: expected the new keys' dtype {k.dtype}; got {cache.dtype}")
        if cache.device != k.device:
            raise ValueError(f"{name}: expected x's device {k.device}; got {cache.device}")
    if positions is None:
        k_cache[:, : k.shape[1]] = k
        v_cache[:, : v.shape[1]] = v
    else:
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        k_cache[row, positions] = k
        v_cache[row, positions] = v
