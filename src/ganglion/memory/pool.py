"""Page pool, two levels: large pages that layouts compete for, each cut into small pages of one layout.

Hands out page ids; called by `memory.ledger` on the loop's thread. Knows neither keys, references nor bytes.

| small page | means |
|---|---|
| free | in its large page's stack |
| held | somebody reads or writes it |
| parked | nobody reads it, its bytes may be wanted again |

A large page without held pages is *idle*: as a whole it can be taken over by another layout. One without held and
parked pages goes back to the common level at once.
"""

from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import cast

from ganglion.memory.retention.value import Value
from ganglion.types import PageId


class LargePages:
    """The common level: large pages that no layout holds."""

    def __init__(self, num_large_pages: int) -> None:
        self.num_large_pages = num_large_pages
        self._free = list(range(num_large_pages - 1, -1, -1))  # the lowest goes first

    @property
    def num_free(self) -> int:
        """Large pages that no layout holds."""
        return len(self._free)

    def open(self) -> int:
        """Give one to a layout. Raises IndexError when there is none."""
        return self._free.pop()

    def close(self, large: int) -> None:
        """A layout gives one back."""
        self._free.append(large)

    def free_set(self) -> set[int]:
        """For check_integrity."""
        assert len(set(self._free)) == len(self._free), f"a large page is free twice: {self._free}"
        return set(self._free)


class Slabs:
    """The small pages of one layout. `page_id = large * pages_per_large + place`.

    All operations O(1) a page. A partially used large page is filled before a new one is opened, the longest partial
    one first.
    """

    def __init__(self, large_pages: LargePages, *, pages_per_large: int, idle: Value) -> None:
        self.pages_per_large = pages_per_large
        self.num_free = 0  # in opened large pages
        self.num_parked = 0
        self.num_idle = 0
        self.num_ids = 0  # every id handed out so far is below it
        self.idle = idle
        self._large_pages = large_pages
        self._stacks: dict[int, list[PageId]] = {}  # opened large page -> its free small pages
        self._partial: OrderedDict[int, None] = OrderedDict()  # those with a non-empty stack
        self._num_held: dict[int, int] = {}

    @property
    def num_open(self) -> int:
        """Large pages that this layout holds."""
        return len(self._stacks)

    def take(self, num_pages: int) -> list[PageId]:
        """free -> held. The caller has made sure that so many are there."""
        taken: list[PageId] = []
        while num_pages:
            large = next(iter(self._partial), None)
            if large is None:
                large = self._open()
            elif not self._num_held[large]:
                self._wake(large)
            stack = self._stacks[large]
            num_here = min(num_pages, len(stack))
            taken += stack[: -num_here - 1 : -1]
            del stack[-num_here:]
            self._num_held[large] += num_here
            if not stack:
                del self._partial[large]
            self.num_free -= num_here
            num_pages -= num_here
        return taken

    def give(self, pages: Iterable[PageId], now: int) -> None:
        """held -> free."""
        per = self.pages_per_large
        for page in pages:
            large = page // per
            num_held = self._num_held[large] = self._num_held[large] - 1
            self._push(large, page)
            if not num_held and large in self._stacks:
                self._rest(large, now)

    def park(self, page: PageId, now: int) -> None:
        """held -> parked."""
        large = page // self.pages_per_large
        num_held = self._num_held[large] = self._num_held[large] - 1
        self.num_parked += 1
        if not num_held:
            self._rest(large, now)

    def unpark(self, page: PageId) -> None:
        """parked -> held."""
        large = page // self.pages_per_large
        self.num_parked -= 1
        if not self._num_held[large]:
            self._wake(large)
        self._num_held[large] += 1

    def evict(self, page: PageId) -> None:
        """parked -> free."""
        large = page // self.pages_per_large
        self.num_parked -= 1
        self._push(large, page)
        if large not in self._stacks:
            self._wake(large)

    def pages_of(self, large: int) -> range:
        """All page ids of one large page."""
        return range(large * self.pages_per_large, (large + 1) * self.pages_per_large)

    def open_larges(self) -> Iterable[int]:
        """Large pages that this layout holds, in the order of their opening."""
        return self._stacks.keys()

    def _open(self) -> int:
        large = self._large_pages.open()
        pages = self.pages_of(large)
        self._stacks[large] = cast(list[PageId], list(reversed(pages)))
        self._partial[large] = None
        self._num_held[large] = 0
        self.num_free += self.pages_per_large
        self.num_ids = max(self.num_ids, pages.stop)
        return large

    def _rest(self, large: int, now: int) -> None:
        """Its last held page is not held any more."""
        self.num_idle += 1
        self.idle.keep(large, now)

    def _wake(self, large: int) -> None:
        self.num_idle -= 1
        self.idle.drop(large)

    def _push(self, large: int, page: PageId) -> None:
        stack = self._stacks[large]
        if not stack:
            self._partial[large] = None
        stack.append(page)
        self.num_free += 1
        if len(stack) == self.pages_per_large:
            del self._stacks[large], self._partial[large], self._num_held[large]
            self.num_free -= self.pages_per_large
            self._large_pages.close(large)

    def check_integrity(self, *, held: Set[PageId], parked: Set[PageId]) -> None:
        """Raise AssertionError unless the counters and stacks agree with the pages that the ledger knows."""
        per = self.pages_per_large
        free = [page for stack in self._stacks.values() for page in stack]
        assert self.num_free == len(free) == len(set(free)), (self.num_free, len(free))
        assert self.num_parked == len(parked), (self.num_parked, len(parked))
        known = set(free) | held | parked
        assert len(known) == len(free) + len(held) + len(parked), "a page has two states"
        assert len(known) == per * self.num_open, (len(known), per, self.num_open)
        idle = set()
        for large, stack in self._stacks.items():
            pages = self.pages_of(large)
            num_held = sum(page in held for page in pages)
            assert known.issuperset(pages), f"large page {large} lost one of {pages}"
            assert all(page in pages for page in stack), f"{large} has strangers: {stack}"
            assert self._num_held[large] == num_held, (large, self._num_held[large], num_held)
            assert (large in self._partial) == bool(stack), f"{large}: partial or not? {stack}"
            assert len(stack) < per, f"large page {large} is unused but not given back"
            if not num_held:
                idle.add(large)
        assert self._partial.keys() <= self._stacks.keys(), "a closed large page is partial"
        assert self._num_held.keys() == self._stacks.keys(), "counts of closed large pages"
        assert self.num_idle == len(idle), (self.num_idle, idle)
        assert self.num_ids >= max(known, default=-1) + 1, (self.num_ids, max(known, default=-1))
