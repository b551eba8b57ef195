"""Options that several commands share, and the objects that they describe."""

import argparse
import math
from pathlib import Path

import torch

from llama2 import checkpoint
from llama2.cache.kv_cache import CACHE_DTYPES
from llama2.checkpoint import SHIPPED, SHIPPED_CHAT
from llama2.checkpoint.files import Settings
from llama2.checkpoint.hf import CONFIG_FILE, read_config
from llama2.config import PUBLISHED, ModelConfig
from llama2.generate import Generator
from llama2.model import Llama2
from llama2.placement import add_options, place
from llama2.speculation import Speculation
from llama2.tokenizer import Tokenizer, check_fits

_LARGEST = 2**63 - 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def path(text: str) -> Path:
    """Returns the path that an option names; refuses the empty path, which is the working
    directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path; got ''")
    return Path(text)


def integer(text: str) -> int:
    """Returns an int of 64 bits, the range of sizes and of random seeds."""
    try:
        number = int(text)
    except ValueError:  # also of thousands of digits
        number = None
    if number is None or abs(number) > _LARGEST:
        raise argparse.ArgumentTypeError(
            f"expected an int from -{_LARGEST} to {_LARGEST}; got {text!r:.60}"
        )
    return number


def number(text: str) -> float:
    """Returns a finite float."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number; got {text!r:.60}")
    return value


def add_generation_options(
    parser: argparse.ArgumentParser,
    max_new_tokens: int,
    *,
    chat: bool = False,
    several: bool = False,
    sampled: bool = False,
) -> None:
    """Adds the options that `load`, `make_generator` and `sampling` read.

    Args:
        chat: the default checkpoint is the shipped chat model.
        several: --checkpoint can be repeated; its value is a list.
        sampled: the default temperature is 1, not 0, and the default seed 0, not a new one.
    """
    add = parser.add_argument
    kind = "chat model" if chat else "model of Python source"
    add(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="directory with Hugging Face's or Meta's files and tokenizer.model; "
        + (
            "repeat it to compare checkpoints side by side"
            if several
            else f"default: a small {kind} that comes with this package"
        ),
        **(
            {"action": "append", "required": True}
            if several
            else {"default": SHIPPED_CHAT if chat else SHIPPED}
        ),
    )
    add_options(parser)
    add("--dtype", choices=DTYPES, help="dtype of the weights; default: the checkpoint's")
    add(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="dtype of the key/value cache: auto, the default, is the model's dtype; fp8 and int8 "
        "quantise the cache, which takes half the memory of 16 bits",
    )
    add(
        "--max-new-tokens",
        type=integer,
        default=max_new_tokens,
        metavar="N",
        help="the most new tokens per sequence; default: %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=1.0 if sampled else 0.0,
        metavar="T",
        help="sampling temperature; default: " + ("1" if sampled else "0, the likeliest token"),
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling; default: 1, off")
    add(
        "--seed",
        type=integer,
        default=0 if sampled else None,
        metavar="N",
        help="random seed; default: " + ("0" if sampled else "a new one each time"),
    )


def load(arguments: argparse.Namespace) -> tuple[Llama2, Tokenizer]:
    """Returns the model and the tokenizer of `--checkpoint`.

    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `place`, `checkpoint.load`,
            `Tokenizer` and `check_fits`.
    """
    placement = place(arguments.backend, arguments.device)
    checkpoint.load_config(arguments.checkpoint)  # so that the error is not about the tokenizer
    tokenizer = Tokenizer(arguments.checkpoint / "tokenizer.model")  # before gigabytes of weights
    if arguments.backend == "auto" or placement.interpreted:
        placement.announce()
    dtype = arguments.dtype and DTYPES[arguments.dtype]
    model = checkpoint.load(
        arguments.checkpoint, placement.ops, dtype=dtype, device=placement.device
    )
    check_fits(tokenizer, model.config.vocab_size, arguments.checkpoint)
    return model, tokenizer


def make_generator(
    arguments: argparse.Namespace,
    model: Llama2,
    tokenizer: Tokenizer,
    speculation: Speculation | None,
) -> Generator:
    """Returns a generator that never samples an id which the tokenizer lacks."""
    settings = {"cache_dtype": CACHE_DTYPES[arguments.kv_cache_dtype], "speculation": speculation}
    return Generator(model, vocab_size=tokenizer.vocab_size, **settings)


def sampling(arguments: argparse.Namespace) -> dict[str, float | int | None]:
    """Returns the keyword arguments of `generate`."""
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names}


def shape_named(name: str | None) -> ModelConfig:
    """Returns the shape that `--shape` names: a published one, that of a file, or the shipped
    model's.

    Raises:
        ValueError: the name is unknown, or the file is malformed.
        NotImplementedError: a config.json describes a model that differs from Llama 2.
    """
    if name is None:
        return read_config(SHIPPED)
    if name in PUBLISHED:
        return PUBLISHED[name]
    file = Path(name)
    if not file.is_file():
        raise ValueError(
            f"shape: expected one of {', '.join(PUBLISHED)} or a JSON file; got {name!r}"
        )
    if file.name == CONFIG_FILE:
        return read_config(file.parent)
    settings = Settings.read(file)
    try:
        return settings.model_config(**settings)
    except TypeError as error:
        raise ValueError(f"{file}: expected the fields of ModelConfig; {error}") from error
