"""Transformers' attention on this package's kernels: `attn_implementation="gqa_kernels"`.

    from gqa_kernels.integrations import transformers as gqa_transformers
    gqa_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="gqa_kernels")

`register` adds two entries to Transformers' public tables, an attention function and the function
that makes its masks, and changes nothing else; models that do not ask for the name are untouched.

**Masks.** Transformers describes a mask by a function of (query, key), and makes it once for all
layers. Instead of a matrix of queries × keys, this module makes a range of keys per query and a
flag per key, int32 `[batch, 1, n, …]`, of which row by row

    n = 1   flags of the keys              beside the causal mask, whose corner is bottom right
    n = 2   first keys, ends of the keys   per query: windows, packed documents, static caches
    n = 3   first keys, ends, flags

and None where the causal mask is all there is. Four dimensions are what Transformers hands on
unchanged, from `generate` into a compiled model too.

Left and right padding, packed `position_ids` or `cu_seq_lens_q`, sliding and chunked windows,
dynamic and static caches are covered by that, and every mask function whose keys are one range per
query. What is not raises: other mask functions, ready-made four-dimensional masks, dropout,
attention weights as outputs, paged caches. Transformers 4.57 and 5.
"""

from collections.abc import Callable
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
# Elements of a mask that are looked at together when its ranges are read off.
_CHUNK = 2**24
_UNION = or_masks().__code__
# Tensors that layers hand down to every attention and that change nothing in it.
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
    """Makes `attn_implementation="gqa_kernels"` known to Transformers; again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


class Registration:
    """Registers wherever it is loaded: a patched model that carries one can be unpickled in a
    process that patched none."""

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
    """The mask of one kind of layer, as Transformers' mask factories ask for it.

    Args:
        q_length, q_offset: number and first position of the queries; Transformers 4 gives their
            positions as `cache_position` instead.
        kv_length, kv_offset: number and first position of the keys.
        mask_function: (batch, head, query, key) → whether the key is seen.
        attention_mask: bool `[batch, up to kv_offset + kv_length]`: False for padding.
    Returns:
        None, or int32 `[batch, 1, 1 to 3, …]`; see the module.
    Raises:
        NotImplementedError: a custom mask function under which a query sees more than one range
            of keys; compiled code, which cannot raise it, asserts that on the device.
        ValueError: a causal mask with fewer keys than queries.
    """
    if cache_position is not None:
        queries, q_length = cache_position, cache_position.shape[0]
        # Without a cache the positions begin at 0, and only then are there as many keys.
        aligned = q_length == kv_length and kv_offset == 0
        custom = not allow_is_causal_skip
    else:
        queries = torch.arange(q_length, device=device) + q_offset
        aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        custom = bool(use_vmap)
    shown = _shown_keys(attention_mask, kv_length, kv_offset)
    if shown is not None:
        columns = attention_mask.shape[-1]
        # Without a cache Transformers 5 counts the keys by the mask; 4 would cut or lengthen it.
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
        # What is padding at either end needs no visit.
        keys = torch.arange(kv_length, device=shown.device)
        rows[0] = torch.maximum(first, keys.where(shown, kv_length).amin(-1, keepdim=True))
        rows[1] = torch.minimum(end, (keys + 1).where(shown, 0).amax(-1, keepdim=True))
        rows.append(shown)
    width = max(q_length, 0 if shown is None else kv_length)
    return torch.stack([F.pad(x.int(), (0, width - x.shape[1])) for x in rows], 1)[:, None]


def _shown_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool `[batch, kv_length]` of a 2-D mask, which ends where nothing has been written yet."""
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

    It is asked for all pairs, some queries at a time, so that no matrix of them is kept.
    """
    compiling = torch.compiler.is_compiling()
    # A union may have gaps even if Transformers made it, of blocks that are in two places.
    check = check or compiling or mask_function.__code__ is _UNION
    keys = torch.arange(kv_length, device=queries.device)
    chunks = (queries,)
    if not compiling:  # whose sizes are numbers
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
    """bool `[batch, 1, number of queries, kv_length]`, made by Transformers."""
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
    """Attention as Transformers' layers call it.

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
    if dropout:
        raise NotImplementedError(
            f"dropout: expected 0.0; got {dropout}. Set the model's attention_dropout to 0.0"
        )
    for name in ("output_attentions", "cache", "position_bias"):
        if others.get(name) is not None and others[name] is not False:
            raise NotImplementedError(f"{name}: expected none with {ATTENTION_NAME}; got one")
    for name, other in others.items():
        if isinstance(other, Tensor) and name not in _IGNORED:
            raise NotImplementedError(
                f"{name}: expected no such tensor with {ATTENTION_NAME}; got {list(other.shape)}"
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q, k, v = (x.transpose(1, 2) for x in autocast(query, key, value))
    key_ranges, key_mask = _unpack(attention_mask, q.shape[1], k.shape[1])
    # Ranges say everything; flags of keys stand beside the causal mask.
    causal = key_ranges is None and (key_mask is not None or bool(is_causal))
    bounds = None
    if cu_seq_lens_q is not None:
        if key_mask is not None:
            raise NotImplementedError(
                "attention_mask: expected none beside cu_seq_lens_q; got one that marks padding"
            )
        bounds = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
        if key_ranges is not None:  # of windows, chunks, positions: both hold
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
    """Ranges of keys cut to the document of each query; none after the last document."""
    queries = torch.arange(key_ranges.shape[1], dtype=bounds_q.dtype, device=bounds_q.device)
    document = torch.searchsorted(bounds_q, queries, right=True) - 1
    first = bounds_kv[document]
    end = bounds_kv[(document + 1).clamp(max=bounds_kv.shape[0] - 1)]
    return torch.stack(
        (torch.maximum(key_ranges[..., 0], first), torch.minimum(key_ranges[..., 1], end)), -1
    )


def _decodes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether few new tokens meet a cache: then the keys are split among programs."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    if q.shape[1] == 1:
        return True
    # The lengths' order first: without a cache a compiler then need not know them.
    return causal and q.shape[1] < k.shape[1] and q.shape[1] <= MAX_NEW_TOKENS
