"""Which page of a paged cache holds what: free pages, reference counts, contents to share.

Host bookkeeping alone: no tensor, no device. Kwon et al. 2023, arXiv:2309.06180.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class OutOfPages(RuntimeError):
    """A cache has fewer free pages than were asked for. Nothing was changed."""


def page_digests(
    tokens: Sequence[int] | np.ndarray, page_size: int, before: bytes = b""
) -> Iterator[bytes]:
    """For each full page of `tokens`, a digest of all tokens from the first to the page's last.

    `before` is the digest of the page before the first, where `tokens` go on. Two prefixes with
    one digest are not to be found: it is SHA-256.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    for end in range(page_size, len(ids) + 1, page_size):
        before = hashlib.sha256(before + ids[end - page_size : end].tobytes()).digest()
        yield before


class PagePool:
    """Pages 0 … num_pages − 1, each free or referred to by one sequence or several.

    A page whose content was named stays findable by that name after its last reference is gone,
    until pages run out: then the least recently used content is forgotten first.
    """

    def __init__(self, num_pages: int) -> None:
        self._references = np.zeros(num_pages, dtype=np.int64)
        self._blank = list(reversed(range(num_pages)))  # free, with nothing worth keeping
        self._kept: OrderedDict[int, None] = OrderedDict()  # free but findable, oldest use first
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that `take` can give, those with findable content included."""
        return len(self._blank) + len(self._kept)

    @property
    def num_named(self) -> int:
        """Pages whose content can be found."""
        return len(self._page_of)

    def references(self, page: int) -> int:
        return int(self._references[page])

    def shared(self, pages: np.ndarray) -> list[int]:
        """For sequences that are about to write to `pages`, one page each: the indices of those
        that have to copy theirs, because another sequence still refers to it after the earlier
        ones in the list have made their copies."""
        found: list[int] = []
        num_left: dict[int, int] = {}
        for index in (self._references[pages] > 1).nonzero()[0].tolist():
            page = int(pages[index])
            num_left[page] = num_left.get(page, self.references(page)) - 1
            if num_left[page] > 0:
                found.append(index)
        return found

    def take(self, count: int) -> list[int]:
        """`count` pages with one reference each, whatever they hold.

        Raises:
            OutOfPages: there are fewer.
        """
        if count > self.num_free:
            raise OutOfPages(f"num_pages: expected {count} free pages; got {self.num_free}")
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._name_of.pop(page)]
            pages.append(page)
        self._references[pages] = 1
        return pages

    def refer(self, pages: Sequence[int]) -> None:
        """Adds a reference to each of `pages`, which are distinct and not free."""
        for page in pages:
            self._kept.pop(page, None)
        self._references[pages] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page of a sequence.

        From the last page to the first: a page is of use only with all those before it, so the
        last is to be forgotten first.
        """
        self._references[pages] -= 1
        for page, references in zip(pages[::-1], self._references[pages][::-1], strict=True):
            if references > 0:
                continue
            if page in self._name_of:
                self._kept[page] = None
            else:
                self._blank.append(page)

    def name(self, page: int, digest: bytes) -> None:
        """Makes a page's content findable, unless another page has it already."""
        if digest not in self._page_of:
            self._page_of[digest], self._name_of[page] = page, digest

    def forget(self) -> None:
        """Makes no content findable any more."""
        self._page_of.clear()
        self._name_of.clear()
        self._blank += reversed(self._kept)
        self._kept.clear()

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Returns the pages of the longest run of `digests`, from the first on, whose contents are
        there.

        They may be free: they hold their contents until the next `take`.
        """
        pages = []
        for digest in digests:
            if digest not in self._page_of:
                break
            pages.append(self._page_of[digest])
        return pages

    def num_taken(self, pages: Iterable[int]) -> int:
        """Returns how many of `pages` are free, so that a reference to them takes them from
        `num_free`."""
        return sum(page in self._kept for page in pages)
