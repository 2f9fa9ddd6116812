"""Page pool, two levels: large pages that layouts compete for, each cut into small pages of one layout.

Hands out page ids; called by `memory.ledger` on the loop's thread. Knows neither keys, references nor bytes.

| small page | means |
|---|---|
| free | in its large page's stack |
| held | somebody reads or writes it |
| parked | nobody reads it, its bytes may be wanted again |

| large page of a layout | means |
|---|---|
| busy | has held pages |
| stuck | has held pages that may not move |
| idle | has none: as a whole it can be taken over by another layout |

A large page without held and parked pages goes back to the common level at once.
"""

from collections.abc import Iterable, Sequence, Set
from typing import cast

from ganglion.memory.retention.value import Value
from ganglion.types import PageId


class LargePages:
    """The common level: large pages that no layout holds, and how many there may be in all.

    Ids run below `max_large_pages`. Lowering the budget retires free large pages, whichever they are.
    """

    def __init__(self, num_large_pages: int, max_large_pages: int) -> None:
        assert num_large_pages <= max_large_pages, (num_large_pages, max_large_pages)
        self.budget = num_large_pages
        self.max_large_pages = max_large_pages
        self._free = list(range(num_large_pages - 1, -1, -1))  # the lowest goes first
        self._retired = list(range(max_large_pages - 1, num_large_pages - 1, -1))

    @property
    def num_large_pages(self) -> int:
        """Large pages in circulation: the budget, or more while those that are over it are in use."""
        return self.max_large_pages - len(self._retired)

    @property
    def num_free(self) -> int:
        """Large pages that no layout holds."""
        return len(self._free)

    @property
    def num_surplus(self) -> int:
        """Large pages in circulation over the budget."""
        return max(0, self.num_large_pages - self.budget)

    def open(self) -> int:
        """Give one to a layout. Raises IndexError when there is none."""
        return self._free.pop()

    def close(self, large: int) -> None:
        """A layout gives one back."""
        self._free.append(large)

    def recall(self) -> None:
        """Retired large pages circulate again, as far as the budget allows."""
        while self._retired and self.num_large_pages < self.budget:
            self._free.append(self._retired.pop())

    def retire(self) -> list[int]:
        """Take free large pages over the budget out of circulation; those are returned."""
        num_retired = min(self.num_surplus, len(self._free))
        if not num_retired:
            return []
        self._free.sort(reverse=True)
        retired = self._free[:num_retired]  # the highest: the rest stays close together
        del self._free[:num_retired]
        self._retired += retired
        return retired

    def check_integrity(self, opened: Sequence[int]) -> None:
        """Raise AssertionError unless every large page is free, retired or opened by one layout."""
        known = sorted([*self._free, *self._retired, *opened])
        assert known == list(range(self.max_large_pages)), f"lost or twice there: {known}"


class _Shelf:
    """Partly used large pages by how many of their small pages are free; both ends of that order in O(1)."""

    def __init__(self) -> None:
        self.num_free = 0  # small pages, over all
        self._by_free: dict[int, dict[int, None]] = {}
        self._mask = 0  # bit i: some large page has i free pages

    def put(self, large: int, num_free: int) -> None:
        group = self._by_free.get(num_free)
        if group:
            group[large] = None
        else:
            self._by_free[num_free] = {large: None}
            self._mask |= 1 << num_free
        self.num_free += num_free

    def drop(self, large: int, num_free: int) -> None:
        group = self._by_free[num_free]
        del group[large]
        if not group:
            del self._by_free[num_free]
            self._mask ^= 1 << num_free
        self.num_free -= num_free

    def fullest(self) -> int | None:
        mask = self._mask
        return next(iter(self._by_free[(mask & -mask).bit_length() - 1])) if mask else None

    def emptiest(self) -> int | None:
        return next(iter(self._by_free[self._mask.bit_length() - 1])) if self._mask else None

    def contents(self) -> dict[int, int]:
        """Large page -> its free pages, for check_integrity."""
        return {large: free for free, group in self._by_free.items() for large in group}


