"""Calls that launch every kernel that a model of a given shape needs, to compile them in advance.

`gqa_kernels.warm_up` records the launches without running a kernel: weights and results are
uninitialised memory. The calls are those that users make, on a model of one layer, which launches
the same kernels as one of many layers: its first norm adds no residual, its second does, and the
sum of the last norm is unused.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from gqa_kernels.reference import MAX_NEW_TOKENS
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.config import ModelConfig
from llama2.evaluation.scoring import Window, scores
from llama2.finetune.packing import PackedRows, answer_loss
from llama2.generate import Generator
from llama2.model import Llama2
from llama2.requests import Request
from llama2.serving import serve
from llama2.speculation import MOST_DRAFTED, PromptLookup, Speculation
from llama2.train import pretrain
from llama2.train.execution import OneProcess

USES = ("generate", "speculation", "serve", "prefixes", "evaluate", "train")
DEFAULT_USES = ("generate", "serve")

_PROMPT = 33  # tokens: more than a decode step takes, and not a multiple of 16
# One sequence; then row settings at addresses that are not, and that are, multiples of 16.
_BATCHES = (1, 2, 8)


def call_all(
    config: ModelConfig,
    ops: ModuleType,
    uses: Iterable[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 16,
) -> None:
    """Makes the calls of `uses`, a subset of USES.

    - generate: prefill and decode steps on a contiguous cache, for one sequence and for a batch.
    - speculation: steps of 1 to 15 drafted tokens on such a cache; each number needs its own
      binary. With generate, it is also what a draft model needs.
    - serve: prefill and decode steps on a paged cache, and more than 16 tokens after others of
      their prompt.
    - prefixes: 1 to 16 tokens after a shared prefix or an earlier chunk of their prompt; each
      number needs its own binary.
    - evaluate: logits and losses of padded and packed texts, without gradients.
    - train: a step of pre-training, and one on packed rows of dialogues; in bfloat16 with weights
      in float32.

    Kernels of reward models, of PPO and of models sharded over processes are not included.

    Args:
        config: of the model; the number of layers does not matter.
        dtype: of the model; in training, the dtype that computes the gradients.
        device: where the kernels are launched.
        cache_dtype: of the caches; None means the model's.
    Raises:
        ValueError: page_size is not a power of two, or training does not support dtype.
    """
    config = replace(config, num_layers=1)
    model = _without_values(config, ops, dtype, device)
    calls: dict[str, Callable[[], None]] = {
        "generate": lambda: _generate(model, cache_dtype),
        "speculation": lambda: _speculate(model, cache_dtype),
        "serve": lambda: _serve(model, cache_dtype, page_size),
        "prefixes": lambda: _serve(
            model, cache_dtype, page_size, range(1, MAX_NEW_TOKENS + 1), (1, 1)
        ),
        "evaluate": lambda: _evaluate(model),
        "train": lambda: _train(config, ops, dtype, device),
    }
    for use in uses:
        calls[use]()


def _without_values(
    config: ModelConfig, ops: ModuleType, dtype: torch.dtype, device: torch.device | str
) -> Llama2:
    """Returns a model with uninitialised weights: memory that is never written costs nothing on a
    CPU."""
    with torch.device("meta"):
        model = Llama2(config, ops)
    return model.to(dtype).to_empty(device=device)


class _Zeros(TorchFunctionMode):
    """Makes the uncomputed results of ops 0, so that logits are finite, and skips matrix
    products."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is linear:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], len(weight))
        result = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, Tensor.new_empty):
            result.zero_()
        return result


# The calls sample: greedy decoding launches one kernel less.


def _generate(
    model: Llama2, cache_dtype: torch.dtype | None, speculation: Speculation | None = None
) -> None:
    settings = {"cache_dtype": cache_dtype, "speculation": speculation}
    generator = Generator(model, capture=False, **settings)
    # The prompt and a new token fill a multiple of 16, as the strides of caches on a GPU are
    # rounded.
    prompt = [0] * min(31, model.config.max_seq_len - 1)
    for batch in _BATCHES:
        for prompts in ([prompt] * batch, [prompt[:1]] * batch):
            with _Zeros():
                generator.generate(prompts, max_new_tokens=2, temperature=1.0)


