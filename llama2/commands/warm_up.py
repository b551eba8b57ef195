"""The command `llama2 warm-up`: compiles the kernels that the first request would wait for."""

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
    """Adds the options of `run`."""
    add = parser.add_argument
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="compile for its shape and dtype; default: the small model of Python source that "
        "comes with this package",
    )
    shape.add_argument(
        "--shape",
        metavar="NAME",
        help=f"compile for a published shape in bfloat16 ({', '.join(PUBLISHED)}), or for that of "
        "a JSON file of ModelConfig's fields",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights; default: the checkpoint's, or bfloat16 with --shape",
    )
    add(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="dtype of the key/value cache, as for the other commands",
    )
    add(
        "--page-size",
        type=integer,
        default=16,
        metavar="N",
        help="tokens per page of serve's cache; default: 16",
    )
    add(
        "--for",
        dest="uses",
        type=_uses,
        default=DEFAULT_USES,
        metavar="USE,…",
        help=f"what to compile for: some of {', '.join(USES)}; speculation: drafted tokens of "
        "generate and chat; prefixes: up to 16 tokens of a prompt of serve after a shared prefix "
        "or an earlier chunk; default: "
        f"{','.join(DEFAULT_USES)}",
    )
    add(
        "--arch",
        metavar="sm_NN",
        help="compile for this GPU architecture, such as sm_90, without such a GPU; default: this "
        "machine's GPU",
    )
    add("--jobs", type=integer, metavar="N", help="compiler processes; default: one per CPU")


def _uses(text: str) -> tuple[str, ...]:
    uses = tuple(text.split(","))
    if unknown := [use for use in uses if use not in USES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(USES)}; got {unknown[0]!r}")
    return uses


def run(arguments: argparse.Namespace) -> int:
    """Compiles the kernels and prints how many it compiled and how many were compiled before.

    Returns:
        0; 1 if a kernel does not compile; stderr names it.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: about an option.
    """
    if interpreter.is_enabled():
        raise ValueError("TRITON_INTERPRET: expected an unset variable; got a set one")
    if arguments.arch is None and not torch.cuda.is_available():
        raise ValueError(
            "--arch: expected an architecture, such as sm_90, on a machine without a GPU; got none"
        )
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
