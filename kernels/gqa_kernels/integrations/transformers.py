"""Transformers' attention on this package's kernels: `attn_implementation="gqa_kernels"`.

    from gqa_kernels.integrations import transformers as gqa_transformers
    gqa_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="gqa_kernels")

`register` adds two entries to Transformers' public tables, an attention function and the function
that makes its masks, and changes nothing else. Models that use another name are not affected.

**Masks.** Transformers describes a mask by a function of (query, key) and makes it once for all
layers. Instead of a matrix of queries × keys, this module makes a range of keys per query and a
flag per key, as int32 `[batch, 1, n, …]` with n rows:

    n = 1   flags of the keys              with the causal mask (bottom right corner)
    n = 2   first keys, ends of the keys   per query: windows, packed documents, static caches
    n = 3   first keys, ends, flags

or None if the causal mask suffices. The tensor has four dimensions because Transformers passes such
masks on unchanged, also from `generate` into a compiled model.

This covers left and right padding, packed `position_ids` or `cu_seq_lens_q`, sliding and chunked
windows, dynamic and static caches, and every mask function that gives each query one range of keys.
Everything else raises: other mask functions, ready-made four-dimensional masks, dropout, attention
weights as outputs, paged caches. Supports Transformers 4.57 and 5. Continuous batching has an
attention function of its own, in `transformers_paged`.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, or_masks, sdpa_mask

from gqa_kernels.ops.attention import flash_attention, flash_attention_varlen
from gqa_kernels.ops.cache.decode import MAX_NEW_TOKENS, decode_attention
from gqa_kernels.sdpa import autocast

ATTENTION_NAME = "gqa_kernels"
# The number of mask elements that are evaluated at a time when ranges are derived from a mask.
_CHUNK = 2**24
_UNION = or_masks().__code__
# Tensors that layers pass to every attention and that do not affect it.
_IGNORED = (
    "position_ids",
    "cache_position",
    "seq_idx",
    "max_length_q",
    "max_length_k",
    "token_type_ids",
    "labels",
    "shift_labels",
    "num_items_in_batch",
)
_GAPS = "mask_function: expected one range of keys per query; got a custom one with gaps"


def register() -> None:
    """Makes `attn_implementation="gqa_kernels"` known to Transformers; further calls are no-ops."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


class Registration:
    """Calls `register` when it is unpickled, so that a patched model that holds one can be
    unpickled in a process that has not patched a model."""

    def __reduce__(self) -> tuple[Callable[[], "Registration"], tuple]:
        return _registered, ()


def _registered() -> Registration:
    register()
    return Registration()


def attention_mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | Tensor | None = None,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str | None = None,
    cache_position: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """Makes the mask of one kind of layer, with the interface of Transformers' mask factories.

    Args:
        q_length, q_offset: number and first position of the queries; Transformers 4 gives their
            positions as `cache_position` instead.
        kv_length, kv_offset: number and first position of the keys.
        mask_function: (batch, head, query, key) → whether the key is seen.
        attention_mask: bool `[batch, up to kv_offset + kv_length]`: False for padding.
    Returns:
        None, or int32 `[batch, 1, 1 to 3, …]`; see the module.
    Raises:
        NotImplementedError: a custom mask function that gives a query more than one range of keys;
            compiled code cannot raise it and asserts on the device instead.
        ValueError: a causal mask with fewer keys than queries.
    """
    if cache_position is not None:
        queries, q_length = cache_position, cache_position.shape[0]
        # There are as many keys as queries only without a cache, where positions begin at 0.
        aligned = q_length == kv_length and kv_offset == 0
        custom = not allow_is_causal_skip
    else:
        queries = torch.arange(q_length, device=device) + q_offset
        aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        custom = bool(use_vmap)
    shown = _shown_keys(attention_mask, kv_length, kv_offset)
    if shown is not None:
        columns = attention_mask.shape[-1]
        # Without a cache, Transformers 5 takes the number of keys from the mask; 4 would cut or
        # extend the mask.
        if cache_position is not None:
            fits = columns == kv_length or not aligned
        else:
            fits = q_length <= kv_length or mask_function is not causal_mask_function
        if not fits:
            raise ValueError(
                f"attention_mask: expected a column for each of {q_length} tokens; got {columns}"
            )
    if mask_function is causal_mask_function:
        if aligned:
            return None if shown is None else shown[:, None, None].int()
        end = (queries + 1 - kv_offset).expand(batch_size, -1)
        first = torch.zeros_like(end)
    else:
        first, end = _ranges(
            mask_function,
            batch_size,
            queries,
            kv_length,
            kv_offset,
            use_vmap=use_vmap,
            check=custom,
        )
    rows = [first, end]
    if shown is not None:
        # Padding at both ends is outside the ranges, so the kernel skips it.
        keys = torch.arange(kv_length, device=shown.device)
        rows[0] = torch.maximum(first, keys.where(shown, kv_length).amin(-1, keepdim=True))
        rows[1] = torch.minimum(end, (keys + 1).where(shown, 0).amax(-1, keepdim=True))
        rows.append(shown)
    width = max(q_length, 0 if shown is None else kv_length)
    return torch.stack([F.pad(x.int(), (0, width - x.shape[1])) for x in rows], 1)[:, None]


