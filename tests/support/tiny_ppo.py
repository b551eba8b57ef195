"""A run of PPO that takes seconds: a tiny policy whose answers a function rewards."""

from collections.abc import Sequence

import torch

from gqa_kernels import get_backend
from llama2.config import ModelConfig
from llama2.model import Llama2
from llama2.rlhf.ppo import Actors
from llama2.rlhf.ppo_config import PPOConfig
from llama2.rlhf.rollouts import Judge, Question, Questions, Sampler
from llama2.scalar_model import ScalarModel
from llama2.train.execution import Execution, OneProcess

TORCH = get_backend("torch")  # the commands' backend on a CPU
EOS, WANTED = 2, 5
SHAPE = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=32,
)
CONFIG = PPOConfig(
    iterations=2,
    batch_size=16,
    mini_batch_size=8,
    lr=3e-3,
    max_new_tokens=6,
    kl_weight=0.01,
)


def wanted(sequences: Sequence[Sequence[int]]) -> list[float]:
    """The share of one token in each sequence (prompt and answer), as a logit in [−2, 2]."""
    return [4 * sum(token == WANTED for token in ids) / len(ids) - 2 for ids in sequences]


def policy(seed: int = 0) -> Llama2:
    torch.manual_seed(seed)
    model = Llama2(SHAPE, TORCH)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def critic(seed: int = 0) -> ScalarModel:
    torch.manual_seed(seed + 100)
    return ScalarModel(SHAPE, TORCH)


def compute_dtype(config: PPOConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float32


def actors(config: PPOConfig, reward=wanted, **models) -> Actors:
    return Actors(
        models.get("policy") or policy(),
        None if config.group_size else models.get("critic") or critic(),
        models.get("reference") or policy().to(compute_dtype(config)).requires_grad_(False),
        Judge(reward),
    )


def questions(config: PPOConfig, count: int = 12) -> Questions:
    prompts = [Question([1, 6 + n % 10, 7 + n % 3][: 2 + n % 2]) for n in range(count)]
    per_iteration = config.batch_size // config.samples
    sizes = {"iterations": config.iterations, "per_iteration": per_iteration}
    return Questions(prompts, **sizes, seed=config.seed)


def sampler(config: PPOConfig, execution: Execution = OneProcess()) -> Sampler:  # noqa: B008
    return Sampler(
        max_new_tokens=config.max_new_tokens,
        stop_ids=[EOS],
        temperature=config.temperature,
        seed=config.seed,
        vocab_size=SHAPE.vocab_size,
        samples=config.samples,
        max_batch=16,
        ops=TORCH,
        dtype=compute_dtype(config),
        execution=execution,
    )
