"""What the resumable commands share that ask a model about each dialogue of a file."""

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

WRITTEN = ("out", "all_samples", "summary", "sheet")  # options that name output files
_WEIGHTS = "weights_crc32"  # key of a result
_BEGIN = b'{"place": "'  # of every line of results


def add_job_options(
    parser: argparse.ArgumentParser,
    *,
    data: str,
    out: str,
    several: bool = False,
    sampled: bool = False,
) -> None:
    """Adds the options that the functions of this module read.

    Args:
        data: which dialogues the command accepts.
        out: what --out receives.
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
        help=f"{out}; written as they finish, in any order. Dialogues that the file has "
        'already, by their "place", are skipped',
    )
    add(
        "--format",
        choices=FORMATS,
        help="format of the prompts; default: the one that the checkpoint was trained on, "
        "otherwise chat",
    )
    add_cache_options(parser)


def read_data(
    arguments: argparse.Namespace,
    complaints: Complaints,
    read: Callable[[Path, Refuse], Iterable[Asked]] = read_dialogues,
) -> list[Asked]:
    """Returns the dialogues of --data, or what else `read` returns for its lines, and reports bad
    lines.

    Raises:
        ValueError: an output file is one of the input files, or a later run would read it as one,
            or it is not a regular file; or two outputs are the same file.
        OSError: --data does not exist.
    """
    data, places = arguments.data, {}
    for name in WRITTEN:
        written = getattr(arguments, name, None)
        if written is None:
            continue
        check_apart(option_of(name), written, "--data", data)
        # Path.resolve raises RuntimeError for a link to itself; opening it raises an error that
        # names it.
        other = places.setdefault(os.path.realpath(written), option_of(name))
        if other != option_of(name):
            raise ValueError(
                f"{option_of(name)}: expected a file other than {other}'s; got {written}"
            )
    return list(read(data, complaints.add))


def check_apart(option: str, out: Path, source_option: str, source: Path) -> None:
    """Raises ValueError unless `out` is a file that can be read back and that neither this run nor
    a later one reads as part of `source`.

    Args:
        source: a file of JSON lines or a directory of *.jsonl.
    """
    is_read = any(out.exists() and file.samefile(out) for file in dialogue_files(source))
    folder = os.path.dirname(os.path.realpath(out))
    if is_read or (source.is_dir() and out.suffix == ".jsonl" and os.path.samefile(folder, source)):
        raise ValueError(f"{option}: expected a file other than {source_option}'s; got {out}")
    if out.exists() and not out.is_file():
        raise ValueError(f"{option}: expected a regular file, which can be read back; got {out}")


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class Key(NamedTuple):
    """What a result belongs to.

    Attributes:
        place: FILE:LINE, without the file's directory.
        checkpoint: the value of --checkpoint.
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
        done: the records that the file has.
    """

    def __init__(
        self, file: FileIO, done: dict[Key, dict[str, Any]], end: int, weights: Mapping[str, str]
    ) -> None:
        self.done = done
        self._file, self._end, self._weights = file, end, weights
        self._is_begun = False

    def begin(self) -> None:
        """Cuts a partial last line off. Call it once all options have been checked."""
        if not self._is_begun:
            self._file.truncate(self._end)
            self._is_begun = True

    def write(self, key: Key, record: dict[str, Any]) -> None:
        record = key._asdict() | {_WEIGHTS: self._weights[key.checkpoint]} | record
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:  # its message names no file
            raise OSError(f"{self._file.name}: expected to write a result; {error}") from error
        self.done[key] = record


def weights_of(*checkpoints: Path) -> dict[str, str]:
    """Returns the CRC-32 of each checkpoint's weights, by the checkpoint's path; reads all
    weights."""
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
    """Opens a file of results and locks it against other runs.

    Args:
        asked: the dialogues or prompts whose results it will contain.
        keys: keys that every record has; "messages" is one of them.
        weights: `weights_of` the models that are asked, which records store.
        settings: values that every record must have under some of these keys, such as "checkpoint".
        option: the option that names the file.
    Raises:
        ValueError: another run holds the lock; or the file contains something other than such
            records, or a record with another question at its place, other settings or other
            weights.
    """
    questions = {place_of(each): _questions(each.messages) for each in asked}
    done: dict[Key, dict[str, Any]] = {}

    def take(record: Any) -> None:
        if not {*Key._fields, *keys} <= record.keys() or not isinstance(record["place"], str):
            raise ValueError
        done[Key(record["place"], record["checkpoint"])] = record
        _questions(record["messages"])

    # Unbuffered, so that closing the file does not retry a failed write.
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
                    f"{option}: expected results with {name} {wanted}; got {name} {found} in "
                    f"{out}. Name another file, or use the options with which this file was begun"
                )
            found = _questions(record["messages"])
            if key.place in questions and found != questions[key.place][: len(found)]:
                raise ValueError(
                    f"{option}: expected results of these dialogues; got another dialogue at "
                    f"{key.place} in {out}"
                )
        yield Results(file, done, end, weights)


def _differences(
    settings: Mapping[str, Any], record: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, wanted, found) of each setting, nested ones too, that a record has
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
    """Returns a sampler for the model of --checkpoint, with a cache for the given dialogues.

    Args:
        whole: all answers of a dialogue are sampled, not only the last.
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
    """Returns a sampler for a model, with a cache for what it will be asked.

    Args:
        asked: for each sequence, the messages before its last answer, and the number of answers
            that the model gives.
        num_samples: answers to each question.
    Raises:
        ValueError, NotImplementedError: as `make_cache`; or a sampling option is wrong.
    """
    form, most = form_of(arguments), model.config.max_seq_len
    lengths = []
    for messages, num_answers in asked:
        try:
            ids = encode_for(
                tokenizer, messages, form, most, system_in_every_turn=system_in_every_turn
            )
        except ValueError:  # reported when it is asked
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
    """Returns --format, or its default for the checkpoint."""
    return arguments.format or taught_format(arguments.checkpoint)


def write_summary(arguments: argparse.Namespace, counted: dict[str, Any]) -> None:
    """Writes the counts, and what made them, to --summary, if that is given."""
    if arguments.summary is not None:
        summary = {"data": str(arguments.data)} | counted | {"made_with": made_with(arguments)}
        write_text(arguments.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def with_checkpoint(arguments: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """Returns the options with one of several checkpoints."""
    arguments = copy.copy(arguments)
    arguments.checkpoint = checkpoint
    return arguments
