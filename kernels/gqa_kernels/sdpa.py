"""torch's scaled_dot_product_attention on this package's flash attention."""

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

    Nothing is broadcast: batches are equal, and heads unless `enable_gqa`.

    Args:
        query: float32, float16 or bfloat16 `[batch, num_q_heads, seq_len_q, head_dim]`, any
            strides, or `[batch, seq_len_q, head_dim]`; head_dim a multiple of 8 up to 256.
        key, value: the same dtype, `[batch, num_kv_heads, seq_len_kv, head_dim]`, or
            `[batch, seq_len_kv, head_dim]`.
        attn_mask: None.
        dropout_p: 0.0.
        is_causal: query i sees keys j ≤ i, from the top left corner also where lengths differ;
            `flash_attention` begins in the bottom right corner.
        scale: positive; None means 1 / sqrt(head_dim).
        enable_gqa: num_q_heads is a multiple of num_kv_heads, and query head h reads head
            h // (num_q_heads / num_kv_heads). With three dimensions the first is then the heads.
    Returns:
        out of query's shape and dtype: a view of a contiguous tensor whose second and third
        dimensions are exchanged, so that `out.transpose(1, 2)` is contiguous.
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
    _check(query, key, value, enable_gqa)
    window = None
    if is_causal:
        seq_len_q, seq_len_kv = query.shape[-2], key.shape[-2]
        if seq_len_q < seq_len_kv:  # no query sees the rest
            key, value = key[..., :seq_len_q, :], value[..., :seq_len_q, :]
        # Query i stands on key i + seq_len_kv − seq_len_q and sees keys up to i.
        window = (None, seq_len_q - seq_len_kv if seq_len_q > seq_len_kv else 0)
    without_heads = query.dim() == 3
    heads = 0 if enable_gqa else 1  # the dimension that is missing is the batch, or the heads
    if without_heads:
        query, key, value = (x.unsqueeze(heads) for x in (query, key, value))
    out = attention.flash_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scale,
        window=window,
    ).transpose(1, 2)
    return out.squeeze(heads) if without_heads else out


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast its dtype, as torch's own function does; float64 stays."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in checks.FLOATS else x for x in tensors
    )


def _check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """What `flash_attention` would check under other names."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
        checks.same_dtype(name, x, "query", query)
    if query.dim() not in (3, 4):
        raise NotImplementedError(
            f"query: expected 3 or 4 dimensions; got {query.dim()}. Flatten those before the heads"
        )
    *batch, num_heads, _, head_dim = query.shape
    if (
        key.dim() != query.dim()
        or key.shape[-1] != head_dim
        or list(key.shape[:-3]) != batch
        or (not enable_gqa and key.shape[-3] != num_heads)
    ):
        heads = "num_kv_heads" if enable_gqa else num_heads
        wanted = ", ".join(map(str, (*batch, heads, "seq_len_kv", head_dim)))
        hint = "" if enable_gqa else ". Fewer heads need enable_gqa=True"
        raise ValueError(f"key: expected shape [{wanted}]; got {list(key.shape)}{hint}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {list(key.shape)}; got {list(value.shape)}")
