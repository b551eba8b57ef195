"""What the training commands share: the recipe, the run's folders and the final checkpoint."""

import argparse
import contextlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llama2 import checkpoint
from llama2.accounting import num_parameters
from llama2.chat_format import CHAT_TEMPLATES
from llama2.checkpoint import meta
from llama2.checkpoint.files import Settings
from llama2.commands.machine import Machine, machine
from llama2.config import ModelConfig
from llama2.decoder import Decoder
from llama2.placement import free_bytes
from llama2.storage import locked, read_json, replacing, write_text
from llama2.terminal import counted
from llama2.tokenizer import Tokenizer
from llama2.train import pretrain
from llama2.train.corpora import TOKENIZER
from llama2.train.data import is_within
from llama2.train.event_files import check_tensorboard
from llama2.train.execution import STATE
from llama2.train.objectives import Objective, next_token
from llama2.train.ownership import check_held, claimed, finish, run_id_of, write_record
from llama2.train.pretrain import Batches, TrainConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_LAST_STEPS = 100  # the final loss is their mean


def train_config(args: argparse.Namespace, shape: ModelConfig, steps: int) -> TrainConfig:
    """Returns the recipe that the options of `add_recipe` specify."""
    warmup_steps = args.warmup_steps
    if warmup_steps is None:  # as the paper's reward models; its section 3.2.2
        warmup_steps = max(5, 3 * steps // 100)
    config = TrainConfig(
        steps=steps,
        batch_size=args.batch_size,
        seq_len=shape.max_seq_len if args.seq_len is None else args.seq_len,
        micro_batch_size=args.micro_batch_size,
        peak_lr=args.peak_lr,
        warmup_steps=warmup_steps,
        weight_decay=args.weight_decay,
        bf16=args.bf16,
        seed=args.seed,
        activation_checkpointing=args.activation_checkpointing,
    )
    if config.seq_len > shape.max_seq_len:
        raise ValueError(
            f"seq_len: expected at most the model's max_seq_len ({shape.max_seq_len}); "
            f"got {config.seq_len}"
        )
    return config


def note_warm_up(config: TrainConfig) -> None:
    if config.warmup_steps >= config.steps:
        print(
            f"note: the warm-up of {config.warmup_steps} steps does not end within the run's "
            f"{config.steps} steps, so the learning rate never decays",
            file=sys.stderr,
        )


def check_memory(
    shape: ModelConfig,
    config: TrainConfig,
    machine: Machine,
    *,
    predicts_all: bool,
    beside: int = 0,
) -> None:
    """Raises ValueError for training that cannot fit in memory, before the data are read.

    Args:
        predicts_all: every token of a row has a loss.
        beside: bytes that other models need in each process.
    """
    free = free_bytes(machine.placement.device)
    # Weights, gradients and Adam's two moments in float32. Each process first loads all weights.
    state = max(16 // machine.size, 4) * num_parameters(shape) + beside
    if state > free:
        raise ValueError(
            f"shape: expected a model whose training fits in the {free:,} bytes of free memory; "
            f"got {num_parameters(shape):,} parameters, which need {state:,}"
        )
    # A lower bound: the float32 logits of a forward pass, which the kernels never store whole, and
    # the ids of a step.
    rows = config.batch_size // machine.execution.num_parts
    micro = config.micro_batch_size or rows
    has_logits = predicts_all and machine.placement.backend == "eager"
    logits = 4 * micro * config.seq_len * shape.vocab_size if has_logits else 0
    at_once = "batch_size" if config.micro_batch_size is None else "micro_batch_size"
    ids = 8 * config.batch_size * (config.seq_len + 1)
    for name, size, needed, memory in (
        (at_once, micro, logits, free),
        ("batch_size", config.batch_size, ids, free_bytes(torch.device("cpu"))),
    ):
        if needed > memory:
            raise ValueError(
                f"{name}: expected sequences that fit in the {memory:,} bytes of free memory; got "
                f"{size:,}, which need at least {needed:,}"
            )


def check_folders(args: argparse.Namespace, inputs: list[Path]) -> None:
    """Checks that the run changes no input, loses no checkpoint and can write what it should.

    Raises:
        ValueError: a directory of the run is part of its input, or holds another checkpoint.
        ImportError: `--tensorboard` is given and tensorboard is not installed.
    """
    if args.tensorboard is not None:
        check_tensorboard()
    for name in ("work", "out", "tensorboard"):
        path = getattr(args, name)
        if path is None:
            continue
        for text in inputs:
            if is_within(path, text):
                raise ValueError(
                    f"{name}: expected a directory outside of the texts {text}, which the run must "
                    f"not change; got {path}"
                )
        for option in ("init", "reward", "safety_reward"):
            model = getattr(args, option, None)
            if model is not None and is_within(model, path) and is_within(path, model):
                option = option.replace("_", "-")
                raise ValueError(f"{name}: expected a directory other than --{option}; got {path}")
    if (args.out / meta.CONFIG_FILE).exists():
        raise ValueError(
            f"out: expected a directory without a checkpoint in Meta's layout; got {args.out}"
        )


@contextlib.contextmanager
def owned(args: argparse.Namespace, machine: Machine) -> Iterator[str]:
    """Locks `--work` and `--out` for this run and yields its id; of several processes, one does so
    and the others get ""."""
    if not machine.execution.speaks:
        yield ""
        return
    for folder in (args.work, args.out):  # so that a directory that cannot be written fails now
        folder.mkdir(parents=True, exist_ok=True)
    with locked(args.work):
        begun = (args.work / STATE).exists() or any(args.work.glob("step-*"))
        run_id = run_id_of(args.work, args.init, begun=begun)
        with claimed(args.out, run_id):
            yield run_id


# Called by `tune` with the shape of --init, the recipe of one step and the run's id.
Tune = Callable[[argparse.Namespace, Machine, ModelConfig, TrainConfig, str], None]


def tune(args: argparse.Namespace, shape: ModelConfig, body: Tune) -> int:
    """Checks all that can be checked before the data are read, calls `body` and returns 0.

    Args:
        args: options with `data` and `held_out`, of a run that starts from --init.
        shape: that of --init.
    Raises:
        OSError, ValueError, NotImplementedError: about the user's input.
    """
    with machine(args) as computer:
        check_folders(args, [*args.data, *([args.held_out] if args.held_out else [])])
        limits = train_config(args, shape, steps=1)
        computer.check(limits)
        check_memory(shape, limits, computer, predicts_all=False)
        with owned(args, computer) as run_id:
            body(args, computer, shape, limits, run_id)
    return 0


def check_lines(args: argparse.Namespace, num_bad: int) -> None:
    """Raises ValueError if lines are bad, unless --skip-bad-lines is given."""
    if num_bad and not args.skip_bad_lines:
        raise ValueError(
            f"data: expected no bad lines; got {num_bad:,}, for the reasons above. "
            "--skip-bad-lines skips them"
        )


def announce(args: argparse.Namespace, machine: Machine, config: TrainConfig, summary: str) -> None:
    """Prints on stderr what will be trained and on which device."""
    if machine.execution.speaks:
        note_warm_up(config)
        print(f"{summary}; {counted(config.steps, 'step')}", file=sys.stderr)
        if args.backend == "auto" or machine.placement.interpreted:
            machine.placement.announce()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C stop the run after the current step, which is then saved; a second Ctrl-C stops
    it at once."""
    asked = []

    def interrupt(*_: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread receives signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    args: argparse.Namespace,
    machine: Machine,
    model: Decoder,
    data: Batches,
    config: TrainConfig,
    objective: Objective = next_token,
    *,
    counts_tokens: bool = True,
) -> list[dict[str, float]]:
    """Calls `pretrain.train` on a sharded model; in a run of one process, Ctrl-C saves the step.

    Returns the log. Afterwards the weights are rounded to bfloat16, as the checkpoint stores them.
    """
    with interruptible(machine) as asked_to_stop:
        log = pretrain.train(
            model,
            data,
            config,
            args.work,
            save_every=args.save_every,
            objective=objective,
            counts_tokens=counts_tokens,
            execution=machine.execution,
            asked_to_stop=asked_to_stop,
            tensorboard=args.tensorboard,
        )
    round_to_bfloat16(model)
    return log


@contextlib.contextmanager
def interruptible(machine: Machine) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C asked a run of one process to stop, and prints
    on stderr what the run saved."""
    # torchrun's processes receive signals at different steps, but all must take part in a step.
    alone = machine.mesh is None
    try:
        with _interrupts() if alone else contextlib.nullcontext(lambda: False) as asked_to_stop:
            yield asked_to_stop
    except KeyboardInterrupt as stopped:
        if str(stopped):
            print(f"{stopped}; the same command resumes", file=sys.stderr)
        raise


@torch.no_grad()
def round_to_bfloat16(model: nn.Module) -> None:
    """Rounds the weights to bfloat16 in place, as a checkpoint stores them."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def final_loss(log: list[dict[str, float]]) -> float:
    """Returns the mean loss of the last steps."""
    return fmean(step["loss"] for step in log[-_LAST_STEPS:])


def shown_loss(record: dict[str, Any]) -> str:
    """Returns a record's `final_loss` as text, with the number of steps that it is the mean of."""
    steps = min(_LAST_STEPS, record["train_config"]["steps"])
    over = f"the mean of the last {steps} steps" if steps > 1 else "of the only step"
    return f"loss {record['final_train_loss']:.4f}, {over}"


def text_files(tokenizer_file: Path | None, init: Path | None) -> dict[str, Path | str]:
    """Returns a checkpoint's text files by name: the tokenizer and generation_config.json, without
    whose stop ids Transformers' `generate` continues after an answer's end.

    Args:
        init: the checkpoint that the run starts from; its generation_config.json is kept.
    Raises:
        ValueError: one of them is malformed.
    """
    if tokenizer_file is None:
        return {}
    config = tokenizer_file.with_name(TOKENIZER_CONFIG)
    files: dict[str, Path | str] = {TOKENIZER: tokenizer_file}
    if config.is_file():
        files[TOKENIZER_CONFIG] = config
    tokenizer = Tokenizer(tokenizer_file)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ends = {name: id for name, id in ids.items() if id >= 0}
    if init is not None and (init / GENERATION_CONFIG).is_file():
        ends |= Settings.read(init / GENERATION_CONFIG)
    files[GENERATION_CONFIG] = json.dumps(ends, indent=2) + "\n"
    return files


def with_template(file: Path | str | None, form: str) -> str:
    """Returns the text of a tokenizer_config.json with the chat template of a dialogue format."""
    settings = {} if file is None else read_json(Path(file))
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected a JSON object; got {settings!r:.60}")
    return json.dumps({**settings, "chat_template": CHAT_TEMPLATES[form]}, indent=2) + "\n"


def export(
    args: argparse.Namespace,
    machine: Machine,
    model: Decoder,
    record: dict[str, Any],
    files: Mapping[str, Path | str],
) -> None:
    """Writes the checkpoint of the run to `--out`, and `record` to `--out` and `--work`.

    Args:
        record: a JSON object, whose "run" is the run's id.
        files: by their names in the checkpoint, files to copy and texts to write.
    Raises:
        FloatingPointError: a weight is not finite: the last step, whose loss was still finite,
            overflowed.
    """
    whole = machine.whole(model)
    if whole is not None:
        _check_finite(whole)
        check_held(args.out, record["run"])
        checkpoint.save_hf(whole, args.out, dtype=torch.bfloat16)
        for name, content in files.items():
            if isinstance(content, str):
                write_text(args.out / name, content)
                continue
            with replacing(args.out / name) as partial:
                shutil.copyfile(content, partial)
        write_record(args.work, record)  # for `llama2 plot`, which is given that folder
        finish(args.out, record)
    if machine.mesh is not None:
        dist.barrier()


def _check_finite(model: Decoder) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise FloatingPointError(
                f"{name}: expected finite weights after the last step; got NaN or infinity. No "
                "checkpoint was written; start a new run with a lower learning rate"
            )
