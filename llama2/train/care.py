"""Filtering of training data as in Llama 2's paper: excluded sources, removed personal information,
no duplicate documents; with counts.

Reference: Touvron et al. 2023, arXiv:2307.09288, section 2.1.
"""

import fnmatch
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from llama2.terminal import counted
from llama2.train.data import Document
from llama2.train.near_duplicates import NearDuplicates, near_duplicates
from llama2.train.redaction import Redactor

__all__ = ["Care", "CareCounts", "NearDuplicates", "Redactor", "is_excluded", "near_duplicates"]

_LIBRARIES = {"redact": ("phonenumbers", "publicsuffixlist"), "near_duplicates": ("datasketch",)}


@dataclass
class CareCounts:
    """What was done to the documents of a source.

    Attributes:
        documents: kept documents.
        excluded: documents left out by a pattern.
        redacted: placeholders in the kept documents, by kind.
        near_duplicates: documents left out because they are near-duplicates of earlier ones.
    """

    documents: int = 0
    excluded: int = 0
    redacted: Counter[str] = field(default_factory=Counter)
    near_duplicates: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"redacted": dict(sorted(self.redacted.items()))}


def described(counts: dict[str, Any]) -> str:
    """Returns a readable summary of what `CareCounts.to_json` says was left out or replaced; may be
    empty."""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts["redacted"].items())
    parts = (
        f"{counted(counts['excluded'], 'document')} excluded" if counts["excluded"] else "",
        f"redacted: {kinds}" if kinds else "",
        f"{counted(counts['near_duplicates'], 'near-duplicate')} dropped"
        if counts["near_duplicates"]
        else "",
    )
    return "; ".join(filter(None, parts))


def is_excluded(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Returns whether one of a document's names, such as its path in its corpus and the corpus's
    name, matches one of the shell patterns.

    `*` matches any characters, including "/": `*.md` matches at every depth, `private/*` everything
    below. Patterns are case-sensitive.
    """
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


class Care:
    """Filters and redacts documents, one corpus after another, and counts what it does.

    Args:
        exclude: patterns of `is_excluded`.
        redact: the region of a `Redactor`, or None for no redaction.
        threshold: of `NearDuplicates`, or None to keep near-duplicates; a corpus is also compared
            with earlier ones.
    Raises:
        ImportError, ValueError: as `Redactor` and `NearDuplicates`.
    """

    def __init__(
        self,
        exclude: Sequence[str] = (),
        redact: str | None = None,
        threshold: float | None = None,
    ) -> None:
        self.options = {"exclude": list(exclude), "redact": redact, "near_duplicates": threshold}
        self._redactor = None if redact is None else Redactor(redact)
        self._kept = None if threshold is None else NearDuplicates(threshold)
        self._used: set[str] = set()
        self._trained_on: set[bytes] = set()

    def __bool__(self) -> bool:
        """Returns whether there is anything to do."""
        return any(value not in ([], None) for value in self.options.values())

    def described(self) -> dict[str, Any]:
        """Returns the options, and the versions of the libraries that the result depends on."""
        libraries = (
            library
            for option, names in _LIBRARIES.items()
            if self.options[option] is not None
            for library in names
        )
        return self.options | {"libraries": {library: version(library) for library in libraries}}

    def excludes(self, *names: str) -> bool:
        """Returns `is_excluded` and records which patterns matched."""
        matching = [pattern for pattern in self.options["exclude"] if is_excluded(names, [pattern])]
        self._used.update(matching)
        return bool(matching)

    def report_unused(self) -> None:
        """Reports on stderr the patterns that matched nothing, which may be misspelt."""
        for pattern in self.options["exclude"]:
            if pattern not in self._used:
                print(f"exclude: no document or source matches {pattern!r}", file=sys.stderr)

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """Redacts a text as `Redactor`; returns it unchanged without redaction."""
        return (text, Counter()) if self._redactor is None else self._redactor.redact(text)

    def repeats(self, text: str, *, held_out: bool = False) -> bool:
        """Returns whether a text is a repetition: with a threshold, a near-duplicate of an earlier
        text; if it is held out, an exact or near duplicate of a training text. Remembers the
        training texts that are kept."""
        is_near = self._kept is not None and self._kept.is_near(text, keep=not held_out)
        digest = hashlib.sha256(text.encode()).digest()
        if held_out:
            return is_near or digest in self._trained_on
        if not is_near:
            self._trained_on.add(digest)
        return is_near

    def training(
        self, name: str, documents: Sequence[Document]
    ) -> tuple[list[Document], CareCounts]:
        """Returns the documents of a training corpus that are kept, redacted."""
        counts, kept = CareCounts(), []
        for document, redacted in self._cleaned(name, documents, counts):
            if self.repeats(document.text):
                counts.near_duplicates += 1
                continue
            counts.redacted += redacted
            kept.append(document)
        counts.documents = len(kept)
        return kept, counts

    def evaluation(
        self, name: str, documents: Sequence[Document], counts: CareCounts
    ) -> list[Document]:
        """Returns the held-out documents that are kept, redacted. Call it after all training
        documents.

        It leaves out, and counts in `near_duplicates`, exact duplicates of training documents and,
        with a threshold, near-duplicates. Held-out documents are not compared with each other.
        """
        kept = []
        for document, redacted in self._cleaned(name, documents, counts):
            if self.repeats(document.text, held_out=True):
                counts.near_duplicates += 1
                continue
            counts.redacted += redacted
            kept.append(document)
        counts.documents += len(kept)
        return kept

    def _cleaned(
        self, name: str, documents: Sequence[Document], counts: CareCounts
    ) -> Iterator[tuple[Document, Counter[str]]]:
        """Yields the documents that no pattern excludes, with counts of redactions."""
        slow = self._redactor is not None or self._kept is not None
        settings = {"unit": "document", "leave": False, "disable": not (slow and documents)}
        for document in tqdm(documents, desc=f"cleaning {name}", **settings):
            if self.excludes(document.path, name):
                counts.excluded += 1
            else:
                text, redacted = self.redact(document.text)
                yield replace(document, text=text), redacted
