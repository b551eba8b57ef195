"""Small models of Transformers with random weights, and ways to run them."""

import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from budget import SEED
from combinations import covering
from torch import Tensor, nn

from gqa_kernels import patch
from gqa_kernels.integrations import transformers as ours

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# Settings of each kind of model, in addition to the sizes.
KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
}
transformers.logging.set_verbosity_error()


def make(kind: str = "Llama", *, attention: str = "eager", **changes) -> nn.Module:
    """A model with the same weights for the same kind, large enough that tokens differ."""
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**SIZES | KINDS.get(kind, {}) | changes)
    config._attn_implementation = attention
    torch.manual_seed(SEED)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    offset = 1.0 if kind.startswith("Gemma") else 0.0  # its norms add it to their weights
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5 - offset, 1.5 - offset)
    return model.eval()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a model except the frequencies of the angles, as Transformers loads a checkpoint."""
    kept = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    model = model.to(dtype)
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    return model


def on_kernels(model: nn.Module, route: str) -> nn.Module:
    """Returns a copy of which only attention, or everything, runs on the kernels."""
    model = copy.deepcopy(model)
    if route == "attention":
        ours.register()
        model.set_attn_implementation(ours.ATTENTION_NAME)
    else:
        replaced = {op for _, op in patch(model).replaced}
        assert {"attention", "rms_norm", "rope"} <= replaced
    assert model.config._attn_implementation == ours.ATTENTION_NAME
    return model


class _WideTorch:
    """torch, except that a model's computations in float32, regardless of its dtype, are in
    float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def double(model: nn.Module) -> Callable:
    """Returns an oracle that runs a function of the same model in float64 with eager attention,
    including parts that always use float32, such as norms and softmax."""
    wide = copy.deepcopy(model).double()
    modeling = {type(part).__module__ for part in model.modules()}
    modeling = [sys.modules[name] for name in modeling if name.startswith("transformers.models.")]

    def run(function: Callable) -> Any:
        for module in modeling:
            module.torch = _WideTorch()
        try:
            return function(wide)
        finally:
            for module in modeling:
                module.torch = torch

    return run


def cached(model: nn.Module, cache: str) -> dict[str, Any]:
    """The arguments with which a model fills a new cache."""
    if cache == "dynamic":
        return {"past_key_values": transformers.DynamicCache(config=model.config)}
    return {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=32)}


def places(start: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """The position arguments with which Transformers 4 can compile decode steps."""
    if transformers.__version__ >= "5":
        return {}
    return {"cache_position": torch.arange(start, start + count, device=device)}


def matrix(
    at_once: int, only: dict[str, Sequence[Any]] | None = None, **dimensions: Sequence[Any]
) -> pytest.MarkDecorator:
    """Parametrizes a test by all combinations of the dimensions' values.

    The combinations that cover every value (at_once 1) or every pair of values (2), of a dimension
    in `only` of the values there, run by default; the others have the mark `matrix`.
    """
    combinations = list(itertools.product(*dimensions.values()))
    some = dimensions | (only or {})
    chosen = covering(list(itertools.product(*some.values())), at_once)
    return pytest.mark.parametrize(
        tuple(dimensions),
        [
            pytest.param(
                *combination,
                id="-".join(str(value).removeprefix("torch.") for value in combination),
                marks=() if combination in chosen else pytest.mark.matrix,
            )
            for combination in combinations
        ],
    )


def rows(padding: str, *, length: int = 9, batch: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of a model's call, mask of positions that are not padding)."""
    generator = torch.Generator().manual_seed(SEED + 1)
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    real = torch.ones_like(tokens)
    if padding == "packed":
        tokens = tokens[:1]
        third = length // 3
        positions = torch.arange(length)
        positions[third:] -= third
        positions[2 * third :] = torch.arange(length - 2 * third)
        return {"input_ids": tokens, "position_ids": positions[None]}, real[:1].bool()
    for i in range(1, batch):
        if padding == "left":
            real[i, : 2 * i] = 0
        elif padding == "right":
            real[i, length - 2 * i :] = 0
    arguments = {"input_ids": tokens * real}
    if padding != "none":
        arguments["attention_mask"] = real
        arguments["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    return arguments, real.bool()
