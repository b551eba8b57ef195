"""The command `llama2 warm-up`: compiles what the first request would wait for."""

import argparse
import sys

import torch

import gqa_kernels
from gqa_kernels import get_backend, interpreter
from llama2 import checkpoint
from llama2.cache.kv_cache import CACHE_DTYPES
from llama2.commands.options import DTYPES, integer, path, shape_named
from llama2.config import PUBLISHED, ModelConfig
from llama2.warm_up import DEFAULT_USES, USES, call_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    add = parser.add_argument
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="of its shape and dtype; default: the small model of Python source that comes with "
        "this package",
    )
    shape.add_argument(
        "--shape",
        metavar="NAME",
        help=f"{', '.join(PUBLISHED)}, or a JSON file of ModelConfig's fields, in bfloat16",
    )
    add("--dtype", choices=DTYPES, help="another than the checkpoint's, or bfloat16")
    add(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="of the key/value cache, as the other commands take it",
    )
    add("--page-size", type=integer, default=16, metavar="N", help="of serve; default: 16")
    add(
        "--for",
        dest="uses",
        type=_uses,
        default=DEFAULT_USES,
        metavar="USE,…",
        help=f"some of {', '.join(USES)}; prefixes: prompts of serve that begin as others did and "
        f"go on for up to 16 tokens; default: {','.join(DEFAULT_USES)}",
    )
    add(
        "--arch",
        metavar="sm_NN",
        help="of a GPU that need not be there, such as sm_90; default: this machine's",
    )
    add("--jobs", type=integer, metavar="N", help="processes; default: one per CPU")


def _uses(text: str) -> tuple[str, ...]:
    uses = tuple(text.split(","))
    if unknown := [use for use in uses if use not in USES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(USES)}; got {unknown[0]!r}")
    return uses


def run(arguments: argparse.Namespace) -> int:
    """Compiles, and prints how many kernels it has compiled and how many were there.

    Returns:
        0; 1 if a kernel does not compile, which stderr names.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: about an option.
    """
    if interpreter.is_enabled():
        raise ValueError("TRITON_INTERPRET: expected it to be unset; got it set")
    if arguments.arch is None and not torch.cuda.is_available():
        raise ValueError("--arch: expected one, such as sm_90, where there is no GPU; got none")
    config, dtype = _shape(arguments)

    def call() -> None:
        call_all(
            config,
            get_backend("triton"),
            arguments.uses,
            dtype=dtype,
            device="cpu" if arguments.arch is not None else "cuda",
            cache_dtype=CACHE_DTYPES[arguments.kv_cache_dtype],
            page_size=arguments.page_size,
        )

    try:
        report = gqa_kernels.warm_up(call, arch=arguments.arch, jobs=arguments.jobs, progress=True)
    except gqa_kernels.CompilationError as error:
        print(error, file=sys.stderr)
        return 1
    print(report)
    return 0


def _shape(arguments: argparse.Namespace) -> tuple[ModelConfig, torch.dtype]:
    dtype = arguments.dtype and DTYPES[arguments.dtype]
    if arguments.shape is not None:
        return shape_named(arguments.shape), dtype or torch.bfloat16
    folder = arguments.checkpoint or checkpoint.SHIPPED
    return checkpoint.load_config(folder), dtype or checkpoint.load_dtype(folder)
