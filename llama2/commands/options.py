"""Options that several commands share, and what they ask for."""

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
from llama2.tokenizer import Tokenizer, check_fits

_LARGEST = 2**63 - 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def path(text: str) -> Path:
    """Returns a path that an option names; an empty one would be the present directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path; got ''")
    return Path(text)


def integer(text: str) -> int:
    """Returns an int of 64 bits: arithmetic on sizes and the seeds of generators take no other."""
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
    """The options of `load`, `make_generator` and `sampling`.

    Args:
        chat: the default checkpoint is the shipped chat model.
        several: --checkpoint can be repeated, and is a list.
        sampled: the default temperature is 1, not 0, and the default seed 0, not a new one.
    """
    add = parser.add_argument
    kind = "chat model" if chat else "model of Python source"
    add(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="Hugging Face's or Meta's files with tokenizer.model; "
        + (
            "repeated, their results stand side by side"
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
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="of the key/value cache: auto, the default, is the model's; fp8 and int8 round, in "
        "half the memory of 16 bits",
    )
    add(
        "--max-new-tokens",
        type=integer,
        default=max_new_tokens,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=1.0 if sampled else 0.0,
        metavar="T",
        help="default: " + ("1" if sampled else "0, the likeliest token"),
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="default: 1, no cut")
    add(
        "--seed",
        type=integer,
        default=0 if sampled else None,
        metavar="N",
        help="default: " + ("0" if sampled else "another one every time"),
    )


def load(arguments: argparse.Namespace) -> tuple[Llama2, Tokenizer]:
    """Returns the model and the tokenizer of `--checkpoint`.

    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `place`, `checkpoint.load`,
            `Tokenizer` and `check_fits`.
    """
    placement = place(arguments.backend, arguments.device)
    checkpoint.load_config(arguments.checkpoint)  # what is no checkpoint has no tokenizer either
    tokenizer = Tokenizer(arguments.checkpoint / "tokenizer.model")  # before gigabytes of weights
    if arguments.backend == "auto" or placement.interpreted:
        placement.announce()
    dtype = arguments.dtype and DTYPES[arguments.dtype]
    model = checkpoint.load(
        arguments.checkpoint, placement.ops, dtype=dtype, device=placement.device
    )
    check_fits(tokenizer, model.config.vocab_size, arguments.checkpoint)
    return model, tokenizer


def make_generator(arguments: argparse.Namespace, model: Llama2, tokenizer: Tokenizer) -> Generator:
    """It draws no id that the tokenizer lacks."""
    dtype = CACHE_DTYPES[arguments.kv_cache_dtype]
    return Generator(model, cache_dtype=dtype, vocab_size=tokenizer.vocab_size)


def sampling(arguments: argparse.Namespace) -> dict[str, float | int | None]:
    """What `generate` takes beside the prompts."""
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names}


def shape_named(name: str | None) -> ModelConfig:
    """Returns the shape that `--shape` names: a published one, that of a file, or the shipped
    model's.

    Raises:
        ValueError: there is no such shape, or its file is malformed.
        NotImplementedError: a config.json asks for other maths than Llama 2's.
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
