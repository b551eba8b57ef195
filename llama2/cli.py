"""The `llama2` command: its subcommands, and what becomes of their errors."""

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
    """Runs the command line `argv`, by default the process's.

    Returns:
        The exit status: 0; 1 if the demo's backends differ or a kernel of warm-up does not compile;
        2 after a one-line complaint on stderr about what the user gave; 130 after Ctrl-C.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows "?"
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
            sys.stdout.flush()  # Python's own at exit comes too late for a complaint
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _let_go_of_stdout()
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except COMPLAINTS as error:
        _let_go_of_stdout()
        return complain("llama2", error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # as a CPU says it
            raise
        return complain("llama2", error)


def _prints(arguments: argparse.Namespace) -> bool:
    """Returns whether a command's result goes to stdout, and not to a file alone."""
    return arguments.run is not serve_offline.run or serve_offline.is_stdout(arguments.out)


def _let_go_of_stdout() -> None:
    """What cannot be written is dropped: Python would try once more at exit."""
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
        ("chat", "converse with a chat model", chat.add_arguments, chat.run),
        (
            "serve-offline",
            "continue a file of prompts",
            serve_offline.add_arguments,
            serve_offline.run,
        ),
        (
            "evaluate",
            "measure a model by tasks of lm-eval",
            evaluate_options.add_arguments,
            _on_request("evaluate", "evaluation"),
        ),
        (
            "demo",
            "the backends eager and triton side by side on the shipped model",
            add_device_option,
            _on_request("demo", "models"),
        ),
        (
            "pretrain",
            "train a model from scratch or go on with one",
            pretrain_options.add_arguments,
            _on_request("pretrain", "models"),
        ),
        (
            "sft",
            "teach a model to answer, by dialogues",
            sft_options.add_arguments,
            _on_request("sft", "models"),
        ),
        (
            "reward",
            "teach a model which of two answers is preferred",
            reward_options.add_arguments,
            _on_request("reward", "models"),
        ),
        (
            "ppo",
            "teach a chat model what reward models reward",
            ppo_options.add_arguments,
            _on_request("ppo", "models"),
        ),
        (
            "ghost-attention",
            "dialogues that teach a chat model to go on obeying",
            ghost_attention.add_arguments,
            ghost_attention.run,
        ),
        (
            "obedience",
            "how long a chat model obeys an instruction",
            obedience.add_arguments,
            obedience.run,
        ),
        (
            "answer",
            "answer held-out dialogues and compare",
            answer.add_arguments,
            answer.run,
        ),
        (
            "rejection-sample",
            "the best of several answers by a reward model",
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
            "all stages of a chat model's making, in small",
            align_options.add_arguments,
            _on_request("align", "align"),
        ),
        (
            "convert",
            "a checkpoint with fewer key/value heads",
            convert.add_arguments,
            convert.run,
        ),
        (
            "tradeoff",
            "what each number of key/value heads costs",
            tradeoff_options.add_arguments,
            _on_request("tradeoff", "tradeoff"),
        ),
        (
            "warm-up",
            "compile a model's kernels ahead of its first call",
            warm_up.add_arguments,
            warm_up.run,
        ),
    ):
        command = commands.add_parser(name, help=help_line)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _on_request(name: str, extra: str) -> Run:
    """`run` of a command whose module is imported only now: it needs packages of an extra."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            module = importlib.import_module(f"llama2.commands.{name}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("llama2", "gqa_kernels"):
                raise
            raise ImportError(
                f"llama2 {name} needs {error.name}: pip install gqa-kernels[{extra}]"
            ) from error
        return module.run(arguments)

    return run


if __name__ == "__main__":
    sys.exit(main())
