"""The command `llama2 ppo`: trains a chat model by PPO against reward models."""

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from llama2 import checkpoint
from llama2.accounting import num_parameters
from llama2.checkout import made_with
from llama2.checkpoint import hf
from llama2.commands.json_lines import read_and_make
from llama2.commands.machine import Machine, machine
from llama2.commands.training import (
    TOKENIZER_CONFIG,
    check_folders,
    check_lines,
    check_memory,
    export,
    interruptible,
    owned,
    round_to_bfloat16,
    text_files,
    with_template,
)
from llama2.config import ModelConfig
from llama2.decoder import AnyDecoder
from llama2.finetune.sampling import encode_for
from llama2.parallel import parallelize
from llama2.rlhf.ppo import Actors, train
from llama2.rlhf.ppo_config import PPOConfig
from llama2.rlhf.prompts import TaggedPrompt, read_prompts
from llama2.rlhf.rollouts import Judge, Question, Questions, Sampler
from llama2.rlhf.scoring import Scorer, load_reward_model
from llama2.stops import stop_ids
from llama2.taught_format import taught_format
from llama2.terminal import counted
from llama2.tokenizer import Tokenizer, check_fits
from llama2.train.corpora import TOKENIZER
from llama2.train.pretrain import TrainConfig

_LARGE = 30e9  # from this many parameters on, the settings of the paper's 34B and 70B models apply
_LAST = 10  # the report is the mean of the last iterations


def run(args: argparse.Namespace) -> int:
    """Trains a policy on prompts, writes its checkpoint and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError: about the user's input.
        ImportError: a package of the extra `models` is missing.
        FloatingPointError: a reward, log-probability, loss or gradient is not finite.
    """
    with machine(args) as computer:
        shape = checkpoint.load_config(args.init)
        config = _config(args, shape)
        check_folders(args, args.data)
        step = config.step_config(shape.max_seq_len)
        computer.check(step, batch="mini_batch_size")
        check_memory(
            shape, step, computer, predicts_all=False, beside=_others(args, shape, computer)
        )
        with owned(args, computer) as run_id:
            _tune(args, computer, shape, config, run_id)
    return 0


def _tune(
    args: argparse.Namespace, computer: Machine, shape: ModelConfig, config: PPOConfig, run_id: str
) -> None:
    tokenizer = Tokenizer(args.init / TOKENIZER)
    check_fits(tokenizer, shape.vocab_size, args.init)
    form = taught_format(args.init)
    files = text_files(args.init / TOKENIZER, args.init)
    files[TOKENIZER_CONFIG] = with_template(files.get(TOKENIZER_CONFIG), form)
    prompts, sources, num_bad = _read(args, tokenizer, form, shape, computer.execution.speaks)
    questions = Questions(
        prompts,
        iterations=config.iterations,
        per_iteration=config.batch_size // config.samples,
        seed=config.seed,
    )
    if computer.execution.speaks and (args.backend == "auto" or computer.placement.interpreted):
        computer.placement.announce()
    step = config.step_config(shape.max_seq_len)
    actors = _actors(args, computer, config, step)
    sampler = Sampler(
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids(tokenizer, args.init),
        temperature=config.temperature,
        seed=config.seed,
        vocab_size=tokenizer.vocab_size,
        samples=config.samples,
        max_batch=args.max_batch,
        ops=computer.placement.ops,
        dtype=_compute_dtype(args),
        execution=computer.execution,
    )
    rewards = {"reward": args.reward, "safety_reward": args.safety_reward}
    rewards = {name: None if path is None else str(path) for name, path in rewards.items()}
    with interruptible(computer) as asked_to_stop:
        log = train(
            actors,
            questions,
            sampler,
            config,
            args.work,
            save_every=args.save_every,
            inputs=_weights_of(args),
            execution=computer.execution,
            asked_to_stop=asked_to_stop,
            tensorboard=args.tensorboard,
        )
    round_to_bfloat16(actors.policy)
    last = log[-_LAST:]
    record = {
        "run": run_id,
        "parameters": num_parameters(shape),
        "init": str(args.init),
        **rewards,
        "format": form,
        "ppo_config": asdict(config),
        "prompts": len(prompts),
        "bad_lines": num_bad,
        "sources": sources,
        "first_reward": log[0]["reward"],
        "final_reward": fmean(line["reward"] for line in last),
        "final_kl": fmean(line["kl"] for line in last),
        "wall_seconds": log[-1]["seconds"],
        "made_with": made_with(args),
    }
    export(args, computer, actors.policy, record, files)
    if computer.execution.speaks:
        _report(record, args.out)