def _speculate(model: Llama2, cache_dtype: torch.dtype | None) -> None:
    for num_tokens in range(1, MOST_DRAFTED + 1):
        _generate(model, cache_dtype, PromptLookup(num_tokens))


def _serve(
    model: Llama2,
    cache_dtype: torch.dtype | None,
    page_size: int,
    rests: Iterable[int] = (1, _PROMPT),
    batches: Iterable[int] = _BATCHES,
) -> None:
    """Serves prompts of one token, and prompts with `rests` tokens after a shared first page. The
    row length of one block table is a multiple of 16, that of the next is not."""
    dtype, device = model.lm_head.weight.dtype, model.lm_head.weight.device
    config = model.cache_config
    lengths = [1, *(page_size + rest for rest in rests)]
    lengths = [length for length in lengths if length + 2 <= config.max_seq_len]
    units = -(-(max(lengths) + 2) // (16 * page_size))
    for number, batch in enumerate(batches):
        row = 16 * units - number % 2
        cache = PagedKVCache(
            replace(config, max_seq_len=min(row * page_size, config.max_seq_len)),
            num_pages=row * len(lengths),
            page_size=page_size,
            max_batch=batch,
            dtype=cache_dtype or dtype,
            device=device,
        )
        requests = [Request([0] * length, max_new_tokens=2, temperature=1.0) for length in lengths]
        with _Zeros():
            list(serve(model, requests, cache=cache, capture=False))


@torch.inference_mode()
def _evaluate(model: Llama2) -> None:
    device, longest = model.lm_head.weight.device, min(_PROMPT, model.config.max_seq_len)
    windows = [Window((0,) * length, [0]) for length in (longest, longest - 1)]
    with _Zeros():
        for batch, length in product(_BATCHES, (1, longest)):
            tokens = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
            model(tokens[:, :-1])
            model.token_losses(tokens[:, :-1], tokens[:, 1:])
            model.loss(tokens)
        list(scores(model, windows, batch_size=2, greedy=True, show_progress=False))


class _Uninitialised(OneProcess):
    """An execution in which a step with uninitialised loss and gradients does not raise."""

    def mean(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    def grad_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        return torch.ones((), dtype=torch.float32, device=next(iter(gradients)).device)


def _train(
    config: ModelConfig, ops: ModuleType, dtype: torch.dtype, device: torch.device | str
) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"dtype: expected torch.float32 or torch.bfloat16 for training; got {dtype}"
        )
    length = min(_PROMPT, config.max_seq_len)
    recipe = pretrain.TrainConfig(1, 1, length, bf16=dtype == torch.bfloat16)
    model = _without_values(config, ops, torch.float32, device)
    optimizer = pretrain.make_optimizer(model, recipe)
    worker = _without_values(config, ops, dtype, device) if recipe.bf16 else model
    for weight in model.parameters() if recipe.bf16 else ():
        # AdamW would write zeros to its moments, which would take memory on a CPU.
        moments = {name: torch.empty_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        step = torch.zeros((), dtype=torch.float32, device="cpu")
        optimizer.state[weight] = {"step": step, **moments}
    tokens = torch.zeros(2, length + 1, dtype=torch.int64, device=device)
    bounds = torch.tensor([[0, length // 2, length]], dtype=torch.int32, device=device)
    packed = PackedRows(tokens[:1, :-1], tokens[:1, 1:], bounds, 1.0)
    for rows, objective in (
        (tokens, pretrain.next_token),
        (tokens[:1], pretrain.next_token),  # its targets have another alignment
        (packed, answer_loss),
    ):
        pretrain.train_step(model, optimizer, rows, 0, recipe, worker, objective, _Uninitialised())
