"""Ledger: who holds which page. Match, reserve, commit, release, copy-on-write; all in ints.

Called by the engine on the loop's thread. Knows no bytes (it returns copy orders for those who do), no requests, no
models, no time but its own count of events.

| page | references | key | may be evicted |
|---|---|---|---|
| private | >= 1 | no | no |
| shared | >= 1 | yes | no |
| cached | 0 | yes | yes, the least valuable first |
| free | 0 | no | - |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from ganglion.errors import FieldError, OutOfPagesError
from ganglion.layout import PoolLayout
from ganglion.memory.book import Book
from ganglion.memory.compact import Itinerary, cheapest_victim
from ganglion.memory.orders import CopyOrder, Holder, Moves, Writable
from ganglion.memory.pool import LargePages, Slabs
from ganglion.memory.prefix import PageKey
from ganglion.memory.retention.lru import Lru
from ganglion.memory.retention.value import Value
from ganglion.types import LivePage, PageId, PoolStats

SHARED = "shared"
CACHED = "cached"
PINNED = "pinned"


class _Idle(NamedTuple):
    """A large page without readers."""

    book: Book
    large: int
    worth: float


class Ledger:
    """Page ids are unique within a layout only: a page is always named with its layout."""

    def __init__(
        self,
        layout: PoolLayout,
        num_large_pages: int,
        *,
        max_large_pages: int | None = None,
        value: Callable[[], Value] = Lru,
    ) -> None:
        """`max_large_pages`: what the budget may be raised to; by default `num_large_pages`."""
        self._layout = layout
        self._large_pages = LargePages(num_large_pages, max_large_pages or num_large_pages)
        self._books = {
            small.name: Book(
                layout=small,
                slabs=Slabs(
                    self._large_pages,
                    pages_per_large=layout.pages_per_large(small.name),
                    idle=value(),
                ),
                cached=value(),
            )
            for small in layout.layouts
        }
        self._holders: dict[Holder, None] = {}
        self._num_events = 0  # the clock of `Value`
        self._num_reservations = 0
        self._num_hits = self._num_misses = 0

    # --- shared pages ----------------------------------------------------------------------------------------

    def match(
        self, layout_name: str, keys: Sequence[PageKey], *, owner: str = SHARED
    ) -> tuple[PageId, ...]:
        """The longest prefix of `keys` whose pages are committed; each returned page gets one reference."""
        book = self._books[layout_name]
        page_of, num_refs, owners = book.page_of, book.num_refs, book.owners
        pages: list[PageId] = []
        for key in keys:
            page = page_of.get(key)
            if page is None:
                break
            if not num_refs[page]:
                book.cached.drop(key)
                book.slabs.unpark(page)
                owners[page] = owner
            elif owners[page] != owner:
                owners[page] = SHARED
            num_refs[page] += 1
            pages.append(page)
        self._num_hits += len(pages)
        self._num_misses += len(keys) - len(pages)
        return tuple(pages)

    def commit(
        self, layout_name: str, page_ids: Sequence[PageId], keys: Sequence[PageKey] | None
    ) -> None:
        """The pages' contents are valid. With keys: `match` finds them from now on.

        A key that is known already stays with its page: the new page remains private. A keyed page is never written
        again (see `writable`).
        """
        book = self._books[layout_name]
        for page in page_ids:
            assert book.num_refs[page], f"commit of {layout_name} page {page}, which nobody holds"
            book.is_valid[page] = 1
        if keys is None:
            return
        for page, key in zip(page_ids, keys, strict=True):
            if key not in book.page_of:
                assert book.keys[page] is None, f"{layout_name} page {page} has a key already"
                book.page_of[key] = page
                book.keys[page] = key

    def merge(
        self, layout_name: str, page_ids: Sequence[PageId], keys: Sequence[PageKey], *, owner: str
    ) -> tuple[PageId, ...]:
        """The same table without copies of what is known: a page whose key belongs to another one is given back for it.

        For tables that were made at the same time from the same content, once they are committed.
        """
        book = self._books[layout_name]
        pages = list(page_ids)
        for at, (page, key) in enumerate(zip(page_ids, keys, strict=True)):
            known = book.page_of.get(key, page)
            if known != page:
                if not book.num_refs[known]:
                    book.revive(known, owner)
                elif book.owners[known] != owner:
                    book.owners[known] = SHARED
                book.num_refs[known] += 1
                self.release(layout_name, (page,))
                pages[at] = known
        return tuple(pages)

    # --- references ------------------------------------------------------------------------------------------

    def reserve(self, layout_name: str, num_pages: int, *, owner: str) -> tuple[PageId, ...]:
        """Fresh private pages with one reference each, contents undefined. All or nothing.

        Evicts cached pages in the order of their value, large pages of other layouts included. Raises OutOfPagesError,
        and has then changed nothing, when even that cannot give so many.
        """
        book = self._books[layout_name]
        if num_pages > book.slabs.num_free:
            self._make_room(book, num_pages)
        pages = tuple(book.slabs.take(num_pages))
        if book.slabs.num_ids > len(book.num_refs):
            book.grow()
        self._num_reservations += 1
        num_refs, owners, epochs, is_valid = book.num_refs, book.owners, book.epochs, book.is_valid
        epoch = self._num_reservations
        for page in pages:
            num_refs[page] = 1
            owners[page] = owner
            epochs[page] = epoch
            is_valid[page] = 0
        return pages

    def retain(self, layout_name: str, page_ids: Sequence[PageId], *, owner: str) -> None:
        """One more reference each; somebody must hold them already."""
        book = self._books[layout_name]
        num_refs, owners = book.num_refs, book.owners
        for page in page_ids:
            count = num_refs[page]
            if not count:
                raise AssertionError(f"retain of {layout_name} page {page}, which nobody holds")
            num_refs[page] = count + 1
            if owners[page] != owner:
                owners[page] = SHARED

    def release(self, layout_name: str, page_ids: Sequence[PageId]) -> None:
        """One reference less each. The last one gone, a keyed page is cached, any other free.

        The end of a table goes first: a prefix is worth more than what depends on it.
        """
        book = self._books[layout_name]
        num_refs, keys = book.num_refs, book.keys
        freed: list[PageId] = []
        for page in reversed(page_ids):
            count = num_refs[page]
            if count > 1:
                num_refs[page] = count - 1
            elif count:
                num_refs[page] = 0
                key = keys[page]
                if key is None:
                    freed.append(page)
                else:
                    self._num_events += 1
                    book.cached.keep(key, self._num_events)
                    book.slabs.park(page, self._num_events)
            else:
                raise AssertionError(f"release of {layout_name} page {page}, which nobody holds")
        if freed:
            self._num_events += 1
            book.slabs.give(freed, self._num_events)

    def writable(
        self, layout_name: str, page_ids: Sequence[PageId], index: int, *, owner: str
    ) -> Writable:
        """Copy-on-write: a table of the same contents whose page `index` is the caller's alone.

        A page that has a key or a second reader is replaced by a fresh copy; the caller's reference moves to the copy.
        Raises OutOfPagesError, and has then changed nothing, when there is no page for it.
        """
        book = self._books[layout_name]
        source = page_ids[index]
        assert book.num_refs[source], f"write to {layout_name} page {source}, which nobody holds"
        if book.num_refs[source] == 1 and book.keys[source] is None:
            return Writable(pages=tuple(page_ids), copy=None)
        (target,) = self.reserve(layout_name, 1, owner=owner)
        self.release(layout_name, (source,))
        pages = (*page_ids[:index], target, *page_ids[index + 1 :])
        return Writable(
            pages=pages, copy=CopyOrder(layout=layout_name, source=source, target=target)
        )

    def pin(self, layout_name: str, page_ids: Sequence[PageId]) -> None:
        """Keep these held or cached pages, readers or not, in their place, until `unpin`; pins add up."""
        book = self._books[layout_name]
        for page in page_ids:
            if not book.num_refs[page]:
                book.revive(page, PINNED)
            book.num_refs[page] += 1
            num_pins = book.num_pins.get(page, 0)
            book.num_pins[page] = num_pins + 1
            if not num_pins:
                book.slabs.stick(page)

    def unpin(self, layout_name: str, page_ids: Sequence[PageId]) -> None:
        """One pin less each."""
        book = self._books[layout_name]
        for page in page_ids:
            num_pins = book.num_pins.pop(page, 0)
            assert num_pins, f"unpin of {layout_name} page {page}, which has no pin"
            if num_pins > 1:
                book.num_pins[page] = num_pins - 1
            else:
                book.slabs.unstick(page)
        self.release(layout_name, page_ids)

    # --- room ------------------------------------------------------------------------------------------------

    def num_free(self, layout_name: str) -> int:
        """Pages that this layout can have without evicting anything."""
        slabs = self._books[layout_name].slabs
        return slabs.num_free + self._large_pages.num_free * slabs.pages_per_large

    def num_evictable(self, layout_name: str) -> int:
        """Pages that this layout can have besides, by evicting its own and other layouts' idle large pages."""
        slabs = self._books[layout_name].slabs
        num_idle = self._num_idle() - slabs.num_idle
        return slabs.num_parked + num_idle * slabs.pages_per_large

    def _make_room(self, book: Book, num_pages: int) -> None:
        name = book.layout.name
        num_free, num_evictable = self.num_free(name), self.num_evictable(name)
        if num_pages > num_free + num_evictable:
            raise OutOfPagesError(kind=name, need=num_pages, free=num_free, evictable=num_evictable)
        while self.num_free(name) < num_pages:
            self._evict(book)

    def _evict(self, book: Book) -> None:
        """Drop what is worth least: a cached page of this layout, or a whole idle large page of another one."""
        key = book.cached.weakest()
        idle = self._weakest_idle(but=book)
        if key is None or (idle is not None and idle.worth < book.cached.worth(key)):
            assert idle is not None, f"nothing to evict for {book.layout.name}"
            for page in idle.book.cached_in(idle.large):
                idle.book.evict(page)
        else:
            book.evict(book.page_of[cast(PageKey, key)])

    def _weakest_idle(self, *, but: Book | None = None) -> _Idle | None:
        """The idle large page that is worth least."""
        weakest: _Idle | None = None
        for book in self._books.values():
            if book is not but and book.slabs.num_idle:
                large = book.slabs.idle.weakest()
                assert isinstance(large, int), f"{book.layout.name}: {large!r} is no large page"
                worth = book.slabs.idle.worth(large)
                if weakest is None or worth < weakest.worth:
                    weakest = _Idle(book, large, worth)
        return weakest

    # --- places ----------------------------------------------------------------------------------------------

    @property
    def num_large_pages(self) -> int:
        """Large pages in circulation: the budget, and until `plan_moves` has freed them those over it."""
        return self._large_pages.num_large_pages

    def set_num_large_pages(self, num_large_pages: int) -> None:
        """Raise the budget at once, or lower it: `plan_moves` frees what is over it, step by step.

        Raises FieldError when the arena has no such budget.
        """
        highest = self._large_pages.max_large_pages
        if not 0 <= num_large_pages <= highest:
            raise FieldError(
                "num_large_pages",
                expected=f"0..{highest}, what the arena was made for",
                got=str(num_large_pages),
                next_step="start the server with a larger memory.arena_bytes",
            )
        self._large_pages.budget = num_large_pages
        self._large_pages.recall()

    def attach(self, holder: Holder) -> None:
        """`holder` remembers page ids between steps: it learns of every move until `detach`."""
        self._holders[holder] = None

    def detach(self, holder: Holder) -> None:
        """`holder` remembers no page id any more."""
        del self._holders[holder]

    def plan_moves(self, budget_bytes: int, *, num_spare: int) -> Moves | None:
        """Between two steps: bring large pages under the budget of the pool, and `num_spare` of them free.

        Small pages, cached ones included, move out of the emptiest large pages, `budget_bytes` of them at most, where a
        page counts as PAGE_COST_BYTES at least; nothing moves while enough is free. Where they do not fit, the least
        valuable cached pages make room, and take of the budget too. References, keys, epochs, owners and the order of eviction move along, and so do all holders. None
        when there is nothing to do; else the caller carries the orders out before anything reads or writes.
        """
        large_pages = self._large_pages
        released = large_pages.retire()
        itinerary = Itinerary()
        while large_pages.num_surplus or large_pages.num_free < num_spare:
            victim = cheapest_victim(self._books, budget_bytes)
            if victim is not None:
                budget_bytes -= itinerary.move(victim, budget_bytes, self._num_events)
            else:
                cost_bytes = self._evict_to_move(budget_bytes, num_spare)
                if not cost_bytes:
                    break
                budget_bytes -= cost_bytes
            released += large_pages.retire()
        if not itinerary.copies and not released:
            return None
        moves = Moves(
            copies=tuple(itinerary.copies), places=itinerary.places, released=tuple(released)
        )
        if moves.places:
            for holder in self._holders:
                holder.relocate(moves)
        return moves

    def _evict_to_move(self, budget_bytes: int, num_spare: int) -> int:
        """When moving alone cannot help: drop the cached page that is worth least and in the way; returns its cost.

        Over the budget of the pool idle large pages go first. Else they are as good as free: whoever needs one takes it.
        """
        if self._large_pages.num_surplus:
            cost_bytes = self._evict_idle(budget_bytes)
            if cost_bytes:
                return cost_bytes
        elif self._large_pages.num_free + self._num_idle() >= num_spare:
            return 0
        weakest: Book | None = None
        least = 0.0
        for book in self._books.values():
            key = book.cached.weakest()
            if key is None or book.cost_bytes > budget_bytes or not book.slabs.num_emptiable:
                continue
            worth = book.cached.worth(key)
            if weakest is None or worth < least:
                weakest, least = book, worth
        if weakest is None:
            return 0
        weakest.evict(weakest.page_of[cast(PageKey, weakest.cached.weakest())])
        return weakest.cost_bytes

    def _num_idle(self) -> int:
        return sum(book.slabs.num_idle for book in self._books.values())

    def _evict_idle(self, budget_bytes: int) -> int:
        """Drop cached pages of the idle large page that is worth least; returns what it took of the budget."""
        idle = self._weakest_idle()
        if idle is None:
            return 0
        cost_bytes = idle.book.cost_bytes
        pages = idle.book.cached_in(idle.large)[: budget_bytes // cost_bytes]
        for page in pages:
            idle.book.evict(page)
        return len(pages) * cost_bytes

    # --- checks and statistics -------------------------------------------------------------------------------

    def epochs(self, layout_name: str, page_ids: Sequence[PageId]) -> tuple[int, ...]:
        """The reservation that each page belongs to: it differs once a page has been freed and given out again."""
        epochs = self._books[layout_name].epochs
        return tuple([epochs[page] for page in page_ids])

    def check_held(
        self, layout_name: str, page_ids: Sequence[PageId], epochs: Sequence[int]
    ) -> None:
        """Raise AssertionError unless all pages are held, committed, and still of these epochs."""
        book = self._books[layout_name]
        for page, epoch in zip(page_ids, epochs, strict=True):
            assert book.epochs[page] == epoch, (
                f"stale {layout_name} page {page}: epoch {epoch}, now {book.epochs[page]}"
            )
            assert book.num_refs[page], f"{layout_name} page {page} is in a table, but nobody's"
            assert book.is_valid[page], f"{layout_name} page {page} is in a table, not committed"

    def stats(self, *, max_live_pages: int = 2048) -> PoolStats:
        """A picture for the dashboard; lists at most `max_live_pages` pages, held ones first, the counts are of all."""
        live: list[LivePage] = []
        cached: list[LivePage] = []
        num_used, num_cached = {}, {}
        for name, book in self._books.items():
            slabs = book.slabs
            num_cached[name] = slabs.num_parked
            num_used[name] = slabs.num_open * slabs.pages_per_large - slabs.num_free
            num_used[name] -= slabs.num_parked
            for large in slabs.open_larges():
                pages = slabs.pages_of(large)
                if len(live) < max_live_pages:
                    live += self._live_pages(book, [page for page in pages if book.num_refs[page]])
                if len(live) + len(cached) < max_live_pages:
                    cached += self._live_pages(
                        book, [page for page in pages if not book.num_refs[page]]
                    )
        return PoolStats(
            large_page_bytes=self._layout.large_page_bytes,
            num_large_pages=self._large_pages.num_large_pages,
            num_free_large_pages=self._large_pages.num_free,
            pages_per_large={
                name: book.slabs.pages_per_large for name, book in self._books.items()
            },
            num_used_pages=num_used,
            num_cached_pages=num_cached,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            live_pages=tuple((live + cached)[:max_live_pages]),
            kinds={name: book.layout.kind.value for name, book in self._books.items()},
        )

    def _live_pages(self, book: Book, pages: Sequence[int]) -> list[LivePage]:
        name, kind = book.layout.name, book.layout.kind.value
        return [
            LivePage(
                page_id=PageId(page),
                layout=name,
                kind=kind,
                owner=book.owners[page] if book.num_refs[page] else CACHED,
                num_refs=book.num_refs[page] - book.num_pins.get(PageId(page), 0),
            )
            for page in pages
            if book.num_refs[page] or book.keys[page] is not None
        ]

    def check_integrity(self) -> None:
        """Raise AssertionError, with numbers, unless every page is in exactly one state and all counters agree."""
        for book in self._books.values():
            book.check_integrity()
        self._large_pages.check_integrity(
            [large for book in self._books.values() for large in book.slabs.open_larges()]
        )
