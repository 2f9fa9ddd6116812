"""Churn for `bench memory`: sessions of two models come and go until large pages are full of holes; with and without
defragmentation. Called by `bench.memory`.

Real ledger and arena, no model: every page is filled with a number of its own and looked at again before it is given
back. The load swings from one model to the other and back, so that large pages must change hands.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ganglion.clock import RealClock
from ganglion.errors import GanglionError, OutOfPagesError
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.table import PageTable, VersionedTable
from ganglion.types import PageId

LARGE_PAGE_BYTES = 1_048_576  # the default of memory.large_page_bytes
NUM_LARGE_PAGES = 64
STEP_BUDGET_BYTES = 262_144
STALL_BUDGET_US = 1000.0
NUM_SPARE = 2  # large pages that defragmentation keeps free
MAX_STAMP = 251  # every number below it is exact in every dtype
NUM_SWINGS = 6
MAX_HISTORY = 16
NUM_LIFE_STEPS = 80  # of a session, on average; a tenth of it when the other model's turn has come
NUM_PERIOD_STEPS = 8  # from one observation of a session to the next
LIGHT_SHARE = 0.2  # of its sessions that a model keeps while it is the other's turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One model's sessions: what a version of the context takes, and how many there are when it is its turn."""

    kv: PageLayout
    feature: PageLayout
    num_kv_pages: int
    num_views: int
    num_sessions: int


def _load(name: str, kv_shape: tuple[int, ...], num_sessions: int) -> Load:
    kv = PageLayout(name=f"{name}.kv", kind=PageKind.KV, shape=kv_shape, dtype="bfloat16", slots=4)
    feature = PageLayout(
        name=f"{name}.feature", kind=PageKind.FEATURE, shape=(25, 256), dtype="bfloat16", slots=25
    )
    return Load(kv=kv, feature=feature, num_kv_pages=17, num_views=2, num_sessions=num_sessions)


# The pages of the two shipped policies: instruction and observation 17 of KV, two views.
LOADS = (_load("small", (4, 4, 2, 4, 64), 100), _load("large", (4, 12, 2, 8, 64), 28))


@dataclass(slots=True, kw_only=True)
class Churn:
    """What a run saw. `stalls_us`: of the steps in which something moved."""

    num_asked: int = 0
    num_refused: int = 0
    num_moved_pages: int = 0
    num_moved_bytes: int = 0
    num_freed_large_pages: int = 0
    stalls_us: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Session:
    """One session: its newest context and history as one version, and the numbers that those pages hold."""

    load: Load
    table: VersionedTable
    history: int
    kv_stamps: list[int] = field(default_factory=list)
    feature_stamps: list[int] = field(default_factory=list)