def _shown_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """A 2-D mask as bool `[batch, kv_length]`; keys beyond its end have not been written yet."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    shown = F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    return shown[:, kv_offset : kv_offset + kv_length].bool()


def _ranges(
    mask_function: Callable[..., Tensor],
    batch_size: int,
    queries: Tensor,
    kv_length: int,
    kv_offset: int,
    use_vmap: bool | None,
    *,
    check: bool,
) -> tuple[Tensor, Tensor]:
    """(first, end) `[batch, number of queries]` of the keys that a mask function shows.

    It is evaluated for all pairs, some queries at a time, so the whole matrix is never in memory.
    """
    compiling = torch.compiler.is_compiling()
    # A union of blocks in two places has gaps, even if Transformers made it.
    check = check or compiling or mask_function.__code__ is _UNION
    keys = torch.arange(kv_length, device=queries.device)
    chunks = (queries,)
    if not compiling:  # sizes are numbers
        chunks = queries.split(max(1, _CHUNK // max(1, batch_size * kv_length)))
    firsts, ends = [], []
    for chunk in chunks:
        visible = _visible(mask_function, batch_size, chunk, kv_length, kv_offset, use_vmap)[:, 0]
        firsts.append(keys.where(visible, kv_length).amin(-1))
        ends.append((keys + 1).where(visible, 0).amax(-1))
        if check:
            whole = (visible.sum(-1) == (ends[-1] - firsts[-1]).clamp(min=0)).all()
            if compiling:
                torch._assert_async(whole, _GAPS)
            elif not whole:
                raise NotImplementedError(_GAPS)
    return torch.cat(firsts, 1), torch.cat(ends, 1)


def _visible(
    mask_function: Callable[..., Tensor],
    batch_size: int,
    queries: Tensor,
    kv_length: int,
    kv_offset: int,
    use_vmap: bool | None,
) -> Tensor:
    """The mask as Transformers makes it, bool `[batch, 1, number of queries, kv_length]`."""
    options = {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "allow_is_causal_skip": False,
    }
    if use_vmap is None:  # Transformers 4
        return sdpa_mask(cache_position=queries, allow_torch_fix=False, **options)
    return sdpa_mask(
        q_length=queries.shape[0],
        q_offset=queries[0],
        use_vmap=use_vmap,
        device=queries.device,
        **options,
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes attention with the interface that Transformers' layers call.

    Args:
        query: `[batch, num_q_heads, q_length, head_dim]`; key, value: `[batch, num_kv_heads,
            kv_length, head_dim]`, any strides, never repeated.
        attention_mask: what `attention_mask` made.
        s_aux: sinks, one per head.
        cu_seq_lens_q, cu_seq_lens_k: int32 bounds of packed documents in a batch of one.
    Returns:
        (out `[batch, q_length, num_q_heads, head_dim]`, None).
    Raises:
        NotImplementedError: dropout, a mask that was not made here, attention weights, a paged
            cache, a position bias, any other tensor that may shape attention. Otherwise as
            `flash_attention`.
    """
    refuse_dropout(dropout)
    for name in ("output_attentions", "cache", "position_bias"):
        if others.get(name) is not None and others[name] is not False:
            raise NotImplementedError(f"{name}: expected none with {ATTENTION_NAME}; got one")
    refuse_others(others)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q, k, v = (x.transpose(1, 2) for x in autocast(query, key, value))
    key_ranges, key_mask = _unpack(attention_mask, q.shape[1], k.shape[1])
    # Ranges include causality; flags of keys are combined with the causal mask.
    causal = key_ranges is None and (key_mask is not None or bool(is_causal))
    bounds = None
    if cu_seq_lens_q is not None:
        if key_mask is not None:
            raise NotImplementedError(
                "attention_mask: expected none with cu_seq_lens_q; got one that marks padding"
            )
        bounds = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
        if key_ranges is not None:  # of windows, chunks, positions: intersected with the bounds
            key_ranges, bounds = _within_documents(key_ranges, *bounds), None
    window = None
    if sliding_window is not None and key_ranges is None and (causal or bounds is not None):
        window = (sliding_window - 1, None)
    sinks = None if s_aux is None else s_aux.reshape(-1)
    scores = {"softmax_scale": scaling, "softcap": softcap, "sinks": sinks, "window": window}
    limits = {"key_ranges": key_ranges, "key_mask": key_mask}
    if bounds is not None:
        rows = (x.squeeze(0) for x in (q, k, v))
        out = flash_attention_varlen(*rows, *bounds, causal=bool(is_causal), **scores).unsqueeze(0)
    elif _decodes(q, k, v, causal):
        seq_lens = None if key_ranges is None else key_ranges[:, 0, 1]  # None: all keys
        out = decode_attention(q, k, v, seq_lens, **scores, **limits)
    else:
        out = flash_attention(q, k, v, causal=causal, **scores, **limits)
    return out, None


