"""Transformers' continuous batching (`generate_batch`, `init_continuous_batching`) on this package.

Its manager runs a model on packed rows, one after another, with a cache of pages that all requests
share. `patch` puts a function that calls `init_continuous_batching` below in the place of a model's
own method. The manager that it returns differs from Transformers':

    attention   while the manager is in use, the model's config names `attention_forward` below.
                The manager makes no masks for a name that contains "flash" and gives bounds.
    cache       keys of full attention stay in their pages: `prefill_attention` reads them through a
                block table and, if each request has one new token, `decode_attention`. For
                Transformers' own functions, the cache gathers the keys of each batch.
    decoding    the manager passes block tables instead of an index per key whenever all requests
                of a batch decode; Transformers does so only with flash-attn on a GPU.

Keys in a sliding window are gathered by the cache, as for Transformers' functions: it keeps them in
a ring, and the new keys of a longer chunk overwrite old ones that its first queries see. A batch
without cached keys reads none: `flash_attention_varlen` computes it from the new keys.

Importing this module needs the caches of Transformers 5.20 or newer.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, ContinuousBatchingConfig
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    PagedAttentionCache,
)
from transformers.generation.continuous_batching.cache import (
    ATTN_TYPE_TO_ALLOCATOR,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.initialization import (
    resolve_using_hints,
    resolve_without_hints,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from gqa_kernels.integrations.transformers import ATTENTION_NAME, refuse_dropout, refuse_others
from gqa_kernels.ops.attention import flash_attention_varlen
from gqa_kernels.ops.cache.decode import decode_attention
from gqa_kernels.ops.cache.prefill import prefill_attention
from gqa_kernels.sdpa import autocast

PAGED_NAME = f"{ATTENTION_NAME}_paged_flash"
# What the manager passes to every layer, beside what `attention_forward` names.
_BATCH = ("logits_indices", "logits_processor_args", "logits_to_keep", "block_table")
_PAGES = ("k_cache", "v_cache", "seq_lens", "cu_seq_lens_k")


class Cache(PagedAttentionCache):
    """Transformers' cache, which leaves the keys of full attention in their pages."""

    _known: tuple[Tensor, bool, tuple[Tensor, ...]] | None = None

    @torch.compiler.disable  # as the original: the caches are views of one tensor
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values of a layer.

        Args:
            key_states, value_states: `[1, num_kv_heads, total_q, head_dim]`.
            kwargs: what the manager passes to the layer. For full attention over cached keys,
                `k_cache` and `v_cache` `[num_pages, page_size, num_kv_heads, head_dim]`,
                `block_table` and `seq_lens` become those of the layer. Otherwise `cu_seq_lens_k`
                becomes the bounds of what is returned.
        Returns:
            The arguments if `kwargs` has pages or if nothing was cached before; otherwise the keys
            and values of all requests, gathered.
        """
        allocator = self.layer_to_allocator[layer_idx]
        indexed = kwargs.get("block_table") is None
        read_index = kwargs["read_index"][allocator.index]
        if not allocator.supports_block_table or (indexed and read_index.numel() == 0):
            return super().update(key_states, value_states, layer_idx, kwargs)
        write_index, block_table, seq_lens = self._places(allocator, read_index, kwargs)
        kwargs["block_table"], kwargs["seq_lens"] = block_table, seq_lens
        kwargs["k_cache"], kwargs["v_cache"] = allocator.get_cache_for_block_table(layer_idx)
        new = (x.squeeze(0).transpose(0, 1) for x in (key_states, value_states))
        allocator.update(*new, layer_idx, read_index[:0], write_index)  # reads nothing back
        return key_states, value_states

    def _places(
        self, allocator: CacheAllocator, read_index: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(write_index, block_table, seq_lens) of a batch, computed once for all layers."""
        given = kwargs.get("block_table")
        batch = read_index if given is None else given
        # A CUDA graph has to compute them too, though the batch was run once before its capture.
        capturing = batch.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._known is not None and self._known[0] is batch and self._known[1] == capturing:
            return self._known[2]
        bounds = kwargs["cu_seq_lens_k"][allocator.layer_type]
        seq_lens, page_size = bounds.diff(), allocator.tokens_per_page
        if given is None:
            write_index = kwargs["write_index"][allocator.index]
            longest = kwargs["max_length_k"][allocator.layer_type]
            block_table = block_table_of(read_index, bounds, longest, page_size)
        else:
            block_table = given[allocator.index]
            entry = seq_lens.long() - 1  # of the one new token; −1 in a row of padding
            page = block_table.long().gather(1, (entry.clamp(min=0) // page_size)[:, None])[:, 0]
            write_index = page * page_size + entry % page_size
            write_index = write_index.masked_fill(entry < 0, allocator.write_trash_index)
        self._known = batch, capturing, (write_index, block_table, seq_lens)
        return self._known[2]


def block_table_of(read_index: Tensor, bounds: Tensor, longest: int, page_size: int) -> Tensor:
    """Returns the pages of each sequence, int32 `[batch, ceil(longest / page_size)]`.

    Args:
        read_index: `[total_kv]`, where the keys of all sequences are in a cache of pages.
        bounds: `[batch + 1]` of the sequences in read_index.
        longest: the number of keys of the longest sequence, or more; no length is read on the host.
    """
    first = torch.arange(0, longest, page_size, device=read_index.device)
    index = (bounds[:-1, None] + first).clamp(max=read_index.shape[0] - 1)
    return (read_index[index] // page_size).int()


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
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cache: Cache | None = None,
    **batch: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention of a batch of the manager, with the interface of Transformers'
    layers.

    Args:
        query: `[1, num_q_heads, total_q, head_dim]`; key, value: `[1, num_kv_heads, total_q,
            head_dim]`, of the new tokens of all requests; in Transformers 5.24, where the layer
            has updated its cache, what `Cache.update` returned.
        s_aux: sinks, one per head.
        cu_seq_lens_q: int32 `[batch + 1]`.
        cache: updated here, if the layer did not.
        batch: what else the manager passes.
    Returns:
        (out `[1, total_q, num_q_heads, head_dim]`, None).
    Raises:
        ValueError: a call of the model while a manager is in use, which this is not a part of.
        NotImplementedError: a mask, dropout, any other tensor that may shape attention.
    """
    if cu_seq_lens_q is None or "write_index" not in batch:
        raise ValueError(
            "write_index: expected continuous batching's arguments; got none. While its manager is "
            "in use, other calls of the model are not possible; stop the manager first"
        )
    if attention_mask is not None:
        raise NotImplementedError(
            "attention_mask: expected None in continuous batching; got a tensor. A manager of "
            "another attention was kept: call destroy_cached_continuous_batching_manager()"
        )
    refuse_dropout(dropout)
    refuse_others(batch, (*_BATCH, *_PAGES))
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx, kwargs=batch)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in autocast(query, key, value))
    options = {
        "softmax_scale": scaling,
        "window": None if sliding_window is None else (sliding_window - 1, None),
        "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.reshape(-1),
    }
    if batch.get("k_cache") is None:
        bounds = cu_seq_lens_q, batch["cu_seq_lens_k"]
        return flash_attention_varlen(q, k, v, *bounds, causal=True, **options).unsqueeze(0), None
    pages, seq_lens = (batch["k_cache"], batch["v_cache"]), batch["seq_lens"]
    options["block_table"] = batch["block_table"]
    if max_length_q == 1 and q.shape[0] == seq_lens.shape[0]:
        out = decode_attention(q.unsqueeze(1), *pages, seq_lens, **options).squeeze(1)
    else:
        out = prefill_attention(q, *pages, cu_seq_lens_q, seq_lens, **options)
    return out.unsqueeze(0), None


class Manager(ContinuousBatchingManager):
    """Transformers' manager of a model whose attention is this package's.

    It is in use from `init_continuous_batching` or `start` until its thread ends or, if there is
    none, until `stop` or `destroy`.
    """

    _names: Sequence[tuple[Any, str]] = ()  # while it is in use, what `_use_pages` returned

    def warmup(self) -> None:
        try:
            super().warmup()
        except BaseException:  # no call of stop follows
            self._release()
            raise

    def start(self, *args: Any, **options: Any) -> None:
        self._names = self._names or _use_pages(self.model)
        super().start(*args, **options)

    def stop(self, *args: Any, **options: Any) -> None:
        super().stop(*args, **options)
        if not self.is_running():
            self._release()

    def destroy(self, *args: Any, **options: Any) -> None:
        super().destroy(*args, **options)
        self._release()

    def _release(self) -> None:
        names, self._names = self._names, ()
        _set_names(names)

    def _run_generation_loop(self, *args: Any, **options: Any) -> None:
        try:
            super()._run_generation_loop(*args, **options)
        finally:
            self._release()

    def _generation_step(self, *args: Any, **options: Any) -> None:
        name = self.model.config.get_text_config()._attn_implementation
        if name != PAGED_NAME:  # for which the cache's `update` would return too few keys
            raise RuntimeError(
                f"model: expected the attention {PAGED_NAME} while its manager is in use; got "
                f"{name}. Stop the manager, or call destroy_cached_continuous_batching_manager()"
            )
        super()._generation_step(*args, **options)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        processor.cache.__class__ = Cache
        return processor


def _use_pages(model: nn.Module) -> list[tuple[Any, str]]:
    """Sets `attention_forward` as the model's attention. Returns its configs and the attention that
    each named before."""
    AttentionInterface.register(PAGED_NAME, attention_forward)
    configs = {id(x): x for x in (model.config, model.config.get_text_config())}.values()
    # After a manager that was neither started nor stopped, a config still names what is set here.
    names = [
        (config, ATTENTION_NAME if name == PAGED_NAME else name)
        for config in configs
        for name in (config._attn_implementation,)
    ]
    _set_names((config, PAGED_NAME) for config in configs)
    return names


def _set_names(names: Iterable[tuple[Any, str]]) -> None:
    for config, name in names:
        config._attn_implementation_internal = name


def init_continuous_batching(
    model: nn.Module,
    generation_config: Any = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: WorkloadHints | None = None,
) -> Manager:
    """Returns a manager; arguments as those of the model's own method.

    Raises:
        NotImplementedError: a page_size that is no power of two. Otherwise as the model's method.
    """
    requested = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
    resolve_using_hints(requested, workload_hints)
    resolve_without_hints(requested)
    if continuous_batching_config is not None:  # or the manager warns that it cannot pass tables
        continuous_batching_config = copy.copy(continuous_batching_config)
        continuous_batching_config.max_blocks_per_request = 0
    names = _use_pages(model)
    try:
        manager = type(model).init_continuous_batching(
            model,
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            workload_hints=workload_hints,
        )
        _check_page_size(manager.continuous_batching_config.page_size)
    except BaseException:
        _set_names(names)
        raise
    manager.__class__ = Manager
    manager._names = names
    kinds = map(
        ATTN_TYPE_TO_ALLOCATOR.get, group_layers_by_attn_type(model.config.get_text_config())
    )
    if manager.batch_processor is None and all(kind.supports_block_table for kind in kinds):
        blocks = requested.max_blocks_per_request
        manager.continuous_batching_config.max_blocks_per_request = blocks
    return manager


def _check_page_size(page_size: int) -> None:
    if page_size & (page_size - 1):
        raise NotImplementedError(
            "continuous_batching_config: expected a page_size that is a power of two; "
            f"got {page_size}"
        )