def _config(args: argparse.Namespace, shape: ModelConfig) -> PPOConfig:
    """Returns the settings, with the paper's β for a model of this size by default."""
    given = {name: getattr(args, name) for name in asdict(PPOConfig())}
    if given["kl_weight"] is None:
        given["kl_weight"] = 0.005 if num_parameters(shape) >= _LARGE else 0.01
    config = PPOConfig(**given)
    if args.max_batch < 1:
        raise ValueError(f"max_batch: expected at least 1; got {args.max_batch}")
    if config.max_new_tokens >= shape.max_seq_len:
        raise ValueError(
            f"max_new_tokens: expected less than the model's max_seq_len ({shape.max_seq_len}), to "
            f"leave room for a prompt; got {config.max_new_tokens}"
        )
    return config


def _read(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    form: str,
    shape: ModelConfig,
    speaks: bool,
) -> tuple[list[Question], Counter[str], int]:
    """Returns the prompts, their number by source and the number of bad lines; each is reported on
    stderr."""
    room = shape.max_seq_len - args.max_new_tokens

    def encode(prompt: TaggedPrompt) -> Question:
        ids = encode_for(tokenizer, prompt.messages, form, shape.max_seq_len)
        if len(ids) > room:
            raise ValueError(
                f"messages: expected at most {room} tokens before an answer of "
                f"{args.max_new_tokens}; got {len(ids)}"
            )
        if prompt.is_safety and args.safety_reward is None:
            raise ValueError("safety: expected --safety-reward for a safety prompt; got none")
        return Question(ids, prompt.is_safety)

    read = read_and_make(args.data, read_prompts, encode, kind="prompt", speaks=speaks)
    check_lines(args, read[2])
    return read


def _compute_dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float32


def _others(args: argparse.Namespace, shape: ModelConfig, computer: Machine) -> int:
    """Returns the bytes per process of the critic, which is trained, the reference and the reward
    models."""
    paths = [path for path in (args.reward, args.safety_reward) if path is not None]
    # Loading refuses a checkpoint that is not a reward model.
    shapes = [hf.read_config(path, hf.SCALAR) for path in paths if checkpoint.is_scalar(path)]
    sizes = [num_parameters(each) for each in shapes]
    trained = 0 if args.group_size else 16 * sum(sizes[:1])
    frozen = _compute_dtype(args).itemsize * sum([num_parameters(shape), *sizes])
    return (trained + frozen) // computer.size


def _actors(
    args: argparse.Namespace, computer: Machine, config: PPOConfig, step: TrainConfig
) -> Actors:
    """Returns the models, on their device and sharded. The critic is a second, trained copy of the
    reward model of helpfulness."""
    ops, device = computer.placement.ops, computer.placement.device
    trained = {"dtype": torch.float32, "device": device}
    frozen = {"dtype": _compute_dtype(args), "device": device}

    def fixed(model: AnyDecoder) -> AnyDecoder:
        model.requires_grad_(False)
        return model if computer.mesh is None else parallelize(model, computer.mesh)

    rows = config.micro_batch_size or config.mini_batch_size
    most = rows * step.seq_len  # tokens of one forward pass of `Judge`

    def scorer(path: Path | None) -> Scorer | None:
        if path is None:
            return None
        model = load_reward_model(path, ops, policy=args.init, **frozen)
        return Scorer(fixed(model), max_tokens=most)

    judge = Judge(scorer(args.reward), scorer(args.safety_reward))
    policy = computer.sharded(checkpoint.load(args.init, ops, **trained), step)
    reference = fixed(checkpoint.load(args.init, ops, **frozen))
    critic = None
    if not config.group_size:
        critic = load_reward_model(args.reward, ops, policy=args.init, **trained)
        critic = computer.sharded(critic, step)
    return Actors(policy, critic, reference, judge)


def _weights_of(args: argparse.Namespace) -> dict[str, str | None]:
    """Returns checksums of the models' weights: a resumed run has to load the same models."""
    return {
        f"{name}_crc32": None if path is None else checkpoint.weights_crc32(path)
        for name in ("init", "reward", "safety_reward")
        for path in (getattr(args, name),)
    }


def _report(record: dict[str, Any], out: Path) -> None:
    iterations = record["ppo_config"]["iterations"]
    print(
        f"{out}: {counted(iterations, 'iteration')} over {counted(record['prompts'], 'prompt')}; "
        f"mean reward {record['first_reward']:.4f} in the first iteration, "
        f"{record['final_reward']:.4f} over the last {min(_LAST, iterations)}; "
        f"divergence from {record['init']} {record['final_kl']:.4f} nats per answer"
    )
