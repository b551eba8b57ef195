"""torch's scaled_dot_product_attention on this package's flash attention."""

import re

import torch
from torch import Tensor

from gqa_kernels.ops import attention
from gqa_kernels.runtime import checks


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · query keyᵀ) value, as torch.nn.functional.scaled_dot_product_attention.

    Batch and head dimensions of size 1 are broadcast, as in torch.

    Args:
        query: float32, float16 or bfloat16 `[batch, num_q_heads, seq_len_q, head_dim]`, any
            strides, or `[batch, seq_len_q, head_dim]`; head_dim a multiple of 8 up to 256.
        key, value: the same dtype, `[batch, num_kv_heads, seq_len_kv, head_dim]`, or
            `[batch, seq_len_kv, head_dim]`.
        attn_mask: None.
        dropout_p: 0.0.
        is_causal: query i sees keys j ≤ i: the mask is aligned to the top left corner, also if
            lengths differ; that of `flash_attention` is aligned to the bottom right corner.
        scale: positive; None means 1 / sqrt(head_dim).
        enable_gqa: num_q_heads is a multiple of num_kv_heads, and query head h reads head
            h // (num_q_heads / num_kv_heads). In three dimensions, the first is then the heads.
    Returns:
        out of query's shape and dtype; `out.transpose(1, 2)` is contiguous.
    Numerics: as in `flash_attention`. Under torch.autocast inputs are cast to its dtype.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: a mask, dropout, another head_dim, another number of dimensions.
        RuntimeError: query is not on a GPU that Triton drives.
    Source: PyTorch's documentation of torch.nn.functional.scaled_dot_product_attention.
    """
    if attn_mask is not None:
        raise NotImplementedError(
            f"attn_mask: expected None; got {type(attn_mask).__name__}. Use is_causal, or "
            "flash_attention's causal, window and alibi_slopes; flash_attention_varlen for padding"
        )
    if checks.number("dropout_p", dropout_p) != 0.0:
        raise NotImplementedError(f"dropout_p: expected 0.0; got {dropout_p!r}")
    checks.flag("is_causal", is_causal)
    checks.flag("enable_gqa", enable_gqa)
    if scale is not None and not checks.number("scale", scale) > 0.0:
        raise ValueError(f"scale: expected a positive number, or None; got {scale!r}")
    query, key, value = autocast(query, key, value)
    query, key, value = _broadcast(query, key, value, enable_gqa)
    window = None
    if is_causal:
        seq_len_q, seq_len_kv = query.shape[-2], key.shape[-2]
        if seq_len_q < seq_len_kv:  # no query sees the remaining keys
            key, value = key[..., :seq_len_q, :], value[..., :seq_len_q, :]
        # Query i is aligned with key i + seq_len_kv − seq_len_q and sees keys up to i.
        window = (None, seq_len_q - seq_len_kv if seq_len_q > seq_len_kv else 0)
    without_heads = query.dim() == 3
    heads = 0 if enable_gqa else 1  # the missing dimension is the batch, or the heads
    if without_heads:
        query, key, value = (x.unsqueeze(heads) for x in (query, key, value))
    parts = (x.transpose(1, 2) for x in (query, key, value))
    if torch.compiler.is_compiling():
        out = attention.flash_attention(*parts, softmax_scale=scale, window=window)
    else:
        try:
            out = attention.flash_attention(*parts, softmax_scale=scale, window=window)
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise _in_own_words(error) from error
    out = out.transpose(1, 2)
    return out.squeeze(heads) if without_heads else out


def _in_own_words(error: Exception) -> Exception:
    """Returns the kernel's error with the argument names of this function."""
    names = {"q": "query", "k": "key", "v": "value", "softmax_scale": "scale"}
    pattern = r"\b(?:[qkv](?=: |'s )|softmax_scale\b)"
    return type(error)(re.sub(pattern, lambda name: names[name[0]], str(error)))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors to the dtype of torch.autocast if it is active, as torch's own function does;
    float64 is not cast."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in checks.FLOATS else x for x in tensors
    )


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tensors with equal batches and heads, but keeps a single key/value head as it is.

    Raises:
        TypeError, ValueError, NotImplementedError: what `flash_attention` would check under other
            names.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
        checks.same_dtype(name, x, "query", query)
    if query.dim() not in (3, 4):
        raise NotImplementedError(
            f"query: expected 3 or 4 dimensions; got {query.dim()}. Flatten the batch dimensions"
        )
    given = tuple(key.shape)
    if key.dim() == value.dim() == query.dim() == 4:
        batch = max(query.shape[0], key.shape[0], value.shape[0])
        num_kv_heads = max(key.shape[1], value.shape[1])
        query = _expanded(query, batch, query.shape[1] if enable_gqa else num_kv_heads)
        key, value = (_expanded(x, batch, num_kv_heads) for x in (key, value))
    *batch, num_heads, _, head_dim = query.shape
    same_heads = key.shape[-3] == num_heads or (query.dim() == 4 and key.shape[-3] == 1)
    rest = key.dim() == query.dim() and key.shape[-1] == head_dim and list(key.shape[:-3]) == batch
    if not rest or not (enable_gqa or same_heads):
        heads = "num_kv_heads" if enable_gqa else num_heads
        wanted = ", ".join(map(str, (*batch, heads, "seq_len_kv", head_dim)))
        hint = ". Fewer key/value heads need enable_gqa=True" if rest else ""
        raise ValueError(f"key: expected shape [{wanted}]; got {list(given)}{hint}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {list(key.shape)}; got {list(value.shape)}")
    return query, key, value


def _expanded(x: Tensor, batch: int, heads: int) -> Tensor:
    """Returns x with a batch or heads of size 1 expanded, without a copy."""
    sizes = [want if have == 1 else -1 for have, want in zip(x.shape, (batch, heads), strict=False)]
    return x.expand(*sizes, -1, -1) if sizes != [-1, -1] else x