class Slabs:
    """The small pages of one layout. `page_id = large * pages_per_large + place`.

    All operations O(1) a page. A partly used large page is filled before a new one is opened: those first that cannot
    be emptied anyway, then the fullest, so that the emptiest may become empty; idle ones last.
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
        self._num_held: dict[int, int] = {}
        self._num_stuck: dict[int, int] = {}  # large page -> its small pages that may not move
        # Every opened large page with free pages is on one of these.
        self._stuck_shelf, self._busy_shelf, self._idle_shelf = _Shelf(), _Shelf(), _Shelf()

    @property
    def num_open(self) -> int:
        """Large pages that this layout holds."""
        return len(self._stacks)

    # --- small pages -------------------------------------------------------------------------------------------

    def take(self, num_pages: int) -> list[PageId]:
        """free -> held. The caller has made sure that so many are there."""
        taken: list[PageId] = []
        while num_pages:
            large = self._fullest()
            if large is None:
                large = self._idle_shelf.fullest()
            part = self._open(num_pages) if large is None else self._pop_held(large, num_pages)
            taken += part
            num_pages -= len(part)
        return taken

    def give(self, pages: Iterable[PageId], now: int) -> None:
        """held -> free."""
        per = self.pages_per_large
        large, batch = -1, list[PageId]()
        for page in pages:  # runs of one large page at once
            if page // per != large:
                if batch:
                    self._give(large, batch, now)
                large, batch = page // per, []
            batch.append(page)
        if batch:
            self._give(large, batch, now)

    def park(self, page: PageId, now: int) -> None:
        """held -> parked."""
        large = page // self.pages_per_large
        self.num_parked += 1
        if self._num_held[large] > 1:
            self._num_held[large] -= 1
        else:
            self._unshelve(large)
            self._rest(large, now)
            self._shelve(large)

    def unpark(self, page: PageId) -> None:
        """parked -> held."""
        large = page // self.pages_per_large
        self.num_parked -= 1
        if self._num_held[large]:
            self._num_held[large] += 1
        else:
            self._unshelve(large)
            self._wake(large, 1)
            self._shelve(large)

    def evict(self, page: PageId) -> None:
        """parked -> free."""
        large = page // self.pages_per_large
        self.num_parked -= 1
        self._unshelve(large)
        self._push(large, [page])

    # --- pages that change their place -------------------------------------------------------------------------

    def stick(self, page: PageId) -> None:
        """This held page may not move until `unstick`."""
        large = page // self.pages_per_large
        num_stuck = self._num_stuck.get(large, 0)
        if num_stuck:
            self._num_stuck[large] = num_stuck + 1
        else:
            self._unshelve(large)
            self._num_stuck[large] = 1
            self._shelve(large)

    def unstick(self, page: PageId) -> None:
        """This held page may move again."""
        large = page // self.pages_per_large
        num_stuck = self._num_stuck[large]
        if num_stuck > 1:
            self._num_stuck[large] = num_stuck - 1
        else:
            self._unshelve(large)
            del self._num_stuck[large]
            self._shelve(large)

    def emptiest_busy(self) -> int | None:
        """The partly used large page with the most free pages whose held pages may move; None when there is none."""
        return self._busy_shelf.emptiest()

    def emptiest_idle(self) -> int | None:
        """The same of those that have parked pages only."""
        return self._idle_shelf.emptiest()

    @property
    def num_emptiable(self) -> int:
        """Large pages that could be emptied if nothing were parked."""
        per, num_stuck = self.pages_per_large, len(self._num_stuck)
        num_held = self.num_open * per - self.num_free - self.num_parked
        num_full = -(-max(0, num_held - num_stuck * per) // per)
        return self.num_open - num_stuck - num_full

    def num_held(self, large: int) -> int:
        """Held pages of one opened large page."""
        return self._num_held[large]

    def num_live(self, large: int) -> int:
        """Held and parked pages of one opened large page."""
        return self.pages_per_large - len(self._stacks[large])

    def room_for_held(self, large: int) -> int:
        """Free pages that held pages of `large` may move to: in other large pages that are held anyway."""
        room = self._stuck_shelf.num_free + self._busy_shelf.num_free
        is_own = self._num_held[large] and large not in self._num_stuck
        return room - len(self._stacks[large]) if is_own else room

    def room_for_parked(self, large: int) -> int:
        """Free pages that parked pages of `large` may move to: in any other large page."""
        return self.num_free - len(self._stacks[large])

    def move_held(self, large: int, pages: Sequence[PageId], now: int) -> list[PageId]:
        """Held pages of `large` to free pages of others, at most `room_for_held` many; their new ids in order."""
        self._unshelve(large)
        targets: list[PageId] = []
        while len(targets) < len(pages):
            target = self._fullest()
            assert target is not None, f"no room for {len(pages) - len(targets)} held pages"
            targets += self._pop_held(target, len(pages) - len(targets))
        self._drop_held(large, pages, now)
        return targets

    def move_parked(self, large: int, pages: Sequence[PageId]) -> list[PageId]:
        """Parked pages of `large` to free pages of others, at most `room_for_parked` many; their new ids in order."""
        self._unshelve(large)
        targets: list[PageId] = []
        while len(targets) < len(pages):
            target = self._fullest()
            if target is None:
                target = self._idle_shelf.fullest()
                assert target is not None, f"no room for {len(pages) - len(targets)} parked pages"
            self._unshelve(target)
            targets += self._pop(target, len(pages) - len(targets))
            self._shelve(target)
        self._push(large, pages)
        return targets

    # --- large pages -------------------------------------------------------------------------------------------

    def pages_of(self, large: int) -> range:
        """All page ids of one large page."""
        return range(large * self.pages_per_large, (large + 1) * self.pages_per_large)

    def open_larges(self) -> Iterable[int]:
        """Large pages that this layout holds, in the order of their opening."""
        return self._stacks.keys()

    def _fullest(self) -> int | None:
        large = self._stuck_shelf.fullest()
        return self._busy_shelf.fullest() if large is None else large

    def _shelf(self, large: int) -> _Shelf:
        if large in self._num_stuck:
            return self._stuck_shelf
        return self._busy_shelf if self._num_held[large] else self._idle_shelf

    def _unshelve(self, large: int) -> None:
        """Before anything of it changes that its place on the shelves follows from."""
        stack = self._stacks[large]
        if stack:
            self._shelf(large).drop(large, len(stack))

    def _shelve(self, large: int) -> None:
        stack = self._stacks[large]
        if stack:
            self._shelf(large).put(large, len(stack))

    def _open(self, num_pages: int) -> list[PageId]:
        """A new large page, and at most so many of its pages: held."""
        large = self._large_pages.open()
        pages = self.pages_of(large)
        self._stacks[large] = cast(list[PageId], list(reversed(pages)))
        self.num_free += self.pages_per_large
        self.num_ids = max(self.num_ids, pages.stop)
        popped = self._pop(large, num_pages)
        self._num_held[large] = len(popped)
        self._shelve(large)
        return popped

    def _rest(self, large: int, now: int) -> None:
        """Its last held page is not held any more."""
        self._num_held[large] = 0
        self.num_idle += 1
        self.idle.keep(large, now)

    def _wake(self, large: int, num_held: int) -> None:
        self._num_held[large] = num_held
        self.num_idle -= 1
        self.idle.drop(large)

    def _pop(self, large: int, num_pages: int) -> list[PageId]:
        """At most so many pages off its stack."""
        stack = self._stacks[large]
        num_here = min(num_pages, len(stack))
        popped = stack[: -num_here - 1 : -1]
        del stack[-num_here:]
        self.num_free -= num_here
        return popped

    def _pop_held(self, large: int, num_pages: int) -> list[PageId]:
        self._unshelve(large)
        popped = self._pop(large, num_pages)
        if self._num_held[large]:
            self._num_held[large] += len(popped)
        else:
            self._wake(large, len(popped))
        self._shelve(large)
        return popped

    def _give(self, large: int, pages: Sequence[PageId], now: int) -> None:
        self._unshelve(large)
        self._drop_held(large, pages, now)

    def _drop_held(self, large: int, pages: Sequence[PageId], now: int) -> None:
        """held -> free, of an unshelved large page."""
        num_held = self._num_held[large] - len(pages)
        if num_held:
            self._num_held[large] = num_held
        else:
            self._rest(large, now)
        self._push(large, pages)

    def _push(self, large: int, pages: Sequence[PageId]) -> None:
        """Free pages onto the stack of an unshelved large page; the last one closes it."""
        stack = self._stacks[large]
        stack += pages
        self.num_free += len(pages)
        if len(stack) < self.pages_per_large:
            self._shelve(large)
            return
        self.num_idle -= 1
        self.idle.drop(large)
        del self._stacks[large], self._num_held[large]
        self.num_free -= self.pages_per_large
        self._large_pages.close(large)

    def check_integrity(
        self, *, held: Set[PageId], parked: Set[PageId], stuck: Set[PageId] = frozenset()
    ) -> None:
        """Raise AssertionError unless the counters and stacks agree with the pages that the ledger knows."""
        per = self.pages_per_large
        free = [page for stack in self._stacks.values() for page in stack]
        assert self.num_free == len(free) == len(set(free)), (self.num_free, len(free))
        assert self.num_parked == len(parked), (self.num_parked, len(parked))
        known = set(free) | held | parked
        assert len(known) == len(free) + len(held) + len(parked), "a page has two states"
        assert len(known) == per * self.num_open, (len(known), per, self.num_open)
        assert stuck <= held, f"stuck, but not held: {stuck - held}"
        on_shelves: dict[int, int] = {}
        num_idle = 0
        for large, stack in self._stacks.items():
            pages = self.pages_of(large)
            num_held = sum(page in held for page in pages)
            num_stuck = sum(page in stuck for page in pages)
            assert known.issuperset(pages), f"large page {large} lost one of {pages}"
            assert all(page in pages for page in stack), f"{large} has strangers: {stack}"
            assert self._num_held[large] == num_held, (large, self._num_held[large], num_held)
            assert self._num_stuck.get(large, 0) == num_stuck, (large, self._num_stuck, num_stuck)
            assert len(stack) < per, f"large page {large} is unused but not given back"
            assert self.idle.worth(large) >= 0 if not num_held else True
            num_idle += not num_held
            if stack:
                on_shelves[large] = len(stack)
                assert self._shelf(large).contents()[large] == len(stack), f"{large}: wrong shelf"
        shelves = (self._stuck_shelf, self._busy_shelf, self._idle_shelf)
        assert sum(len(shelf.contents()) for shelf in shelves) == len(on_shelves), "shelved twice"
        for shelf in shelves:
            assert shelf.num_free == sum(shelf.contents().values()), shelf.contents()
        assert self._num_held.keys() == self._stacks.keys(), "counts of closed large pages"
        assert self._num_stuck.keys() <= self._stacks.keys(), "a closed large page is stuck"
        assert self.num_idle == num_idle, (self.num_idle, num_idle)
        assert self.num_ids >= max(known, default=-1) + 1, (self.num_ids, max(known, default=-1))