class ChurnedPool:
    """A pool and its sessions; `budget_bytes` = 0: without defragmentation."""

    def __init__(self, *, budget_bytes: int, seed: int) -> None:
        layouts = tuple(layout for load in LOADS for layout in (load.kv, load.feature))
        pool = PoolLayout(large_page_bytes=LARGE_PAGE_BYTES, layouts=layouts)
        self._page_bytes = {layout.name: layout.page_bytes for layout in layouts}
        self._ledger, self._arena = Ledger(pool, NUM_LARGE_PAGES), Arena(pool, NUM_LARGE_PAGES)
        self._budget_bytes = budget_bytes
        self._rng = random.Random(seed)
        self._sessions: list[_Session] = []
        self._num_stamps = 0
        self._clock = RealClock()
        self._seen = Churn()

    def run(self, num_steps: int) -> Churn:
        """The load swings NUM_SWINGS times from one model to the next."""
        for at in range(num_steps):
            turn = at * NUM_SWINGS // num_steps % len(LOADS)
            for index, load in enumerate(LOADS):
                share = 1.0 if index == turn else LIGHT_SHARE
                self._populate(load, round(share * load.num_sessions))
            for session in self._sessions:
                if self._rng.random() * NUM_PERIOD_STEPS < 1.0:
                    self._observe(session)
            if self._budget_bytes:
                self._defragment()
        for session in self._sessions:
            self._check(session)
            session.table.close()
        self._ledger.check_integrity()
        num_used = self._ledger.stats(max_live_pages=0).num_used_pages
        assert not any(num_used.values()), f"pages are lost: {num_used}"
        return self._seen

    # --- sessions ----------------------------------------------------------------------------------------------

    def _populate(self, load: Load, num_wanted: int) -> None:
        """Sessions leave at random, earlier when there are too many; some come while there are too few."""
        own = [session for session in self._sessions if session.load is load]
        life_steps = NUM_LIFE_STEPS if len(own) <= num_wanted else NUM_LIFE_STEPS // 10
        for session in own:
            if self._rng.random() * life_steps < 1.0:
                self._check(session)
                session.table.close()
                self._sessions.remove(session)
        for _ in range(min(2, num_wanted - len(own))):
            session = _Session(
                load=load,
                table=VersionedTable(self._ledger),
                history=self._rng.randint(1, MAX_HISTORY),
            )
            if self._observe(session):
                self._sessions.append(session)

    def _observe(self, session: _Session) -> bool:
        """A new version of the session's context and history; False when the pool has no pages for it."""
        load, ledger, seen = session.load, self._ledger, self._seen
        kv, feature = load.kv.name, load.feature.name
        seen.num_asked += 1
        try:
            kv_pages = ledger.reserve(kv, load.num_kv_pages, owner="robot")
        except OutOfPagesError:
            seen.num_refused += 1
            return False
        try:
            feature_pages = ledger.reserve(feature, load.num_views, owner="robot")
        except OutOfPagesError:
            ledger.release(kv, kv_pages)
            seen.num_refused += 1
            return False
        num_older = (session.history - 1) * load.num_views
        older = (
            self._tables(session)[1].pages[-num_older:] if session.kv_stamps and num_older else ()
        )
        ledger.retain(feature, older, owner="robot")
        session.kv_stamps = self._fill(load.kv, kv_pages)
        session.feature_stamps = [
            *session.feature_stamps[len(session.feature_stamps) - len(older) :],
            *self._fill(load.feature, feature_pages),
        ]
        session.table.publish(_table(kv, kv_pages), _table(feature, (*older, *feature_pages)))
        return True

    def _tables(self, session: _Session) -> tuple[PageTable, ...]:
        lease = session.table.acquire()
        assert lease is not None, "a session without a version"
        session.table.release(lease)
        return lease.tables

    # --- bytes -------------------------------------------------------------------------------------------------

    def _fill(self, layout: PageLayout, pages: Sequence[PageId]) -> list[int]:
        """Another number into each page."""
        stamps = [(self._num_stamps + at) % MAX_STAMP for at in range(len(pages))]
        self._num_stamps += len(pages)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        values = torch.tensor(stamps, dtype=dtype).view(1, -1, *(1 for _ in layout.shape))
        self._arena.scatter(layout.name, [pages], values.expand(1, -1, *layout.shape))
        self._ledger.commit(layout.name, pages, None)
        return stamps

    def _check(self, session: _Session) -> None:
        """Every page of the session's newest version holds what was written to it, wherever it is now."""
        stamps = (session.kv_stamps, session.feature_stamps)
        for table, expected in zip(self._tables(session), stamps, strict=True):
            found = self._arena.gather(table.layout, [table.pages])[0].flatten(1)
            wanted = torch.tensor(expected, dtype=found.dtype)[:, None]
            if not torch.equal(found, wanted.expand_as(found)):
                raise GanglionError(f"{table.layout}: pages {table.pages} lost their contents")

    def _defragment(self) -> None:
        seen, ledger = self._seen, self._ledger
        num_free = ledger.stats(max_live_pages=0).num_free_large_pages
        start_ns = self._clock.now_ns()
        moves = ledger.plan_moves(self._budget_bytes, num_spare=NUM_SPARE)
        if moves is None:
            return
        self._arena.copy(moves.copies)
        seen.stalls_us.append((self._clock.now_ns() - start_ns) * 1e-3)
        num_bytes = sum(self._page_bytes[order.layout] for order in moves.copies)
        assert num_bytes <= self._budget_bytes, (num_bytes, self._budget_bytes)
        seen.num_moved_pages += len(moves.copies)
        seen.num_moved_bytes += num_bytes
        seen.num_freed_large_pages += ledger.stats(max_live_pages=0).num_free_large_pages - num_free


def _table(layout: str, pages: Sequence[PageId]) -> PageTable:
    return PageTable(layout=layout, pages=tuple(pages), num_slots=len(pages))
