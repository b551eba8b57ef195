"""The command `llama2 convert`: converts a checkpoint to fewer key/value heads and prints the
savings."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama2 import checkpoint
from llama2.accounting import kv_bytes_per_token, num_parameters
from llama2.checkpoint.weight_shards import MAX_SHARD_BYTES
from llama2.commands.options import integer, path
from llama2.config import ModelConfig
from llama2.conversion import METHODS, NEEDS_DATA
from llama2.convert_checkpoint import check_conversion, convert_checkpoint
from llama2.placement import add_device_option, place
from llama2.storage import is_unfinished
from llama2.tokenizer import Tokenizer, check_fits

_TOKENS = 16384  # default of --calibration-tokens
_LONGEST = 1024  # default of --seq-len


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add = parser.add_argument
    add("source", type=path, metavar="SOURCE", help="checkpoint in Hugging Face's or Meta's files")
    add("target", type=path, metavar="TARGET", help="new directory for Hugging Face's files")
    add(
        "--num-kv-heads",
        type=integer,
        required=True,
        metavar="N",
        help="a divisor of SOURCE's number of key/value heads",
    )
    add(
        "--method",
        choices=METHODS,
        default="low_rank",
        help="how heads are merged; default: %(default)s",
    )
    add(
        "--text",
        type=path,
        metavar="PATH",
        help=f"calibration text for {' and '.join(NEEDS_DATA)}: a file or a directory of texts "
        "like those that the model will read; default: Python's standard library",
    )
    add(
        "--calibration-tokens",
        type=integer,
        metavar="N",
        help=f"tokens of calibration text, a few times the model's hidden size; default: {_TOKENS}",
    )
    add(
        "--seq-len",
        type=integer,
        metavar="N",
        help=f"tokens per calibration sequence; default: {_LONGEST}, or the model's longest if "
        "shorter",
    )
    add(
        "--seed",
        type=integer,
        metavar="N",
        help="random seed of the calibration windows and of --method random; default: 0",
    )
    add(
        "--max-shard-bytes",
        type=integer,
        default=MAX_SHARD_BYTES,
        metavar="N",
        help="largest size of a weight file; default: %(default)s",
    )
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Converts a checkpoint, prints what became smaller and how to train it further, and returns 0.

    Raises:
        OSError, ValueError, ImportError, FloatingPointError: as `convert_checkpoint`, or about an
            option.
    """
    source, target, count = arguments.source, arguments.target, arguments.num_kv_heads
    config = checkpoint.load_config(source)
    unfinished = is_unfinished(target)
    if not unfinished:
        check_conversion(config, count, arguments.method, target)
    converts = count != config.num_kv_heads
    needs_data = converts and arguments.method in NEEDS_DATA
    _check_use(arguments, needs_data, needs_data or (converts and arguments.method == "random"))
    seed = arguments.seed or 0
    if seed < 0:
        raise ValueError(f"--seed: expected at least 0; got {seed}")
    calibration = _calibration(arguments, config, seed) if needs_data else None
    convert_checkpoint(
        source,
        target,
        count,
        method=arguments.method,
        calibration=calibration,
        generator=torch.Generator().manual_seed(seed),
        max_shard_bytes=arguments.max_shard_bytes,
        device=place("eager", arguments.device).device,
    )
    if unfinished:
        print(f"{target}: finished what an interrupted run had converted")
    _report(target, config, replace(config, num_kv_heads=count))
    return 0


def _check_use(arguments: argparse.Namespace, needs_data: bool, draws: bool) -> None:
    """Raises ValueError for options that would have no effect."""
    for name, used in (
        ("text", needs_data),
        ("calibration_tokens", needs_data),
        ("seq_len", needs_data),
        ("seed", draws),
    ):
        if not used and (value := getattr(arguments, name)) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected it only with a --method that uses it, to "
                f"fewer heads; got {value} with {arguments.method} to {arguments.num_kv_heads}"
            )


def _calibration(arguments: argparse.Namespace, config: ModelConfig, seed: int) -> Tensor:
    """Returns int64 `[batch, seq_len]`: windows at random places of the text's training part."""
    from llama2.train.data import corpus_documents, random_batch, token_stream

    length = arguments.seq_len
    if length is None:
        length = min(_LONGEST, config.max_seq_len)
    if not 1 <= length <= config.max_seq_len:
        raise ValueError(
            f"--seq-len: expected from 1 to the model's {config.max_seq_len}; got {length}"
        )
    num_tokens = arguments.calibration_tokens
    if num_tokens is None:
        num_tokens = _TOKENS
    if num_tokens < length:
        raise ValueError(
            f"--calibration-tokens: expected at least one sequence of {length}; got {num_tokens}"
        )
    file = arguments.source / "tokenizer.model"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: expected a SentencePiece model to tokenise the calibration text; got none. "
            "--method mean needs no text, and the function llama2.convert_checkpoint accepts "
            "tokens of another tokenizer"
        )
    documents = [document for document in corpus_documents(arguments.text) if not document.held_out]
    tokenizer = Tokenizer(file)
    check_fits(tokenizer, config.vocab_size, file)
    if tokenizer.eos_id < 0:
        raise ValueError(f"{file}: expected a tokenizer with an EOS token; got one without")
    stream = token_stream(documents, tokenizer)
    if len(stream) <= length:
        raise ValueError(
            f"--text: expected more than --seq-len ({length}) tokens; got {len(stream)}"
        )
    batch = num_tokens // length
    sizes = {"batch_size": batch, "seq_len": length}
    windows = random_batch(stream, **sizes, seed=seed, step=0)
    return windows[:, :-1]  # without the last target


def _report(target: Path, old: ModelConfig, new: ModelConfig) -> None:
    print(f"{target}, computed from the shapes:")
    for name, of in (
        ("key/value heads", lambda config: config.num_kv_heads),
        ("parameters", num_parameters),
        ("cache in 16 bits, bytes per token", kv_bytes_per_token),
    ):
        before, after = of(old), of(new)
        print(f"  {name:<34}{before:>16,} → {after:>14,}  ({after / before:.1%})")
    if new != old:
        print(
            "Conversion lowers quality. To train further for α = 5 % of the original training's N "
            f"steps, as in arXiv:2305.13245:\n  llama2 pretrain --init {shlex.quote(str(target))} "
            "--text TEXTS --alpha 0.05 --of-steps N --warmup-steps M --work WORK --out OUT\nwhere "
            "TEXTS is a directory or file of texts like those of the original training, and M a "
            "small part of those steps."
        )
