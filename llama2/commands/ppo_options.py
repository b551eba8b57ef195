"""The options of `llama2 ppo`."""

import argparse
from pathlib import Path

from llama2.commands.training_options import add_folders, add_lines, add_machine, add_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, work="")
    _add_models(parser.add_argument_group("models"))
    add_lines(
        parser.add_argument_group("data"),
        form='{"messages": [{"role": …, "content": …}, …]}, the last from the user, or '
        '{"prompt": …}; "safety": true tags one as about safety',
        bad="are no prompt or leave no room for an answer",
    )
    _add_recipe(parser.add_argument_group("recipe"))
    add_machine(parser.add_argument_group("machine"))


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for name, required, meaning in (
        ("--init", True, "the chat model to train; the divergence is measured from it"),
        ("--reward", True, "the reward model of helpfulness; the critic begins as a copy"),
        (
            "--safety-reward",
            False,
            "the reward model of safety, whose reward counts for prompts tagged as such and for "
            "answers to which it gives a probability below 0.15",
        ),
    ):
        add(name, type=Path, required=required, metavar="CHECKPOINT", help=meaning)


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    """Defaults are the paper's where it has one; the critic's, and what else it does not say, are
    named in `rlhf/ppo.py`."""
    add = group.add_argument
    for name, kind, default, meaning in (
        (
            "--iterations",
            int,
            200,
            "each draws a batch of answers and learns from it; the paper: 200 to 400",
        ),
        ("--batch-size", int, 512, "answers per iteration"),
        ("--mini-batch-size", int, 64, "answers per gradient step; each is used once"),
        ("--micro-batch-size", int, None, "answers per forward pass; default: all of a step"),
        ("--lr", float, 1e-6, "constant learning rate, of policy and critic"),
        ("--weight-decay", float, 0.1, "of the matrices"),
        ("--max-grad-norm", float, 1.0, "to which gradients are clipped"),
        ("--clip-range", float, 0.2, "of the ratio to the old policy, and of values"),
        (
            "--kl-weight",
            float,
            None,
            "β, what a nat of divergence from --init takes off the reward; default: 0.01, as in "
            "the paper, and 0.005 from 30B parameters on",
        ),
        ("--discount", float, 1.0, "γ of the advantages"),
        ("--trace-decay", float, 0.95, "λ of the advantages"),
        (
            "--group-size",
            int,
            0,
            "answers to each prompt, which are compared with each other instead of with a critic; "
            "0: one answer, and a critic",
        ),
        ("--max-new-tokens", int, 256, "of an answer"),
        ("--temperature", float, 1.0, "at which answers are drawn and trained"),
        ("--max-batch", int, 64, "answers that are drawn at once, in each process"),
        ("--seed", int, 0, "of the prompts' order and of what is drawn"),
        ("--save-every", int, 10, "iterations between states"),
    ):
        shown = "" if default is None else "; default: %(default)s"
        add(name, type=kind, default=default, metavar="X", help=meaning + shown)
    add_precision(group)
