"""Which pages of the cache are whose: references, what may be reused, what goes first when all are taken. No tensors.

pool = PagePool(1000)                   # pages 1 to 1000; page 0 is nobody's
page = pool.take()                      # held once; None when every page is held
pool.register(page, key)                # its 16 tokens, and all before them, are named by `key`
pool.release([page])                    # kept for whoever asks for the same prefix, until the room is needed
pages = pool.match(prefix_keys(ids))    # the longest known prefix, held once more
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from slingshot.engine.batch import PAGE


def prefix_keys(token_ids: Sequence[int], after: bytes = b"") -> Iterator[bytes]:
    """A name for every full page of a sequence, made of its tokens and, through `after`, of all tokens before it.

    16 bytes of BLAKE2b: nobody finds two prefixes of one name, so nobody reads another's cache.
    """
    ids = array("q", token_ids)
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        after = hashlib.blake2b(after + ids[start : start + PAGE].tobytes(), digest_size=16).digest()
        yield after


class PagePool:
    """Pages 1 to `count`, each held by any number of sequences. A page that nobody holds is free, or kept under the key
    of its prefix; the prefixes that were not asked for longest give way first, a prefix's last page before its first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._held = [0] * (count + 1)  # by how many sequences
        self._untouched = 1  # pages from here on were never taken: their memory is not there yet
        self._free: list[int] = []
        self._kept: OrderedDict[int, None] = OrderedDict()  # the page to give away first comes first
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + self.count + 1 - self._untouched + len(self._kept)

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.count - self.available

    @property
    def kept(self) -> int:
        """Pages that nobody holds but a later prompt may reuse."""
        return len(self._kept)

    def take(self) -> int | None:
        """A page of one's own, with whatever content; None when all are held."""
        if self._free:
            page = self._free.pop()
        elif self._untouched <= self.count:
            page = self._untouched
            self._untouched += 1
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._pages[self._keys.pop(page)]
        else:
            return None
        self._held[page] = 1
        return page

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that are held already, or kept, once more."""
        for page in pages:
            self._held[page] += 1
            self._kept.pop(page, None)

    def shared(self, page: int) -> bool:
        """Whether more than one sequence holds it: to be copied before it is written to."""
        return self._held[page] > 1

    def release(self, pages: Sequence[int]) -> None:
        """Give each up once."""
        for page in reversed(pages):
            self._held[page] -= 1
            if not self._held[page]:
                if page in self._keys:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """The page is full and stands for this prefix from now on, unless another one does."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest registered prefix; the caller holds them now."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        self.hold(pages)
        return pages

    def forget(self) -> None:
        """No content is reused any more: the weights have changed."""
        self._free += self._kept
        self._kept.clear()
        self._keys.clear()
        self._pages.clear()

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one place. O(pages); the engine calls it when idle."""
        free, kept = set(self._free), set(self._kept)
        touched = range(1, self._untouched)
        assert len(free) == len(self._free) and not free & kept and all(page < self._untouched for page in free | kept)
        assert all((self._held[page] == 0) == (page in free or page in kept) for page in touched)
        assert self._keys.keys() >= kept and self._pages == {key: page for page, key in self._keys.items()}
        assert not self._keys.keys() & free
