"""The model card of a checkpoint: its training data and method, from the record of its run."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from llama2.storage import write_text
from llama2.terminal import counted
from llama2.train.care import described

NAME = "README.md"

_SIGNED = re.compile(r"(?s)(.*)<!-- run (\w+), SHA-256 of what is above (\w{64}) -->\n")


def write_card(out: Path, text: str, run_id: str) -> None:
    """Writes README.md with a last line that identifies the run.

    It keeps an existing file, and reports that on stderr, unless this run wrote it and nobody has
    changed it since.
    """
    file = out / NAME
    if not _is_free(file, run_id):
        print(
            f"{file}: kept, as this run did not write it; training.json describes the training of "
            "the checkpoint",
            file=sys.stderr,
        )
        return
    # File names may contain any bytes.
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    write_text(file, f"{text}\n<!-- run {run_id}, SHA-256 of what is above {_sum(text)} -->\n")


def _is_free(file: Path, run_id: str) -> bool:
    if not (file.exists() or file.is_symlink()):
        return True
    if not file.is_file() or file.is_symlink():
        return False
    found = _SIGNED.fullmatch(file.read_bytes().decode(errors="replace"))
    return bool(found) and found[2] == run_id and found[3] == _sum(found[1][:-1])


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def card(name: str, made_by: str, record: dict[str, Any]) -> str:
    """Returns the card of a checkpoint, in Markdown.

    Args:
        name: the model's name.
        made_by: the command that trained it.
        record: as training.json: parameters, init, tokens_seen, sources, care, held_out,
            final_train_loss, command.
    """
    start = f"the weights of {_quoted(record['init'])}" if record["init"] else "random weights"
    lines = [
        f"# {_escaped(name)}",
        "",
        f"{record['parameters']:,} parameters, trained by {made_by} from {start} on "
        f"{record['tokens_seen']:,} tokens; training loss {record['final_train_loss']:.4f} over "
        "the last steps.",
        "",
        "## Data",
        "",
        "| source | tokens | epochs | documents | excluded | redacted | near-duplicates dropped |",
        "|---|--:|--:|--:|--:|---|--:|",
        *(_row(source, counts) for source, counts in record["sources"].items()),
        "",
        "Tokens are the tokens of training, with repetitions; epochs are passes over the source, "
        "more than one if its weight is large.",
        "",
        *(f"- {line}" for line in _care(record["care"])),
        f"- {_held_out(record)}",
    ]
    if record["command"]:
        lines += ["", "## Command", "", *(f"    {line}" for line in record["command"].splitlines())]
    return "\n".join(lines) + "\n"


def _row(source: str, counts: dict[str, Any]) -> str:
    name = _quoted(Path(source).name).replace("|", "\\|")  # it would end a table cell
    cells = [name, f"{counts['tokens']:,}", f"{counts['epochs']:.2f}"]
    if "documents" in counts:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts["redacted"].items())
        numbers = [f"{counts[key]:,}" for key in ("documents", "excluded", "near_duplicates")]
        cells += [*numbers[:2], kinds or "0", numbers[2]]
    else:
        cells += ["token shards"] + ["–"] * 3
    return f"| {' | '.join(cells)} |"


def _care(care: dict[str, Any]) -> list[str]:
    """Returns a line for each option of care."""
    libraries = care["libraries"]
    patterns = ", ".join(map(_quoted, care["exclude"]))
    lines = [f"Excluded documents and sources: {patterns}" if patterns else "Nothing was excluded."]
    if care["redact"]:
        names = ", ".join(f"{name} {libraries[name]}" for name in libraries if name != "datasketch")
        lines.append(
            "E-mail addresses, telephone numbers and IP addresses were replaced by placeholders "
            f"({names}; national telephone numbers: {care['redact']}). Names, postal addresses and "
            "what the patterns do not match remain."
        )
    else:
        lines.append("Personal information was not redacted.")
    if care["near_duplicates"]:
        lines.append(
            f"Texts that share {care['near_duplicates']:g} or more of their five-word sequences "
            f"with an earlier one were dropped (datasketch {libraries['datasketch']})."
        )
    else:
        lines.append("Near-duplicates were not looked for.")
    return lines


def _held_out(record: dict[str, Any]) -> str:
    figures, counts = record["held_out"], record["care"].get("held_out")
    if not figures:
        return "Nothing was held out."
    done = described(counts) if counts else ""
    return (
        f"Held out: {figures['bits_per_byte']:.4f} bits per byte over "
        f"{counted(figures['documents'], 'document')} of {figures['bytes']:,} bytes"
        + (f" ({done})." if done else ".")
    )


def _quoted(text: str) -> str:
    """Returns the text as Markdown code, whatever characters it contains."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))
