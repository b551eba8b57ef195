"""The `llama2` command: its subcommands and the reporting of their errors."""

import argparse
import importlib
import io
import shlex
import sys
from collections.abc import Callable

from gqa_kernels import __version__
from llama2.commands import (
    align_options,
    answer,
    chat,
    convert,
    evaluate_options,
    generate,
    ghost_attention,
    obedience,
    plot_options,
    ppo_options,
    pretrain_options,
    rejection_sample,
    reward_options,
    serve_offline,
    sft_options,
    tradeoff_options,
    warm_up,
)
from llama2.extras import how_to_install
from llama2.placement import add_device_option
from llama2.terminal import COMPLAINTS, complain, discard, notes

Run = Callable[[argparse.Namespace], int]

_EXAMPLES = """examples:
  llama2 generate --prompt "def main():" --max-new-tokens 64
  llama2 chat --checkpoint DIR --temperature 0.6 --top-p 0.9
  llama2 serve-offline --prompts prompts.jsonl --out results.jsonl --max-batch 64
  llama2 evaluate --checkpoint DIR --tasks hellaswag,arc_easy --out results.json
  llama2 pretrain --work build/run --out build/model --steps 2000 --warmup-steps 100 --text DIR
  llama2 sft --work build/sft --out build/chat --init DIR --data dialogues.jsonl --bf16
  llama2 reward --work build/rm --out build/reward --data comparisons.jsonl --batch-size 64
  llama2 ppo --work build/ppo --out build/aligned --init DIR --reward RM --data prompts.jsonl
  llama2 ghost-attention --checkpoint DIR --data dialogues.jsonl --out ghost.jsonl
  llama2 obedience --checkpoint BEFORE --checkpoint AFTER --data held_out.jsonl --out obeyed.jsonl
  llama2 answer --checkpoint DIR --data held_out.jsonl --out answers.jsonl --sheet sheet.html
  llama2 rejection-sample --checkpoint DIR --reward DIR --data p.jsonl --samples 16 --out r.jsonl
  llama2 plot build/run build/other-run --out build/runs.svg
  llama2 align --preset cpu --out build/align
  llama2 convert Llama-2-7b-hf Llama-2-7b-gqa8 --num-kv-heads 8
  llama2 tradeoff --preset none --out build/paper --shape 70B --gpu H100
  llama2 warm-up --checkpoint DIR --arch sm_90
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`; the default is the process's.

    Returns:
        The exit status: 0; 1 if part of the work failed, as the command describes, for example if a
            kernel of warm-up does not compile; 2 after a one-line error message on stderr about the
            user's input; 130 after Ctrl-C.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal lacks becomes "?"
        sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    with notes():
        arguments = _parser().parse_args(argv)
        arguments.command_line = shlex.join(["llama2", *argv])
        return _answered(arguments)


def _answered(arguments: argparse.Namespace) -> int:
    try:
        if sys.stdout is None and _prints(arguments):
            raise ValueError("stdout: expected an open one for the result; got a closed one")
        status = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a failing flush at exit could not be reported
        return status
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        _let_go_of_stdout()
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except COMPLAINTS as error:
        _let_go_of_stdout()
        return complain("llama2", error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # PyTorch's error on a CPU
            raise
        return complain("llama2", error)


def _prints(arguments: argparse.Namespace) -> bool:
    """Returns whether a command prints its result to stdout, not only to a file."""
    return arguments.run is not serve_offline.run or serve_offline.is_stdout(arguments.out)


def _let_go_of_stdout() -> None:
    """Drops output that cannot be written; otherwise Python would try again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        discard(sys.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama2",
        description="Llama 2 on PyTorch's functions or on Triton kernels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_line, add_arguments, run in (
        ("generate", "continue a text", generate.add_arguments, generate.run),
        ("chat", "chat with a model", chat.add_arguments, chat.run),
        (
            "serve-offline",
            "continue a file of prompts",
            serve_offline.add_arguments,
            serve_offline.run,
        ),
        (
            "evaluate",
            "evaluate a model on tasks of lm-eval",
            evaluate_options.add_arguments,
            _on_request("evaluate", "evaluation"),
        ),
        (
            "demo",
            "compare the backends eager and triton on the shipped model",
            add_device_option,
            _on_request("demo", "models"),
        ),
        (
            "pretrain",
            "train a model from scratch or from a checkpoint",
            pretrain_options.add_arguments,
            _on_request("pretrain", "models"),
        ),
        (
            "sft",
            "fine-tune a model on dialogues",
            sft_options.add_arguments,
            _on_request("sft", "models"),
        ),
        (
            "reward",
            "train a reward model on pairs of answers",
            reward_options.add_arguments,
            _on_request("reward", "models"),
        ),
        (
            "ppo",
            "train a chat model by PPO against reward models",
            ppo_options.add_arguments,
            _on_request("ppo", "models"),
        ),
        (
            "ghost-attention",
            "make dialogues that train a model to keep following an instruction",
            ghost_attention.add_arguments,
            ghost_attention.run,
        ),
        (
            "obedience",
            "measure for how many turns a model follows an instruction",
            obedience.add_arguments,
            obedience.run,
        ),
        (
            "answer",
            "answer held-out dialogues and compare with their answers",
            answer.add_arguments,
            answer.run,
        ),
        (
            "rejection-sample",
            "sample answers and keep the one with the highest reward",
            rejection_sample.add_arguments,
            rejection_sample.run,
        ),
        (
            "plot",
            "draw the training logs of runs",
            plot_options.add_arguments,
            _on_request("plot", "plot"),
        ),
        (
            "align",
            "run every stage of making a chat model, on a small model",
            align_options.add_arguments,
            _on_request("align", "align"),
        ),
        (
            "convert",
            "convert a checkpoint to fewer key/value heads",
            convert.add_arguments,
            convert.run,
        ),
        (
            "tradeoff",
            "compare numbers of key/value heads in speed, memory and quality",
            tradeoff_options.add_arguments,
            _on_request("tradeoff", "tradeoff"),
        ),
        (
            "warm-up",
            "compile a model's kernels before its first call",
            warm_up.add_arguments,
            warm_up.run,
        ),
    ):
        command = commands.add_parser(name, help=help_line)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _on_request(name: str, extra: str) -> Run:
    """Returns the `run` of a command whose module is imported on the call, as it needs an extra's
    packages."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            module = importlib.import_module(f"llama2.commands.{name}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("llama2", "gqa_kernels"):
                raise
            raise ImportError(
                f"llama2 {name} needs {error.name}; {how_to_install(extra)}"
            ) from error
        return module.run(arguments)

    return run


if __name__ == "__main__":
    sys.exit(main())
