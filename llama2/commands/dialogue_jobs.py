"""What commands share that ask a model about each dialogue of a file and can be interrupted."""

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llama2.chat_format import FORMATS, Message
from llama2.checkout import made_with
from llama2.checkpoint import weights_crc32
from llama2.commands.caches import add_cache_options, make_cache
from llama2.commands.json_lines import Complaints, lock_output, resume
from llama2.commands.options import add_generation_options, load, path
from llama2.finetune.dialogues import (
    Dialogue,
    Refuse,
    dialogue_files,
    printable_name,
    read_dialogues,
)
from llama2.finetune.sampling import Sampler, Settings, encode_for
from llama2.model import Llama2
from llama2.rlhf.prompts import TaggedPrompt
from llama2.stops import stop_ids
from llama2.storage import write_text
from llama2.taught_format import taught_format
from llama2.tokenizer import Tokenizer

Asked = TypeVar("Asked", Dialogue, TaggedPrompt)

WRITTEN = ("out", "all_samples", "summary", "sheet")  # options that name files to be written
_WEIGHTS = "weights_crc32"  # of a result
_BEGIN = b'{"place": "'  # of every line of results


def add_job_options(
    parser: argparse.ArgumentParser,
    *,
    data: str,
    out: str,
    several: bool = False,
    sampled: bool = False,
) -> None:
    """The options of the functions below.

    Args:
        data: what dialogues the command takes.
        out: what a line of --out is.
        several, sampled: as of `add_generation_options`.
    """
    add_generation_options(parser, max_new_tokens=256, chat=True, several=several, sampled=sampled)
    add = parser.add_argument
    add(
        "--data",
        type=path,
        required=True,
        metavar="PATH",
        help=f'JSON lines {{"messages": [{{"role": …, "content": …}}, …]}} or a directory of '
        f"*.jsonl: {data}",
    )
    add(
        "--out",
        type=path,
        required=True,
        metavar="FILE",
        help=f"{out}; written as they finish, in no certain order. Dialogues that are there "
        'already, by their "place", are not done again',
    )
    add(
        "--format",
        choices=FORMATS,
        help="of the prompts; default: the one that the checkpoint was taught, otherwise chat",
    )
    add_cache_options(parser)


def read_data(
    arguments: argparse.Namespace,
    complaints: Complaints,
    read: Callable[[Path, Refuse], Iterable[Asked]] = read_dialogues,
) -> list[Asked]:
    """Returns the dialogues of --data, or what else `read` makes of its lines; each other line is a
    complaint.

    Raises:
        ValueError: --out, or what else is written, is one of the files, or would be the next time,
            or is no file; or two of what is written are one file.
        OSError: there is no such file.
    """
    data, places = arguments.data, {}
    for name in WRITTEN:
        written = getattr(arguments, name, None)
        if written is None:
            continue
        check_apart(option_of(name), written, "--data", data)
        # Path.resolve raises RuntimeError where a link leads to itself; opening it names the file.
        other = places.setdefault(os.path.realpath(written), option_of(name))
        if other != option_of(name):
            raise ValueError(
                f"{option_of(name)}: expected another file than {other}'s; got {written}"
            )
    return list(read(data, complaints.add))


def check_apart(option: str, out: Path, source_option: str, source: Path) -> None:
    """Raises a ValueError unless results can be written to `out`, a file that can be read again
    and is none of those that `source` names, not the next time either.

    Args:
        source: a file of JSON lines or a directory of *.jsonl.
    """
    is_read = any(out.exists() and file.samefile(out) for file in dialogue_files(source))
    folder = os.path.dirname(os.path.realpath(out))
    if is_read or (source.is_dir() and out.suffix == ".jsonl" and os.path.samefile(folder, source)):
        raise ValueError(f"{option}: expected another file than {source_option}'s; got {out}")
    if out.exists() and not out.is_file():
        raise ValueError(f"{option}: expected a file that can be read again; got {out}")


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class Key(NamedTuple):
    """What a result is of.

    Attributes:
        place: FILE:LINE, without the file's directory.
        checkpoint: as --checkpoint names it.
    """

    place: str
    checkpoint: str


def place_of(asked: Dialogue | TaggedPrompt) -> str:
    return f"{printable_name(asked.file)}:{asked.line}"


def key_of(asked: Dialogue | TaggedPrompt, checkpoint: Path) -> Key:
    return Key(place_of(asked), str(checkpoint))


class Results:
    """The lines of --out.

    Attributes:
        done: the records that are there.
    """

    def __init__(
        self, file: FileIO, done: dict[Key, dict[str, Any]], end: int, weights: Mapping[str, str]
    ) -> None:
        self.done = done
        self._file, self._end, self._weights = file, end, weights
        self._is_begun = False

    def begin(self) -> None:
        """Cuts a half-written last line: only once nothing about the options can be wrong."""
        if not self._is_begun:
            self._file.truncate(self._end)
            self._is_begun = True

    def write(self, key: Key, record: dict[str, Any]) -> None:
        record = key._asdict() | {_WEIGHTS: self._weights[key.checkpoint]} | record
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:  # which names no file
            raise OSError(f"{self._file.name}: expected to write a result; {error}") from error
        self.done[key] = record


