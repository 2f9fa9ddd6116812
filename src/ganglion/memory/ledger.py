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

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from ganglion.errors import OutOfPagesError
from ganglion.layout import PageLayout, PoolLayout
from ganglion.memory.pool import LargePages, Slabs
from ganglion.memory.prefix import PageKey
from ganglion.memory.retention.lru import Lru
from ganglion.memory.retention.value import Value
from ganglion.types import LivePage, PageId, PoolStats

SHARED = "shared"
CACHED = "cached"
PINNED = "pinned"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOrder:
    """Copy one page's bytes. Orders are obeyed in their order, before anything else writes."""

    layout: str
    source: PageId
    target: PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class Writable:
    """A table whose page at the asked index may be written, once `copy` is done."""

    pages: tuple[PageId, ...]
    copy: CopyOrder | None


@dataclass(slots=True, kw_only=True)
class _Book:
    """What the ledger knows of one layout's pages. The lists are indexed by page id and grow with the pool's use."""

    layout: PageLayout
    slabs: Slabs
    cached: Value
    num_refs: list[int] = field(default_factory=list)  # pins included
    owners: list[str] = field(default_factory=list)
    keys: list[PageKey | None] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)  # number of the reservation; 0: never reserved
    is_valid: bytearray = field(default_factory=bytearray)
    num_pins: dict[PageId, int] = field(default_factory=dict)
    page_of: dict[PageKey, PageId] = field(default_factory=dict)

    def grow(self) -> None:
        """Make room for all ids that the pool has handed out; a half more, so that growing stays rare."""
        num_new = self.slabs.num_ids - len(self.num_refs) + len(self.num_refs) // 2
        self.num_refs += [0] * num_new
        self.owners += [""] * num_new
        self.keys += [None] * num_new
        self.epochs += [0] * num_new
        self.is_valid += bytes(num_new)

    def evict(self, page: PageId) -> None:
        """cached -> free: nobody finds it any more."""
        key = self.keys[page]
        assert key is not None, f"{self.layout.name} page {page} is cached without a key"
        self.keys[page] = None
        del self.page_of[key]
        self.cached.drop(page)
        self.slabs.evict(page)


class Ledger:
    """Page ids are unique within a layout only: a page is always named with its layout."""

    def __init__(
        self,
        layout: PoolLayout,
        num_large_pages: int,
        *,
        value: Callable[[], Value] = Lru,
    ) -> None:
        self._layout = layout
        self._large_pages = LargePages(num_large_pages)
        self._books = {
            small.name: _Book(
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
                book.cached.drop(page)
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
                if keys[page] is None:
                    freed.append(page)
                else:
                    self._num_events += 1
                    book.cached.keep(page, self._num_events)
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
        """Keep these held or cached pages, readers or not, until `unpin`; pins add up."""
        book = self._books[layout_name]
        for page in page_ids:
            if not book.num_refs[page]:
                assert book.keys[page] is not None, f"pin of the free {layout_name} page {page}"
                book.cached.drop(page)
                book.slabs.unpark(page)
                book.owners[page] = PINNED
            book.num_refs[page] += 1
            book.num_pins[page] = book.num_pins.get(page, 0) + 1

    def unpin(self, layout_name: str, page_ids: Sequence[PageId]) -> None:
        """One pin less each."""
        book = self._books[layout_name]
        for page in page_ids:
            num_pins = book.num_pins.pop(page, 0)
            assert num_pins, f"unpin of {layout_name} page {page}, which has no pin"
            if num_pins > 1:
                book.num_pins[page] = num_pins - 1
        self.release(layout_name, page_ids)

    # --- room ------------------------------------------------------------------------------------------------

    def num_free(self, layout_name: str) -> int:
        """Pages that this layout can have without evicting anything."""
        slabs = self._books[layout_name].slabs
        return slabs.num_free + self._large_pages.num_free * slabs.pages_per_large

    def num_evictable(self, layout_name: str) -> int:
        """Pages that this layout can have besides, by evicting its own and other layouts' idle large pages."""
        slabs = self._books[layout_name].slabs
        num_idle = sum(book.slabs.num_idle for book in self._books.values()) - slabs.num_idle
        return slabs.num_parked + num_idle * slabs.pages_per_large

    def _make_room(self, book: _Book, num_pages: int) -> None:
        name = book.layout.name
        num_free, num_evictable = self.num_free(name), self.num_evictable(name)
        if num_pages > num_free + num_evictable:
            raise OutOfPagesError(kind=name, need=num_pages, free=num_free, evictable=num_evictable)
        while self.num_free(name) < num_pages:
            self._evict(book)

    def _evict(self, book: _Book) -> None:
        """Drop what is worth least: a cached page of this layout, or a whole idle large page of another one."""
        page = book.cached.weakest()
        least = None if page is None else book.cached.worth(page)
        victim: _Book | None = None
        large = 0
        for other in self._books.values():
            candidate = None if other is book else other.slabs.idle.weakest()
            if candidate is not None:
                worth = other.slabs.idle.worth(candidate)
                if least is None or worth < least:
                    least, victim, large = worth, other, candidate
        if victim is not None:
            for at in victim.slabs.pages_of(large):
                if victim.keys[at] is not None:
                    victim.evict(PageId(at))
        else:
            assert page is not None, f"nothing to evict for {book.layout.name}"
            book.evict(PageId(page))

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
        )

    def _live_pages(self, book: _Book, pages: Sequence[int]) -> list[LivePage]:
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
        larges: Set[int] = self._large_pages.free_set()
        num_open = 0
        for name, book in self._books.items():
            pages = [PageId(page) for page in range(len(book.num_refs))]
            held = {page for page in pages if book.num_refs[page]}
            cached = {page for page in pages if not book.num_refs[page] and book.keys[page]}
            assert len(book.num_refs) >= book.slabs.num_ids, (len(pages), book.slabs.num_ids)
            assert min(book.num_refs, default=0) >= 0, f"{name}: negative references"
            book.slabs.check_integrity(held=held, parked=cached)
            by_key = {key: page for page in pages if (key := book.keys[page]) is not None}
            assert by_key == book.page_of, f"{name}: keys and pages disagree"
            assert all(book.is_valid[page] for page in by_key.values()), f"{name}: key, not valid"
            for page, num_pins in book.num_pins.items():
                assert 0 < num_pins <= book.num_refs[page], (name, page, num_pins)
            for page in cached:
                assert book.cached.worth(page) > 0, f"{name}: cached page {page} has no worth"
            larges = larges | set(book.slabs.open_larges())
            num_open += book.slabs.num_open
        assert (
            num_open + self._large_pages.num_free
            == self._large_pages.num_large_pages
            == len(larges)
        ), (num_open, self._large_pages.num_free, self._large_pages.num_large_pages, len(larges))