def refuse_dropout(dropout: float) -> None:
    if dropout:
        raise NotImplementedError(
            f"dropout: expected 0.0; got {dropout}. Set the model's attention_dropout to 0.0"
        )


def refuse_others(others: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Raises if a layer passes a tensor that is not known to leave attention as it is."""
    for name, other in others.items():
        if isinstance(other, Tensor) and name not in _IGNORED and name not in allowed:
            raise NotImplementedError(
                f"{name}: expected no such tensor with {ATTENTION_NAME}; got {list(other.shape)}"
            )


def _unpack(
    mask: Tensor | None, q_length: int, kv_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """(key_ranges, key_mask) of `flash_attention`."""
    if mask is None:
        return None, None
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            "attention_mask: expected none or one that marks padding, [batch, seq_len]; "
            f"got a ready-made mask of {mask.dtype} {list(mask.shape)}"
        )
    rows = mask.shape[2]
    widths = {1: kv_length, 2: q_length, 3: max(q_length, kv_length)}
    if mask.shape[3] != widths.get(rows):
        raise ValueError(
            f"attention_mask: expected one of {q_length} queries and {kv_length} keys, made from "
            f"[batch, {kv_length}]; got {list(mask.shape)}"
        )
    key_ranges = mask[:, 0, :2, :q_length].transpose(1, 2) if rows > 1 else None
    return key_ranges, mask[:, 0, -1, :kv_length] if rows != 2 else None


def _within_documents(key_ranges: Tensor, bounds_q: Tensor, bounds_kv: Tensor) -> Tensor:
    """Limits the ranges of keys to the document of each query; empty after the last document."""
    queries = torch.arange(key_ranges.shape[1], dtype=bounds_q.dtype, device=bounds_q.device)
    document = torch.searchsorted(bounds_q, queries, right=True) - 1
    first = bounds_kv[document]
    end = bounds_kv[(document + 1).clamp(max=bounds_kv.shape[0] - 1)]
    return torch.stack(
        (torch.maximum(key_ranges[..., 0], first), torch.minimum(key_ranges[..., 1], end)), -1
    )


def _decodes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether this is a decode step, few new tokens with a longer cache, for the split-KV
    kernel."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    if q.shape[1] == 1:
        return True
    # Compares the lengths first: without a cache, a compiler then need not specialise on them.
    return causal and q.shape[1] < k.shape[1] and q.shape[1] <= MAX_NEW_TOKENS
