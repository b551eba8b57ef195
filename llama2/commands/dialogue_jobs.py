"""What commands share that ask a model about each dialogue of a file and can be interrupted."""

import argparse
import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llama2.chat_format import FORMATS, Message
from llama2.checkout import made_with
from llama2.commands.caches import add_cache_options, make_cache
from llama2.commands.json_lines import Complaints, lock_output, resume
from llama2.commands.options import add_generation_options, load, path
from llama2.finetune.dialogues import Dialogue, dialogue_files, printable_name, read_dialogues
from llama2.finetune.sampling import Sampler, Settings, encode_for
from llama2.stops import stop_ids
from llama2.storage import write_text
from llama2.taught_format import taught_format

_BEGIN = b'{"place": "'  # of every line of results


def add_job_options(
    parser: argparse.ArgumentParser, *, data: str, out: str, several: bool = False
) -> None:
    """The options of the functions below.

    Args:
        data: what dialogues the command takes.
        out: what a line of --out is.
        several: checkpoints, as of `add_generation_options`.
    """
    add_generation_options(parser, max_new_tokens=256, chat=True, several=several)
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


def read_data(arguments: argparse.Namespace, complaints: Complaints) -> list[Dialogue]:
    """The dialogues of --data; each other line is a complaint.

    Raises:
        ValueError: --out is one of the files, or would be the next time, or is no file.
        OSError: there is no such file.
    """
    data, out = arguments.data, arguments.out
    is_read = any(out.exists() and file.samefile(out) for file in dialogue_files(data))
    # Path.resolve raises RuntimeError where a link leads to itself; opening it names the file.
    place = os.path.realpath(out)
    if is_read or (
        data.is_dir() and out.suffix == ".jsonl" and os.path.samefile(os.path.dirname(place), data)
    ):
        raise ValueError(f"--out: expected another file than --data's; got {out}")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out: expected a file that can be read again; got {out}")
    for name in ("summary", "sheet"):
        other = getattr(arguments, name, None)
        if other is not None and os.path.realpath(other) in {place, os.path.realpath(data)}:
            raise ValueError(f"--{name}: expected another file than --out and --data; got {other}")
    return list(read_dialogues(data, complaints.add))


class Key(NamedTuple):
    """What a result is of.

    Attributes:
        place: FILE:LINE, without the file's directory.
        checkpoint: as --checkpoint names it.
    """

    place: str
    checkpoint: str


def place_of(dialogue: Dialogue) -> str:
    return f"{printable_name(dialogue.file)}:{dialogue.line}"


def key_of(dialogue: Dialogue, checkpoint: Path) -> Key:
    return Key(place_of(dialogue), str(checkpoint))


class Results:
    """The lines of --out.

    Attributes:
        done: the records that are there.
    """

    def __init__(self, file: TextIO, done: dict[Key, dict[str, Any]], end: int) -> None:
        self.done = done
        self._file, self._end = file, end
        self._is_begun = False

    def begin(self) -> None:
        """Cuts a half-written last line: only once nothing about the options can be wrong."""
        if not self._is_begun:
            self._file.truncate(self._end)
            self._is_begun = True

    def write(self, key: Key, record: dict[str, Any]) -> None:
        record = key._asdict() | record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self.done[key] = record


@contextmanager
def results(
    out: Path,
    dialogues: Iterable[Dialogue],
    keys: Iterable[str],
    *,
    checkpoint: Path | None = None,
) -> Iterator[Results]:
    """The file --out, held so that no other run writes to it.

    Args:
        dialogues: those that are to be in it.
        keys: what a record has, beside others; "messages" among them.
        checkpoint: whose results alone it may hold; None means of any.
    Raises:
        ValueError: another run holds it; it has something else than such records, or one of another
            question than the dialogue's at its place, or of another checkpoint.
    """
    asked = {place_of(dialogue): _questions(dialogue.messages) for dialogue in dialogues}
    done: dict[Key, dict[str, Any]] = {}

    def take(record: Any) -> None:
        if not {*Key._fields, *keys} <= record.keys() or not isinstance(record["place"], str):
            raise ValueError
        done[Key(record["place"], record["checkpoint"])] = record
        _questions(record["messages"])

    with out.open("a", encoding="utf-8") as file:
        lock_output(file)
        end = resume(out, take, _is_begun)
        for key, record in done.items():
            if checkpoint is not None and key.checkpoint != str(checkpoint):
                raise ValueError(
                    f"--out: expected results of {checkpoint}; got those of {key.checkpoint} in "
                    f"{out}: another checkpoint needs another file"
                )
            found = _questions(record["messages"])
            if key.place in asked and found != asked[key.place][: len(found)]:
                raise ValueError(
                    f"--out: expected results of these dialogues; got one of another dialogue at "
                    f"{key.place} in {out}"
                )
        yield Results(file, done, end)


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
    """The model of --checkpoint, with a cache for the dialogues at hand.

    Args:
        whole: all answers of a dialogue are asked for, not its last alone.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `load` and `make_cache`; or an
            option about sampling is wrong.
    """
    model, tokenizer = load(arguments)
    form = arguments.format or taught_format(arguments.checkpoint)
    lengths = []
    for dialogue in dialogues:
        most, messages = model.config.max_seq_len, dialogue.messages[:-1]
        try:
            ids = encode_for(
                tokenizer,
                messages,
                form,
                most,
                system_in_every_turn=system_in_every_turn,
            )
        except ValueError:  # said when it is asked
            lengths.append(most)
            continue
        num_answers = len(dialogue.trained) if whole else 1
        lengths.append(len(ids) + num_answers * arguments.max_new_tokens)
    settings = Settings(
        arguments.max_new_tokens,
        stop_ids(tokenizer, arguments.checkpoint),
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        form,
    )
    return Sampler(model, tokenizer, make_cache(arguments, model, lengths), settings)


def write_summary(arguments: argparse.Namespace, counted: dict[str, Any]) -> None:
    """Writes what was counted to --summary, if that is given, with what made it."""
    if arguments.summary is not None:
        summary = {"data": str(arguments.data)} | counted | {"made_with": made_with(arguments)}
        write_text(arguments.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def with_checkpoint(arguments: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """The options for one of several checkpoints."""
    arguments = copy.copy(arguments)
    arguments.checkpoint = checkpoint
    return arguments
