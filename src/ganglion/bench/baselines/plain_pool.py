"""Baseline of bench pool: the plain page allocator that one writes first. Called by `bench.pool`.

One level: one kind of page, a list of free ids, dictionaries for references and keys, an OrderedDict as the queue of
eviction. It has no layouts, owners, pins, epochs or large pages, so it does less than the ledger for its time.
"""

from collections import OrderedDict
from collections.abc import Sequence

from ganglion.errors import OutOfPagesError
from ganglion.memory.prefix import PageKey
from ganglion.types import PageId


class PlainPool:
    """Pages with reference counts; keyed pages stay until room is needed, least recently used first."""

    def __init__(self, num_pages: int) -> None:
        self._free = [PageId(page) for page in range(num_pages - 1, -1, -1)]
        self._num_refs: dict[PageId, int] = {}
        self._keys: dict[PageId, PageKey] = {}
        self._page_of: dict[PageKey, PageId] = {}
        self._cached: OrderedDict[PageId, None] = OrderedDict()

    def reserve(self, num_pages: int) -> tuple[PageId, ...]:
        """Fresh pages with one reference each; evicts. All or nothing."""
        if num_pages > len(self._free) + len(self._cached):
            raise OutOfPagesError(
                kind="plain", need=num_pages, free=len(self._free), evictable=len(self._cached)
            )
        while len(self._free) < num_pages:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._keys.pop(page)]
            self._free.append(page)
        pages = tuple([self._free.pop() for _ in range(num_pages)])
        for page in pages:
            self._num_refs[page] = 1
        return pages

    def commit(self, pages: Sequence[PageId], keys: Sequence[PageKey]) -> None:
        """Make the pages findable; a known key stays with its page."""
        for page, key in zip(pages, keys, strict=True):
            if key not in self._page_of:
                self._page_of[key] = page
                self._keys[page] = key

    def match(self, keys: Sequence[PageKey]) -> tuple[PageId, ...]:
        """The longest known prefix, one reference each."""
        pages: list[PageId] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            num_refs = self._num_refs.get(page, 0)
            if not num_refs:
                del self._cached[page]
            self._num_refs[page] = num_refs + 1
            pages.append(page)
        return tuple(pages)

    def retain(self, pages: Sequence[PageId]) -> None:
        """One more reference each."""
        for page in pages:
            self._num_refs[page] += 1

    def release(self, pages: Sequence[PageId]) -> None:
        """One reference less each."""
        for page in reversed(pages):
            num_refs = self._num_refs[page] - 1
            if num_refs:
                self._num_refs[page] = num_refs
            else:
                del self._num_refs[page]
                if page in self._keys:
                    self._cached[page] = None
                else:
                    self._free.append(page)
