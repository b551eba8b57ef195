"""The options of `llama2 ppo`."""

import argparse
from pathlib import Path

from llama2.commands.training_options import add_folders, add_lines, add_machine, add_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, work="")
    _add_models(parser.add_argument_group("models"))
    add_lines(
        parser.add_argument_group("data"),
        form='{"messages": [{"role": …, "content": …}, …]}, the last from the user, or {"prompt": '
        '…}; "safety": true marks a safety prompt, one that provokes unsafe answers',
        bad="are not prompts or leave no room for an answer",
    )
    _add_recipe(parser.add_argument_group("recipe"))
    add_machine(parser.add_argument_group("machine"))


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for name, required, meaning in (
        ("--init", True, "the chat model to train; also the reference of the KL penalty"),
        ("--reward", True, "the reward model of helpfulness; the critic starts as a copy of it"),
        (
            "--safety-reward",
            False,
            "the reward model of safety; its reward counts for safety prompts and for answers to "
            "which it gives a probability below 0.15",
        ),
    ):
        add(name, type=Path, required=required, metavar="CHECKPOINT", help=meaning)


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    """Adds the recipe. Defaults are the paper's where it gives them; `rlhf/ppo.py` lists our own
    choices."""
    add = group.add_argument
    for name, kind, default, meaning in (
        (
            "--iterations",
            int,
            200,
            "each samples a batch of answers and trains on it; the paper: 200 to 400",
        ),
        ("--batch-size", int, 512, "answers per iteration"),
        ("--mini-batch-size", int, 64, "answers per gradient step; each is used once"),
        (
            "--micro-batch-size",
            int,
            None,
            "answers per forward pass; default: those of a whole step",
        ),
        ("--lr", float, 1e-6, "constant learning rate of policy and critic"),
        ("--weight-decay", float, 0.1, "applied to matrices, not to norms"),
        (
            "--max-grad-norm",
            float,
            1.0,
            "largest gradient norm; larger gradients are scaled down to it",
        ),
        ("--clip-range", float, 0.2, "ε of the policy and value losses"),
        (
            "--kl-weight",
            float,
            None,
            "β of the KL penalty to --init; default, as in the paper: 0.01, and 0.005 from 30B "
            "parameters on",
        ),
        ("--discount", float, 1.0, "γ of the advantages"),
        ("--trace-decay", float, 0.95, "λ of the advantages"),
        (
            "--group-size",
            int,
            0,
            "answers per prompt, compared with each other instead of by a critic (GRPO); 0: one "
            "answer, and a critic",
        ),
        ("--max-new-tokens", int, 256, "most tokens per answer"),
        ("--temperature", float, 1.0, "sampling temperature, also of the trained probabilities"),
        ("--max-batch", int, 64, "answers that each process samples at once"),
        ("--seed", int, 0, "random seed of the order of prompts and of sampling"),
        ("--save-every", int, 10, "iterations between saved states"),
    ):
        shown = "" if default is None else "; default: %(default)s"
        add(name, type=kind, default=default, metavar="X", help=meaning + shown)
    add_precision(group)
