"""Random lives of a ledger against a plain model: dicts and lists, slow and obvious, no shared code."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ganglion.errors import OutOfPagesError
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.book import PAGE_COST_BYTES
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.memory.prefix import PageKey
from ganglion.types import PageId

SIZES = {"kv": 16, "feature": 24, "state": 64}
POOL = PoolLayout(
    large_page_bytes=64,
    layouts=tuple(
        PageLayout(name=name, kind=PageKind.KV, shape=(size,), dtype="uint8", slots=1)
        for name, size in SIZES.items()
    ),
)
PER_LARGE = {name: 64 // size for name, size in SIZES.items()}
NAMES = st.sampled_from(sorted(SIZES))
MAX_LARGE = 8
ALL_KEYS = [PageKey(bytes([at])) for at in range(40)]
KEYS = st.sampled_from(ALL_KEYS[:10])
FATES = st.sampled_from(["free", "free", "free", "hold", "cache"])
Page = tuple[str, int]


@dataclass
class Table:
    """What one holder believes: these pages are its own, in this order."""

    layout: str
    pages: tuple[PageId, ...]


@dataclass
class Plain:
    """Every page that is not free, by layout and id."""

    num_large: int
    num_refs: dict[Page, int] = field(default_factory=dict)
    key_of: dict[Page, PageKey] = field(default_factory=dict)
    cached_at: dict[Page, int] = field(default_factory=dict)
    idle_at: dict[Page, int] = field(default_factory=dict)  # (layout, large)
    now: int = 0

    def large_of(self, page: Page) -> Page:
        return page[0], page[1] // PER_LARGE[page[0]]

    def live(self, layout: str) -> set[Page]:
        return {page for page in [*self.num_refs, *self.cached_at] if page[0] == layout}

    def open_larges(self, layout: str) -> set[Page]:
        return {self.large_of(page) for page in self.live(layout)}

    def num_free(self, layout: str) -> int:
        num_open = sum(len(self.open_larges(name)) for name in SIZES)
        own = len(self.open_larges(layout)) * PER_LARGE[layout] - len(self.live(layout))
        return own + (self.num_large - num_open) * PER_LARGE[layout]

    def num_evictable(self, layout: str) -> int:
        own = sum(page[0] == layout for page in self.cached_at)
        return own + PER_LARGE[layout] * sum(large[0] != layout for large in self.idle_at)

    def make_room(self, layout: str, num_pages: int) -> bool:
        if num_pages > self.num_free(layout) + self.num_evictable(layout):
            return False
        while num_pages > self.num_free(layout):
            candidates = [(at, [page]) for page, at in self.cached_at.items() if page[0] == layout]
            for large, at in self.idle_at.items():
                if large[0] != layout:
                    pages = [page for page in self.cached_at if self.large_of(page) == large]
                    candidates.append((at, pages))
            _, pages = min(candidates, key=lambda item: item[0])
            for page in pages:
                del self.cached_at[page], self.key_of[page]
            self.note_idle()
        return True

    def hold(self, page: Page) -> None:
        self.cached_at.pop(page, None)
        self.num_refs[page] = self.num_refs.get(page, 0) + 1
        self.note_idle()

    def let_go(self, pages: list[Page]) -> None:
        freed = []
        for page in reversed(pages):
            self.num_refs[page] -= 1
            if not self.num_refs[page] and page in self.key_of:
                del self.num_refs[page]
                self.now += 1
                self.cached_at[page] = self.now
                self.note_idle(freed)
            elif not self.num_refs[page]:
                freed.append(page)
        self.now += bool(freed)
        for page in freed:
            del self.num_refs[page]
            self.note_idle()

    def evict(self, page: Page) -> None:
        del self.cached_at[page], self.key_of[page]
        self.note_idle()

    def move(self, source: Page, target: Page) -> None:
        """All that is known of the page is known of its new place."""
        for known in (self.num_refs, self.key_of, self.cached_at):
            if source in known:
                known[target] = known.pop(source)  # type: ignore[attr-defined, index]
        self.note_idle()

    def note_idle(self, not_yet_free: list[Page] | None = None) -> None:
        """A large page is idle since the last of its pages was let go; of two at once, the first goes first."""
        held = {self.large_of(page) for page in [*self.num_refs, *(not_yet_free or [])]}
        idle = {self.large_of(page) for page in self.cached_at} - held
        # In the order in which they came to rest: of two with the same number, the first goes first.
        self.idle_at = {large: at for large, at in self.idle_at.items() if large in idle}
        self.idle_at |= dict.fromkeys(sorted(idle - self.idle_at.keys()), self.now)


class LedgerLife(RuleBasedStateMachine):
    @initialize(num_large=st.integers(1, MAX_LARGE))
    def open(self, num_large: int) -> None:
        self.ledger = Ledger(POOL, num_large, max_large_pages=MAX_LARGE)
        self.ledger.attach(self)
        self.plain, self.budget = Plain(num_large), num_large
        self.moves: list[Moves] = []
        self.tables: list[Table] = []
        self.pinned: list[Table] = []

    def own(self, layout: str, pages: tuple[PageId, ...]) -> list[Page]:
        return [(layout, page) for page in pages]

    def pick(self, at: int) -> Table:
        return self.tables[at % len(self.tables)]

    @rule(layout=NAMES, keys=st.lists(KEYS, min_size=1, max_size=4))
    def cache(self, layout: str, keys: list[PageKey]) -> None:
        """What a session does with content of its own: reserve, commit, release."""
        num_tables = len(self.tables)
        self.reserve(layout, len(keys))
        if len(self.tables) > num_tables:
            self.commit(num_tables, keys)
            self.release(num_tables)

    @rule(layout=NAMES, fates=st.lists(FATES, min_size=8, max_size=24))
    def scatter(self, layout: str, fates: list[str]) -> None:
        """Large pages with a few pages left in each: one table, each page with a fate of its own."""
        num_tables = len(self.tables)
        fates = fates[: 4 * PER_LARGE[layout]]
        self.reserve(layout, len(fates))
        if len(self.tables) == num_tables:
            return
        table = self.tables.pop()
        self.tables += [Table(layout, (page,)) for page in table.pages]
        for at, fate in reversed(list(enumerate(fates, start=num_tables))):
            if fate == "cache":
                known = [key for page, key in self.plain.key_of.items() if page[0] == layout]
                self.commit(at, [key for key in ALL_KEYS if key not in known][:1] * 9)
            if fate != "hold":
                self.release(at)

    @rule(layout=NAMES, num_pages=st.integers(0, 6))
    def reserve(self, layout: str, num_pages: int) -> None:
        before = self.ledger.stats()
        if not self.plain.make_room(layout, num_pages):
            with pytest.raises(OutOfPagesError):
                self.ledger.reserve(layout, num_pages, owner="a")
            assert self.ledger.stats() == before, "all or nothing"
            return
        num_open, num_free = len(self.plain.open_larges(layout)), self.plain.num_free(layout)
        pages = self.ledger.reserve(layout, num_pages, owner="a")
        assert len(set(pages)) == num_pages
        assert self.plain.live(layout).isdisjoint(self.own(layout, pages)), "fresh pages only"
        for page in self.own(layout, pages):
            self.plain.hold(page)
        per = PER_LARGE[layout]
        num_common = self.plain.num_large - sum(len(self.plain.open_larges(n)) for n in SIZES)
        num_opened = len(self.plain.open_larges(layout)) - num_open
        partly_free = num_free - (num_common + num_opened) * per
        assert num_opened == max(0, -(-(num_pages - partly_free) // per)), "partial ones first"
        self.tables.append(Table(layout, pages))

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99), keys=st.none() | st.lists(KEYS, min_size=9, max_size=9))
    def commit(self, at: int, keys: list[PageKey] | None) -> None:
        table = self.pick(at)
        own = self.own(table.layout, table.pages)
        if keys is not None:
            keys = keys[: len(own)]
            if any(page in self.plain.key_of for page in own):
                return  # a keyed page keeps its key; the ledger asserts that
            known = {key for page, key in self.plain.key_of.items() if page[0] == table.layout}
            for page, key in zip(own, keys, strict=True):
                if key not in known:
                    known.add(key)
                    self.plain.key_of[page] = key
        self.ledger.commit(table.layout, table.pages, keys)

    @rule(layout=NAMES, keys=st.lists(KEYS, max_size=6))
    def match(self, layout: str, keys: list[PageKey]) -> None:
        page_of = {key: page for page, key in self.plain.key_of.items() if page[0] == layout}
        expected = []
        for key in keys:
            if key not in page_of:
                break
            expected.append(page_of[key])
        pages = self.ledger.match(layout, keys)
        assert self.own(layout, pages) == expected
        for page in expected:
            self.plain.hold(page)
        self.tables.append(Table(layout, pages))

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99))
    def retain(self, at: int) -> None:
        table = self.pick(at)
        self.ledger.retain(table.layout, table.pages, owner="b")
        for page in self.own(table.layout, table.pages):
            self.plain.hold(page)
        self.tables.append(Table(table.layout, table.pages))

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99))
    def release(self, at: int) -> None:
        table = self.tables.pop(at % len(self.tables))
        self.ledger.release(table.layout, table.pages)
        self.plain.let_go(self.own(table.layout, table.pages))

    @precondition(lambda self: any(table.pages for table in self.tables))
    @rule(at=st.integers(0, 99), index=st.integers(0, 99))
    def write(self, at: int, index: int) -> None:
        tables = [table for table in self.tables if table.pages]
        table = tables[at % len(tables)]
        index %= len(table.pages)
        source = (table.layout, table.pages[index])
        is_private = self.plain.num_refs[source] == 1 and source not in self.plain.key_of
        if not is_private and not self.plain.make_room(table.layout, 1):
            with pytest.raises(OutOfPagesError):
                self.ledger.writable(table.layout, table.pages, index, owner="c")
            return
        written = self.ledger.writable(table.layout, table.pages, index, owner="c")
        assert (written.copy is None) == is_private
        if written.copy is not None:
            target = (table.layout, written.copy.target)
            assert target not in self.plain.live(table.layout)
            assert written.copy.source == source[1]
            self.plain.hold(target)
            self.plain.let_go([source])
            table.pages = (*table.pages[:index], written.copy.target, *table.pages[index + 1 :])
        assert written.pages == table.pages

    @precondition(lambda self: self.plain.num_refs or self.plain.cached_at)
    @rule(at=st.integers(0, 99))
    def pin(self, at: int) -> None:
        pages = sorted([*self.plain.num_refs, *self.plain.cached_at])
        page = pages[at % len(pages)]
        self.ledger.pin(page[0], (PageId(page[1]),))
        self.plain.hold(page)
        self.pinned.append(Table(page[0], (PageId(page[1]),)))

    @precondition(lambda self: self.pinned)
    @rule(at=st.integers(0, 99))
    def unpin(self, at: int) -> None:
        table = self.pinned.pop(at % len(self.pinned))
        self.ledger.unpin(table.layout, table.pages)
        self.plain.let_go(self.own(table.layout, table.pages))

    def relocate(self, moves: Moves) -> None:
        """As a holder: the ids that the tables remember follow."""
        self.moves.append(moves)
        for table in self.tables:
            table.pages = moves.now_at(table.layout, table.pages)

    @rule(num_large=st.integers(0, MAX_LARGE))
    def set_budget(self, num_large: int) -> None:
        self.ledger.set_num_large_pages(num_large)
        self.budget, self.plain.num_large = num_large, max(num_large, self.plain.num_large)

    @rule(
        num_pages=st.sampled_from([0, 2, 5, 100]),
        num_spare=st.sampled_from([1, MAX_LARGE]),
    )
    def defragment(self, num_pages: int, num_spare: int) -> None:
        """Whatever moved kept all that is known of it; nobody else's page was overwritten; nothing cost too much."""
        plain, pins = self.plain, {(table.layout, table.pages[0]) for table in self.pinned}
        num_open = sum(len(plain.open_larges(name)) for name in SIZES)
        is_short = plain.num_large > self.budget or plain.num_large - num_open < num_spare
        moves = self.ledger.plan_moves(num_pages * PAGE_COST_BYTES, num_spare=num_spare)
        if moves is None:
            moves = Moves(copies=(), places={}, released=())
        assert self.moves == ([moves] if moves.copies else []), "holders learn of moves"
        self.moves.clear()
        evicted = {
            (layout, plain.key_of[layout, page])
            for layout, page in plain.cached_at
            if plain.key_of[layout, page] not in self.ledger._books[layout].page_of
        }
        came_from: dict[Page, Page] = {}
        for copy in moves.copies:
            source, target = (copy.layout, copy.source), (copy.layout, copy.target)
            assert source in plain.live(copy.layout)
            assert source not in pins
            assert plain.large_of(source) != plain.large_of(target)
            assert plain.large_of(target) in plain.open_larges(copy.layout), "no new ones"
            if (copy.layout, plain.key_of.get(target)) in evicted:
                plain.evict(target)
            assert target not in plain.live(copy.layout)
            came_from[target] = came_from.pop(source, source)
            plain.move(source, target)
        for target, origin in came_from.items():
            assert moves.places[origin[0]][PageId(origin[1])] == target[1]
        for page in list(plain.cached_at):
            if (page[0], plain.key_of[page]) in evicted:
                plain.evict(page)
        assert is_short or not (moves.copies or evicted), "enough is free"
        plain.num_large -= len(moves.released)
        assert not moves.released or plain.num_large >= self.budget
        assert len(moves.copies) + len(evicted) <= num_pages, "pages as small as these"

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        stats = self.ledger.stats()
        num_pins: dict[Page, int] = {}
        for table in self.pinned:
            page = (table.layout, table.pages[0])
            num_pins[page] = num_pins.get(page, 0) + 1
        live = {(page.layout, page.page_id): page.num_refs for page in stats.live_pages}
        expected = {page: n - num_pins.get(page, 0) for page, n in self.plain.num_refs.items()}
        assert live == expected | dict.fromkeys(self.plain.cached_at, 0)
        for name in SIZES:
            assert self.ledger.num_free(name) == self.plain.num_free(name)
            assert self.ledger.num_evictable(name) == self.plain.num_evictable(name)
            assert stats.num_cached_pages[name] == sum(p[0] == name for p in self.plain.cached_at)
        assert stats.num_large_pages == self.ledger.num_large_pages == self.plain.num_large
        num_open = sum(len(self.plain.open_larges(name)) for name in SIZES)
        assert stats.num_free_large_pages == self.plain.num_large - num_open

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for table in self.pinned:
            self.ledger.unpin(table.layout, table.pages)
        for table in self.tables:
            self.ledger.release(table.layout, table.pages)
        self.ledger.check_integrity()
        assert sum(self.ledger.stats().num_used_pages.values()) == 0
        self.ledger.set_num_large_pages(MAX_LARGE)
        assert len(self.ledger.reserve("state", MAX_LARGE, owner="all")) == MAX_LARGE
        self.ledger.check_integrity()


TestLedgerLife = LedgerLife.TestCase
TestLedgerLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
