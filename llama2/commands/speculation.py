"""Options of speculative decoding, and the note on what it gained."""

import argparse
import sys

from llama2 import checkpoint
from llama2.commands.options import DTYPES, path
from llama2.generate import Generator
from llama2.placement import place
from llama2.speculation import DraftModel, PromptLookup, Speculation, check_num_tokens
from llama2.tokenizer import Tokenizer, check_same


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `speculation` reads."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--prompt-lookup",
        type=_num_tokens,
        metavar="N",
        help="decode speculatively: draft N tokens per step, from 1 to 15, that followed the "
        "latest tokens earlier in the text; the text is the same as without, up to rounding",
    )
    either.add_argument(
        "--draft",
        type=path,
        metavar="DIR",
        help="decode speculatively: a smaller checkpoint with the same tokenizer drafts tokens; "
        "the text is the same as without, up to rounding",
    )
    parser.add_argument(
        "--draft-tokens",
        type=_num_tokens,
        metavar="N",
        help=f"tokens per step from --draft, from 1 to 15; default: {DraftModel.num_tokens}",
    )


def _num_tokens(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = text
    try:
        check_num_tokens(number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("num_tokens: ")) from error
    return number


def check_options(arguments: argparse.Namespace) -> None:
    """Checks what can be checked before the weights of the model are read.

    Raises:
        OSError, ValueError, NotImplementedError: --draft names no checkpoint of Llama 2, or
            --draft-tokens comes without --draft.
    """
    if arguments.draft is not None:
        checkpoint.load_config(arguments.draft)
    elif arguments.draft_tokens is not None:
        raise ValueError("--draft-tokens: expected --draft DIR with it; got none")


def speculation(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Speculation | None:
    """Returns what options describe that `check_options` accepts; loads the draft model on the
    model's device.

    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `options.load`; or the draft
            model's tokenizer differs.
    """
    if arguments.prompt_lookup is not None:
        return PromptLookup(arguments.prompt_lookup)
    if arguments.draft is None:
        return None
    file = arguments.draft / "tokenizer.model"
    check_same(tokenizer, Tokenizer(file), file)
    placement = place(arguments.backend, arguments.device)
    dtype = arguments.dtype and DTYPES[arguments.dtype]
    model = checkpoint.load(arguments.draft, placement.ops, dtype=dtype, device=placement.device)
    if arguments.draft_tokens is None:
        return DraftModel(model)
    return DraftModel(model, arguments.draft_tokens)


def report(generator: Generator) -> None:
    """Prints to stderr what speculation gained in the generator's latest call, if it made steps."""
    counts = generator.statistics
    if counts is not None and counts.num_steps:
        print(
            f"speculation: {counts.tokens_per_step:.2f} new tokens per step of a sequence, after "
            f"its first token ({counts.num_new_tokens} in {counts.num_steps})",
            file=sys.stderr,
        )
