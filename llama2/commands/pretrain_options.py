"""The options of `llama2 pretrain`, and the shape and number of steps that they specify."""

import argparse
from dataclasses import replace
from pathlib import Path

from llama2.commands.care_options import add_care_options
from llama2.commands.options import shape_named
from llama2.commands.training_options import add_folders, add_machine, add_recipe
from llama2.config import PUBLISHED, ModelConfig

_SIZES = {
    "num_layers": "decoder layers",
    "hidden_size": "width of the residual stream",
    "num_q_heads": "query heads; head_dim = hidden size / query heads",
    "num_kv_heads": "key/value heads: as many as query heads is MHA, fewer GQA, one MQA",
    "intermediate_size": "width of the feed-forward layers",
    "max_seq_len": "longest sequence",
    "vocab_size": "vocabulary size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, work=", and for the tokenised texts")
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_recipe(parser.add_argument_group("recipe"))
    add_machine(parser.add_argument_group("machine"))


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--shape",
        metavar="|".join((*PUBLISHED, "FILE.json")),
        help="a published shape, a config.json in Hugging Face's layout, or another JSON file of "
        "ModelConfig's fields; default: the small model that comes with this package",
    )
    for name, meaning in _SIZES.items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=int, metavar="N", help=f"{meaning}; default: the shape's")
    add(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="start from this checkpoint's weights, with its shape",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    weighted = {"type": _weighted, "action": "append", "default": [], "metavar": "PATH[=WEIGHT]"}
    add(
        "--data",
        **weighted,
        help="token shards: a .npy file or a directory of them, and their weight; repeatable",
    )
    add(
        "--text",
        **weighted,
        help="a text file or a directory of them, and their weight in the mixture; repeatable; "
        "default, if there is no --data either: Python's standard library",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a SentencePiece model; default: that of --init, or the shipped one if there is no "
        "--data",
    )
    add(
        "--held-out",
        type=Path,
        metavar="PATH",
        help="texts for evaluation; default: one file in 20 of each --text, or the last 5 %% of a "
        "single file",
    )
    add_care_options(group)


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, metavar="N", help="optimiser steps")
    add(
        "--alpha",
        type=float,
        metavar="SHARE",
        help="uptraining: train for this share of --of-steps",
    )
    add(
        "--of-steps",
        type=int,
        metavar="N",
        help="steps of the original pre-training, of which --alpha is a share",
    )
    add_recipe(
        group, row="sequence", batch_size=16, peak_lr=3e-4, warmup_steps=2000, save_every=500
    )


def _weighted(text: str) -> tuple[Path, float]:
    """Parses PATH or PATH=WEIGHT; an existing path may contain an equals sign."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        path, weight = text, "1"
    try:
        if path:  # an empty path would be the working directory
            return Path(path), float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected PATH or PATH=WEIGHT; got {text!r}")


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Returns the shape that `--shape` names, with the given sizes in place of its own.

    Raises:
        ValueError: the shape is unknown, its file is malformed, or the sizes do not fit together.
        NotImplementedError: a config.json describes a model that differs from Llama 2.
    """
    sizes = given_sizes(args)
    base = shape_named(args.shape)
    if "hidden_size" in sizes or "num_q_heads" in sizes:
        hidden_size = sizes.get("hidden_size", base.hidden_size)
        num_q_heads = sizes.get("num_q_heads", base.num_q_heads)
        if num_q_heads < 1 or hidden_size % num_q_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_q_heads ({num_q_heads}); "
                f"got {hidden_size}"
            )
        sizes["head_dim"] = hidden_size // num_q_heads
    return replace(base, **sizes)


def given_sizes(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}


def num_steps(args: argparse.Namespace) -> int:
    """Returns `--steps`, or `--alpha` times `--of-steps`, rounded.

    Raises:
        ValueError: not exactly one of `--steps` and the pair `--alpha`, `--of-steps` is given, or
            `--alpha` is not in (0, 1].
    """
    given = [args.steps is not None, args.alpha is not None, args.of_steps is not None]
    if given == [True, False, False]:
        return args.steps
    if given != [False, True, True]:
        raise ValueError(
            "steps: expected either --steps N, or --alpha SHARE and --of-steps N; got "
            f"steps={args.steps}, alpha={args.alpha}, of_steps={args.of_steps}"
        )
    steps = round(args.alpha * args.of_steps) if 0 < args.alpha <= 1 else 0
    if steps < 1:
        raise ValueError(
            f"alpha: expected a share in (0, 1] that is at least one of the {args.of_steps} steps; "
            f"got {args.alpha}"
        )
    return steps
