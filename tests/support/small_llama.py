"""Small models with random weights."""

import torch
from torch import Tensor

from gqa_kernels import get_backend
from llama2 import KVCache, Llama2, ModelConfig

EAGER = get_backend("eager")


def small_config(num_q_heads=4, num_kv_heads=2, head_dim=16, **changes) -> ModelConfig:
    return ModelConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=111,
        num_layers=2,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_seq_len=128,
        **changes,
    )


def lively(config: ModelConfig, device, ops=EAGER) -> Llama2:
    """A model with weights so large that attention is far from uniform and logits are far apart."""
    model = Llama2(config, ops)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(device)


def twin(model: Llama2, ops=EAGER, dtype=None) -> Llama2:
    """A copy with other ops or in another dtype; in float64, the rope table is float64 too."""
    weight = model.lm_head.weight
    copy = Llama2(model.config, ops).to(weight.device, dtype or weight.dtype)
    copy.load_state_dict(model.state_dict())
    if dtype is torch.float64:
        half = torch.arange(0, model.config.head_dim, 2, dtype=torch.float64, device=weight.device)
        position = torch.arange(model.config.max_seq_len, dtype=torch.float64, device=weight.device)
        angle = position[:, None] * model.config.rope_theta ** (-half / model.config.head_dim)
        copy.rope.cos, copy.rope.sin = angle.cos(), angle.sin()
    return copy


def prefill_and_decode(model: Llama2, tokens: Tensor) -> Tensor:
    """Logits `[2, 41, vocab_size]` of tokens `[2, 45]` that are added to a cache in four calls."""
    weight = model.lm_head.weight
    cache = KVCache(model.config, 2, 45, dtype=weight.dtype, device=weight.device)
    # The rows begin with 9 and 5 valid tokens; calls with 16, 19 and 1 follow.
    num_valid = torch.tensor([9, 5], device=weight.device)
    prefill = model(tokens[:, :9], cache, num_valid)[:, :5]
    steps = [model(part, cache) for part in tokens[:, 9:].split([16, 19, 1], dim=1)]
    return torch.cat([prefill, *steps], dim=1)


def random_tokens(device, *shape) -> Tensor:
    return torch.randint(97, shape, device=device)


def random_documents(device) -> list[Tensor]:
    """Ragged documents, including one with a single token and an empty one."""
    return [random_tokens(device, length) for length in (9, 1, 0, 6)]


def packed(documents: list[Tensor], after: int = 0, dtype=torch.int32) -> tuple[Tensor, Tensor]:
    """(tokens `[1, total]`, cu_seqlens), with tokens after the last document."""
    device = documents[0].device
    lengths = torch.tensor([0, *map(len, documents)], device=device)
    tokens = torch.cat([*documents, random_tokens(device, after)])
    return tokens[None], lengths.cumsum(0).to(dtype)


def loss_alone(model: Llama2, documents: list[Tensor]) -> Tensor:
    """The mean loss over all predictions, with each document run separately."""
    parts = [(model.loss(x[None]), len(x) - 1) for x in documents if len(x) > 1]
    return sum(loss * count for loss, count in parts) / sum(count for _, count in parts)


def gradients(model: Llama2, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def right_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    return tokens, torch.tensor([len(p) for p in prompts], device=tokens.device)