def weights_of(*checkpoints: Path) -> dict[str, str]:
    """Returns the CRC-32 of the weights of checkpoints, by their names in options; reads all of
    them."""
    return {str(checkpoint): weights_crc32(checkpoint) for checkpoint in checkpoints}


@contextmanager
def results(
    out: Path,
    asked: Iterable[Dialogue | TaggedPrompt],
    keys: Iterable[str],
    weights: Mapping[str, str],
    *,
    settings: Mapping[str, Any] | None = None,
    option: str = "--out",
) -> Iterator[Results]:
    """A file of results, held so that no other run writes to it.

    Args:
        asked: what is to be in it.
        keys: what a record has, beside others; "messages" among them.
        weights: `weights_of` the models that are asked; records say which weights those have.
        settings: what every record has to say, such as the "checkpoint", under some of these keys.
        option: that names the file.
    Raises:
        ValueError: another run holds it; it has something else than such records, or one of another
            question than the one asked at its place, of other settings, or of other weights.
    """
    questions = {place_of(each): _questions(each.messages) for each in asked}
    done: dict[Key, dict[str, Any]] = {}

    def take(record: Any) -> None:
        if not {*Key._fields, *keys} <= record.keys() or not isinstance(record["place"], str):
            raise ValueError
        done[Key(record["place"], record["checkpoint"])] = record
        _questions(record["messages"])

    # Unbuffered: what could not be written is not tried once more when the file is closed.
    with out.open("ab", buffering=0) as file:
        lock_output(file, option=option)
        end = resume(out, take, _is_begun, option=option)
        for key, record in done.items():
            wanted = dict(settings or {})
            if key.checkpoint in weights:
                wanted[_WEIGHTS] = weights[key.checkpoint]
            difference = next(_differences(wanted, record), None)
            if difference is not None:
                name, wanted, found = difference
                raise ValueError(
                    f"{option}: expected results with {name} {wanted}; {out} has results with "
                    f"{name} {found}. Name another file, or ask as when this one was begun"
                )
            found = _questions(record["messages"])
            if key.place in questions and found != questions[key.place][: len(found)]:
                raise ValueError(
                    f"{option}: expected results of these dialogues; got one of another dialogue "
                    f"at {key.place} in {out}"
                )
        yield Results(file, done, end, weights)


def _differences(
    settings: Mapping[str, Any], record: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(name, what is wanted, what a record says) of settings, nested ones too, that it says
    otherwise."""
    for name, wanted in settings.items():
        found = record.get(name)
        if isinstance(wanted, Mapping) and isinstance(found, Mapping):
            yield from _differences(wanted, found)
        elif found != wanted:
            yield name, wanted, found


def _questions(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [
        (message["role"], message["content"])
        for message in messages
        if message["role"] != "assistant"
    ]


def _is_begun(raw: bytes) -> bool:
    return raw.startswith(_BEGIN) or _BEGIN.startswith(raw)


def make_sampler(
    arguments: argparse.Namespace,
    dialogues: Iterable[Dialogue],
    *,
    whole: bool,
    system_in_every_turn: bool = False,
) -> Sampler:
    """Returns the model of --checkpoint, with a cache for the dialogues at hand.

    Args:
        whole: all answers of a dialogue are asked for, not its last alone.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `load` and `sampler_for`.
    """
    asked = [
        (dialogue.messages[:-1], len(dialogue.trained) if whole else 1) for dialogue in dialogues
    ]
    return sampler_for(
        arguments, *load(arguments), asked, system_in_every_turn=system_in_every_turn
    )


def sampler_for(
    arguments: argparse.Namespace,
    model: Llama2,
    tokenizer: Tokenizer,
    asked: Iterable[tuple[Sequence[Message], int]],
    *,
    num_samples: int = 1,
    system_in_every_turn: bool = False,
) -> Sampler:
    """Returns a model with a cache for what it will be asked.

    Args:
        asked: of each sequence, the messages before its last answer and the number of answers that
            the model gives in it.
        num_samples: how often each is asked.
    Raises:
        ValueError, NotImplementedError: as `make_cache`; or an option about sampling is wrong.
    """
    form, most = form_of(arguments), model.config.max_seq_len
    lengths = []
    for messages, num_answers in asked:
        try:
            ids = encode_for(
                tokenizer, messages, form, most, system_in_every_turn=system_in_every_turn
            )
        except ValueError:  # said when it is asked
            lengths += [most] * num_samples
            continue
        lengths += [len(ids) + num_answers * arguments.max_new_tokens] * num_samples
    settings = Settings(
        arguments.max_new_tokens,
        stop_ids(tokenizer, arguments.checkpoint),
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        form,
    )
    return Sampler(model, tokenizer, make_cache(arguments, model, lengths), settings)


def form_of(arguments: argparse.Namespace) -> str:
    """--format, or what it stands for where it is not given."""
    return arguments.format or taught_format(arguments.checkpoint)


def write_summary(arguments: argparse.Namespace, counted: dict[str, Any]) -> None:
    """Writes what was counted to --summary, if that is given, with what made it."""
    if arguments.summary is not None:
        summary = {"data": str(arguments.data)} | counted | {"made_with": made_with(arguments)}
        write_text(arguments.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def with_checkpoint(arguments: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """Returns the options for one of several checkpoints."""
    arguments = copy.copy(arguments)
    arguments.checkpoint = checkpoint
    return arguments
