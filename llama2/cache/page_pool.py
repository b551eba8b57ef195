"""The pages of a paged cache: free pages, reference counts and contents to share.

Bookkeeping on the host only, without tensors. Kwon et al. 2023, arXiv:2309.06180.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class OutOfPages(RuntimeError):
    """A cache has fewer free pages than requested. Nothing was changed."""


def page_digests(
    tokens: Sequence[int] | np.ndarray, page_size: int, before: bytes = b""
) -> Iterator[bytes]:
    """Yields a digest of all tokens up to its end for each full page of `tokens`.

    `before` is the digest of the preceding page, if `tokens` continue a sequence. Digests are
    SHA-256, so collisions are not expected.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    for end in range(page_size, len(ids) + 1, page_size):
        before = hashlib.sha256(before + ids[end - page_size : end].tobytes()).digest()
        yield before


class PagePool:
    """Pages 0 … num_pages − 1, each free or referenced by one or more sequences.

    The content of a named page can be found by its digest even after the last reference is
    released. When pages run out, the least recently used content is dropped first.
    """

    def __init__(self, num_pages: int) -> None:
        self._references = np.zeros(num_pages, dtype=np.int64)
        self._blank = list(reversed(range(num_pages)))  # free, without content to find
        self._kept: OrderedDict[int, None] = OrderedDict()  # free but findable, oldest use first
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """The number of pages that `take` can return, including free ones with content to find."""
        return len(self._blank) + len(self._kept)

    @property
    def num_named(self) -> int:
        """The number of pages whose content can be found."""
        return len(self._page_of)

    def references(self, page: int) -> int:
        return int(self._references[page])

    def shared(self, pages: np.ndarray) -> list[int]:
        """Returns, for sequences that will write to `pages`, one page each, the indices of those
        that must copy their page first: another sequence still references it after the earlier ones
        in the list have copied theirs."""
        found: list[int] = []
        num_left: dict[int, int] = {}
        for index in (self._references[pages] > 1).nonzero()[0].tolist():
            page = int(pages[index])
            num_left[page] = num_left.get(page, self.references(page)) - 1
            if num_left[page] > 0:
                found.append(index)
        return found

    def take(self, count: int) -> list[int]:
        """Returns `count` pages with one reference each; their content is undefined.

        Raises:
            OutOfPages: fewer pages are free.
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
        """Removes one reference from each page of a sequence.

        It releases the last page first, so that it is dropped first: a page is only useful with all
        pages before it.
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
        """Records a page's content under its digest, unless another page already has it."""
        if digest not in self._page_of:
            self._page_of[digest], self._name_of[page] = page, digest

    def forget(self) -> None:
        """Drops all recorded contents."""
        self._page_of.clear()
        self._name_of.clear()
        self._blank += reversed(self._kept)
        self._kept.clear()

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Returns the pages with the contents of the longest prefix of `digests` that is present.

        The pages may be free; they keep their contents until the next `take`.
        """
        pages = []
        for digest in digests:
            if digest not in self._page_of:
                break
            pages.append(self._page_of[digest])
        return pages

    def num_taken(self, pages: Iterable[int]) -> int:
        """Returns how many of `pages` are free, by which references to them would reduce
        `num_free`."""
        return sum(page in self._kept for page in pages)
