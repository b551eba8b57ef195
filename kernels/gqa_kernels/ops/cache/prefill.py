"""Prefill attention: any number of new tokens of each sequence over its key/value cache.

    out = softmax(softmax_scale · q kᵀ) v   over the first seq_lens[b] entries of the cache

The new tokens of all sequences are packed one after another, as in `flash_attention_varlen`; the
cache is laid out as in `decode_attention`. One launch computes chunks of prompts whose beginning is
cached, prompts that share a cached prefix, drafted tokens and decode steps, in one batch.

An item of work is a block of rows of one sequence and one key/value head: its new tokens × the
query heads that read that head, so K and V are read once for all heads of a group. The rows walk
the key tiles that they see, from the first to the last, with the online softmax of flash attention
(Dao 2023, arXiv:2307.08691). Only the tiles that some row does not see entirely are masked. Keys in
pages are read in place, never gathered.

The keys of a sequence with at most PREFILL_SPLIT_TOKENS = 64 new tokens are split (Dao et al. 2023,
"Flash-Decoding for long-context inference"), so that a decode step over a long cache does not
determine the time of a batch: an item is a block of rows with the keys of one split. Splits begin
at multiples of 2048 keys of the sequence. Several programs share a sequence's items and publish
partial results, and the one that finishes last combines them in the order of the splits, so one
launch suffices. A longer sequence has blocks of rows enough to fill a GPU; a program walks all keys
that its block sees.

Key tiles begin at multiples of the tile's size in the sequence; a tile or a split in which a row
sees no key does not change that row. Therefore the bits of a row's result do not depend on the
other sequences of the batch, the paging, the capacity and the number of programs. Nor do they
depend on the other new tokens of the sequence, with two exceptions:

- A row that sees keys on both sides of a multiple of 2048 has other bits in a call with at most 64
  new tokens of its sequence than in one with more. To merge at the same keys, a block of a longer
  sequence would need a second accumulator, for which there are no registers.
- In a cache with scales per token, weights are divided by the largest scale of a tile, which may be
  that of a later key.

All this assumes that a matrix product computes all rows of a tile in the same way, as tensor cores
do.

Partial results take 4 · (head_dim + 1) bytes for each new token, query head and split of the
capacity, of as many new tokens as there are, at most 64 of each sequence; nothing if the capacity
is at most 2048.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gqa_kernels.ops.cache import counters
from gqa_kernels.ops.cache.prefill_kernel import _prefill_kernel
from gqa_kernels.primitives import packed
from gqa_kernels.runtime import checks, configs, launch, layout, library, target

_launch_prefill = launch.launcher(_prefill_kernel)


class _Splits(NamedTuple):
    """Programs and memory for sequences whose keys are split."""

    programs_per_sequence: int  # and key/value head
    num_slots: int  # the most splits of a sequence
    num_tokens: int  # whose partial results are kept; 0 where no sequence has two splits
    tokens_per_sequence: int  # in that memory; 0: the tokens lie there as they do in q
    num_counters: int


def _plan_splits(
    sizes: tuple[int, int, int, int],
    capacity: int,
    window_left: int | None,
    config: configs.PrefillConfig,
) -> _Splits:
    """Bounds what the lengths on the device may ask for. No bits depend on the plan."""
    total_q, num_sequences, num_kv_heads, group_size = sizes
    most_tokens = min(configs.PREFILL_SPLIT_TOKENS, total_q)
    reach = capacity  # the largest number of keys in the splits of a sequence
    if window_left is not None:
        reach = min(capacity, window_left + most_tokens + config.split_keys - 1)
    num_slots = layout.cdiv(reach, config.split_keys)
    num_items = layout.cdiv(most_tokens * group_size, config.block_m) * num_slots
    num_programs = configs.PREFILL_PROGRAMS_PER_SM * target.current().num_sms
    programs_per_sequence = min(
        num_items, max(1, layout.cdiv(num_programs, num_sequences * num_kv_heads))
    )
    by_sequence = num_sequences * most_tokens < total_q
    num_tokens = num_sequences * most_tokens if by_sequence else total_q
    num_blocks = layout.cdiv(configs.PREFILL_SPLIT_TOKENS * group_size, config.block_m)
    return _Splits(
        programs_per_sequence,
        num_slots,
        num_tokens if num_slots > 1 else 0,
        most_tokens if by_sequence else 0,
        num_sequences * num_kv_heads * num_blocks,
    )


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    q, k_cache, v_cache = map(layout.contiguous_features, (q, k_cache, v_cache))
    total_q, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    capacity = layout.cache_capacity(k_cache, block_table)
    num_sequences = cu_seqlens_q.shape[0] - 1
    lse_shape = num_q_heads, total_q
    if total_q == 0 or capacity == 0 or num_sequences == 0:
        none_seen = None
        if need_lse:
            none_seen = torch.full(lse_shape, -float("inf"), dtype=torch.float32, device=q.device)
            if sinks is not None:
                none_seen.copy_(sinks[:, None])
        return q.new_zeros(q.shape), none_seen
    cu_seqlens_q, sinks, alibi_slopes = (
        None if x is None else x.contiguous() for x in (cu_seqlens_q, sinks, alibi_slopes)
    )
    softmax_scale = checks.softmax_scale(softmax_scale, head_dim)
    farthest = capacity + total_q  # no key is further away from a query
    window_left, window_right = (
        None if side is None else min(side, farthest) for side in (window_left, window_right)
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = None
    if need_lse:
        lse = torch.empty(*lse_shape, dtype=torch.float32, device=q.device)
    group_size = num_q_heads // num_kv_heads
    block_d = max(16, layout.power_of_2(head_dim))
    with target.device_of(q):
        config = configs.prefill_config(
            target.current().arch, q.element_size(), k_cache.element_size(), head_dim
        )
        plan = _plan_splits(
            (total_q, num_sequences, num_kv_heads, group_size), capacity, window_left, config
        )
        num_partials = plan.num_tokens * num_q_heads, plan.num_slots
        partial = torch.empty(*num_partials, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(num_partials, dtype=torch.float32, device=q.device)
        num_blocks = packed.num_blocks(total_q * group_size, num_sequences, config.block_m)
        num_programs = (plan.programs_per_sequence * num_sequences + num_blocks) * num_kv_heads
        _launch_prefill(
            (num_programs,),
            q_ptr=q,
            k_ptr=k_cache,
            v_ptr=v_cache,
            cu_seqlens_q_ptr=cu_seqlens_q,
            seq_lens_ptr=seq_lens,
            block_table_ptr=block_table,
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            sinks_ptr=sinks,
            alibi_slopes_ptr=alibi_slopes,
            out_ptr=out,
            lse_ptr=lse,
            partial_ptr=partial,
            partial_lse_ptr=partial_lse,
            counters_ptr=counters.zeroed(plan.num_counters, q.device),
            q_strides=q.stride()[:2],
            k_strides=k_cache.stride()[:3],
            v_strides=v_cache.stride()[:3],
            seq_lens_stride=0 if seq_lens is None else seq_lens.stride(0),
            block_table_strides=None if block_table is None else block_table.stride(),
            k_scale_strides=None if k_scale is None else k_scale.stride(),
            v_scale_strides=None if v_scale is None else v_scale.stride(),
            alibi_stride=None if alibi_slopes is None else layout.sequence_stride(alibi_slopes),
            num_sequences=num_sequences,
            programs_per_sequence=plan.programs_per_sequence,
            partial_tokens=plan.tokens_per_sequence,
            total_q=total_q,
            capacity=capacity,
            num_pages=k_cache.shape[0],
            num_slots=plan.num_slots,
            window_left=window_left,
            window_right=window_right,
            score_unit=softmax_scale if softcap is None else float(softcap),
            cap_scale=None if softcap is None else softmax_scale / softcap,
            NUM_KV_HEADS=num_kv_heads,
            GROUP_SIZE=group_size,
            HEAD_DIM=head_dim,
            PAGE_SIZE=1 if block_table is None else k_cache.shape[1],
            SCALE_PER_TOKEN=k_scale is not None and k_scale.dim() == 3,
            SPLIT_TOKENS=configs.PREFILL_SPLIT_TOKENS,
            SPLIT_KEYS=config.split_keys,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            BLOCK_R=min(config.block_m, configs.PREFILL_COMBINE_FEATURES // block_d),
            BLOCK_S=configs.PREFILL_COMBINE_SPLITS,
            BLOCK_LSE=configs.PREFILL_COMBINE_LSE,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    checks.tensor("q", q, shape=("total_q", "num_q_heads", "head_dim"))
    _, num_q_heads, head_dim = q.shape
    like = ("q", q)
    ints = {"dtypes": checks.INTS, "like": like}
    checks.tensor("cu_seqlens_q", cu_seqlens_q, shape=("batch + 1",), **ints)
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0:
        raise ValueError("cu_seqlens_q: expected shape [batch + 1]; got [0]")
    if block_table is None:
        shape = (batch, "max_seq_len", "num_kv_heads", head_dim)
    else:
        shape = ("num_pages", "page_size", "num_kv_heads", head_dim)
    checks.kv_caches(k_cache, v_cache, k_scale, v_scale, shape=shape, like=like)
    if seq_lens is not None:
        checks.tensor("seq_lens", seq_lens, shape=(batch,), **ints)
    if block_table is not None:
        checks.block_table(block_table, batch, k_cache.shape[1], like=like)
    checks.attention_heads(num_q_heads, k_cache.shape[2], head_dim, multiple=1)
    checks.softcap(softcap, checks.softmax_scale(softmax_scale, head_dim))
    checks.window((window_left, window_right))
    checks.head_terms(sinks, alibi_slopes, batch, num_q_heads, like=like)


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    total_q, num_q_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((num_q_heads, total_q), dtype=torch.float32)


_PREFILL_ATTENTION = library.Op(
    "prefill_attention",
    _forward,
    _fake,
    check=check,
    refuse=library.refuse_gradient("prefill into a cache"),
)


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor | None,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of any number of new tokens of each sequence over its cache; see
    `reference.prefill_attention`.

    The keys of sequences with at most 64 new tokens are split among programs, by lengths on the
    device. Row for row, the bits do not depend on the other sequences, the paging and the capacity;
    the module's docstring says how they depend on the sequence's own number of new tokens.

    Args:
        q: float32, float16 or bfloat16 `[total_q, num_q_heads, head_dim]`, head_dim up to 256;
            any strides. Where head_dim is no multiple of 8, features are read one by one, which is
            slow.
        k_cache, v_cache: `[batch, max_seq_len, num_kv_heads, head_dim]`, or with a block_table
            `[num_pages, page_size, num_kv_heads, head_dim]`, page_size a power of two; q's dtype,
            or both float8_e4m3fn or int8; any strides with contiguous features.
        cu_seqlens_q: int32 or int64 `[batch + 1]`, from 0 and never decreasing. The kernel reads
            the bounds on the device, so the caller needs to know no maximum length. Bounds beyond
            total_q count as total_q; decreasing bounds give undefined rows. Sequences may have no
            new token.
        seq_lens: int32 or int64 `[batch]` in [0, capacity], the new tokens included; capacity is
            max_seq_len, or max_pages · page_size. The kernel reads them on the device; a length
            above the capacity counts as the capacity. None: every sequence has length capacity.
        block_table: int32 `[batch, max_pages]`. Entries beyond a length are not used; the keys of
            an entry outside [0, num_pages) count as hidden.
        k_scale, v_scale: float32 `[num_kv_heads]` or `[*k_cache.shape[:2], num_kv_heads]`, for
            float8_e4m3fn and int8 caches only.
        causal: a new token sees entries up to its own; False: all entries of its sequence.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        window, softcap, sinks: as in `flash_attention`.
        alibi_slopes: float32 `[num_q_heads]` or `[batch, num_q_heads]`.
        return_lse: also return the natural-log lse, float32 `[num_q_heads, total_q]`.
    Returns:
        out `[total_q, num_q_heads, head_dim]`, contiguous, or (out, lse). For a query that sees no
        key, such as one after the last sequence, out is 0 and lse is −inf or its sink.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: a head_dim above 256, a page_size that is no power of two, a
            float8_e4m3fn cache on a GPU without that type, or an input that requires a gradient.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    return_lse = checks.flag("return_lse", return_lse)
    softmax_scale = checks.optional_number("softmax_scale", softmax_scale)
    softcap = checks.optional_number("softcap", softcap)
    window_left, window_right = checks.window(window)
    window_right = 0 if checks.flag("causal", causal) else window_right
    if not isinstance(cu_seqlens_q, Tensor):
        raise TypeError(f"cu_seqlens_q: expected a torch.Tensor; got {type(cu_seqlens_q).__name__}")
    out, lse = _PREFILL_ATTENTION(
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, k_scale, v_scale,
        softmax_scale, window_left, window_right, softcap, sinks, alibi_slopes,
        need_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
