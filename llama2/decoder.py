"""The network below its head, from token ids to hidden states. `ops`, a module of functions,
provides the kernels.

Parameters have Hugging Face's names without the leading `model.`, so that checkpoints map one to
one. Reference: Touvron et al. 2023, arXiv:2307.09288.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gqa_kernels.reference import MAX_NEW_TOKENS
from gqa_kernels.runtime import arguments
from llama2.cache.kv_cache import Cache, KVCache
from llama2.config import ModelConfig
from llama2.joint_projection import memory_of
from llama2.layers import Attention, DecoderLayer, FeedForward, RMSNorm, RotaryTable
from llama2.targets import positions_of


class Decoder(nn.Module):
    """A Llama 2 decoder below its head. Its ops are a backend: `get_backend("triton")` on a GPU,
    `get_backend("torch")` elsewhere, or `get_backend("eager")` to check either.

    A subclass adds its head and then calls `reset_parameters`, which draws weights from N(0, 0.02²)
    and the two projections that write to the residual stream from N(0, 0.02² / (2 · num_layers)).

    Attributes:
        config: read at construction. Replacing it later does not change the network; the new
            max_seq_len may be smaller.
        activation_checkpointing: store only the input of each layer and recompute the layer in the
            backward pass. Gradients have the same bits; training takes less memory and a third more
            arithmetic.
    """

    activation_checkpointing = False

    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, ops) for _ in range(config.num_layers))
        self.norm = RMSNorm(config, ops)
        self.rope = RotaryTable(config)
        # The network does not use it; the training step does.
        self.adamw_update = ops.adamw_update
        # The function, not the method: a copy or pickle of a model refers to it by name.
        self.register_load_state_dict_post_hook(_after_loading)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._after_moving()
        return self

    def _keep_whole(self) -> None:
        """Gives the rotary table values if the weights have values."""
        weight = self.embed_tokens.weight
        if self.rope.cos.is_meta and not weight.is_meta:
            self.rope.move(weight.device)

    def _after_loading(self) -> None:
        """Restores invariants after `load_state_dict`, which with `assign=True` replaces
        parameters."""
        self._after_moving()

    def _after_moving(self) -> None:
        self._keep_whole()
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                module.release_projections()

    @property
    def cache_config(self) -> ModelConfig:
        """The configuration of a cache for this model: its own, with its present layers and this
        process's share of the heads."""
        attention = self.layers[0].self_attn
        heads = {"num_q_heads": attention.num_q_heads, "num_kv_heads": attention.num_kv_heads}
        return replace(self.config, num_layers=len(self.layers), **heads)

    def fuse_projections(self) -> None:
        """Makes steps on a cache without gradients compute q, k and v by one matrix product, and
        gate and up by another. It moves these weights next to each other in memory; they remain the
        same parameters. `Generator` and `serve` call it on a GPU, where it saves launches; on a
        CPU, reading parts of one output costs more than it saves. If parameters are moved later,
        for example by `to(…)`, projections are computed separately until the next call of this
        method.

        It does not move weights that FSDP shards, nor weights whose memory another tensor uses,
        such as a tensor of a state dict. `safetensors.torch.save_model` refuses a model whose
        weights were moved; `save_file` of its state dict does not.
        """
        if any(hasattr(module, "reshard") for module in self.modules()):
            return
        every = self.named_parameters(remove_duplicate=False)
        tenants = Counter(memory_of(x) for _, x in every if type(x) is nn.Parameter)
        for layer in self.layers:
            layer.self_attn.fuse_projections(tenants)
            layer.mlp.fuse_projections(tenants)

    def _check_table(self) -> None:
        rows = self.rope.cos.shape[0]
        if self.config.max_seq_len > rows:
            raise ValueError(
                f"config: expected a max_seq_len of at most {rows}, the length of the rotary table "
                f"made at construction; got {self.config.max_seq_len}"
            )
        device = self.embed_tokens.weight.device
        if self.rope.cos.is_meta and device.type != "meta":
            raise ValueError(
                f"rope: expected its table on {device}, like the weights; got it on meta. "
                "`model.rope.move(device)` computes it there"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights again; those of norms become 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_layers if writes_residual else 1
                parameter.normal_(std=0.02 * depth**-0.5)

    def hidden_states(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        num_valid: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Returns the final normalised states `[batch, seq_len, hidden_size]` of int tokens
        `[batch, seq_len]`.

        With a cache, the tokens continue its sequences, any number in each call. Rows of a first
        call may be right-padded; `num_valid` int `[batch]` then is the number of tokens of each
        row, and the states of the padding are meaningless. A cache is a `KVCache`, or a batch of a
        `PagedKVCache`, which specifies the tokens. With a quantised cache, tokens that begin a
        sequence attend to each other's exact keys and values; all other tokens attend to the
        quantised ones, including their own.

        Packed sequences are tokens `[1, total]`, one sequence after another, with their bounds in
        `cu_seqlens`, int32 or int64 `[num_sequences + 1]`, starting at 0 and non-decreasing:
        sequence b is the tokens cu_seqlens[b] … cu_seqlens[b + 1] − 1. Each gets the same states as
        alone; it may be empty. Bounds beyond `total` count as `total`; the states of tokens after
        the last sequence are finite and meaningless. `total` may exceed `max_seq_len`, but a
        sequence may not: bounds are read on the device, where no error can be raised, so the states
        of a longer sequence are NaN.

        Raises:
            ValueError: the tokens do not fit in `max_seq_len` or in the cache; tokens, `num_valid`
                or `cu_seqlens` has the wrong shape; `num_valid` without an empty cache;
                `cu_seqlens` with a cache; a cache with another number of heads or layers; a rotary
                table on the meta device, or one too short for the present `config`.
            TypeError: the cache's dtype is not the model's, float8_e4m3fn or int8, or that of
                `cu_seqlens` is not int32 or int64.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [batch, seq_len]; got {list(tokens.shape)}")
        self._check_table()
        batch, seq_len = tokens.shape
        if num_valid is not None and not (isinstance(cache, KVCache) and cache.num_written == 0):
            raise ValueError(
                "num_valid: expected only with an empty cache; got it without a KVCache"
            )
        if num_valid is not None:
            arguments.tensor("num_valid", num_valid, shape=(batch,), dtypes=arguments.INTS)
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError(
                    "cu_seqlens: expected packed sequences without a cache; got a cache"
                )
            positions, step = positions_of(tokens, cu_seqlens), None
        elif cache is None:
            if seq_len > self.config.max_seq_len:
                raise ValueError(
                    f"tokens: expected at most max_seq_len ({self.config.max_seq_len}) per "
                    f"sequence; got {seq_len}"
                )
            positions, step = None, None
        else:
            stored = cache.stored
            if stored.k_scale is None and stored.keys.dtype != self.embed_tokens.weight.dtype:
                raise TypeError(
                    f"cache: expected the model's dtype {self.embed_tokens.weight.dtype}, "
                    f"float8_e4m3fn or int8; got {stored.keys.dtype}"
                )
            num_kv_heads = self.layers[0].self_attn.num_kv_heads
            if stored.keys.shape[3] != num_kv_heads:  # a single head would be broadcast to all
                raise ValueError(
                    f"cache: expected {num_kv_heads} key/value heads, those of cache_config; "
                    f"got {stored.keys.shape[3]}"
                )
            if stored.keys.shape[0] != len(self.layers):
                raise ValueError(
                    f"cache: expected {len(self.layers)} layers; got {stored.keys.shape[0]}"
                )
            step = cache.reserve(batch, seq_len)
            positions, cu_seqlens = step.positions, step.cu_seqlens
            is_chunk = step.seq_lens is not None and seq_len > MAX_NEW_TOKENS
            if cu_seqlens is None and is_chunk:  # bounds of the rows
                bounds = {"dtype": torch.int32, "device": tokens.device}
                cu_seqlens = torch.arange(0, tokens.numel() + 1, seq_len, **bounds)
        x, residual = self.embed_tokens(tokens), None
        recompute = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        steps = itertools.repeat(None) if step is None else step.of_layers()
        for layer, of_layer in zip(self.layers, steps, strict=False):
            inputs = (x, residual, self.rope, positions, of_layer, cu_seqlens)
            if recompute:
                x, residual = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, residual = layer(*inputs)
        if cache is not None:
            cache.advance(seq_len, num_valid)
        return self.norm(x, residual)[0]


def _after_loading(model: Decoder, _: object) -> None:
    model._after_loading()


AnyDecoder = TypeVar("AnyDecoder", bound=Decoder)
