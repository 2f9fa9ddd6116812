"""Bench pool: what the ledger's operations cost per page, from a small pool to a million pages.

Called by `ganglion bench pool`. Needs no torch: only ids move. Every operation is timed as one call on one table of 64
pages, tables in random order, in the ledger and in a plain allocator (`baselines.plain_pool`) in turns; with tables that
were reserved at once, as the engine does, and with tables that grew a few pages at a time.
"""

import random
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from ganglion.bench.baselines.plain_pool import PlainPool
from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.clock import RealClock
from ganglion.errors import OutOfPagesError
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.ledger import Ledger
from ganglion.memory.prefix import PageKey, chain
from ganglion.types import PageId

TABLE_PAGES = 64
WHOLE, SCATTERED = "whole", "scattered"
PART_PAGES = {WHOLE: TABLE_PAGES, SCATTERED: 8}  # reserved at once, in turns with the other tables
CHUNK_BYTES = 64  # what a page's key is made from: 16 token ids
PAGE_BYTES = 16_384
LARGE_PAGE_BYTES = 1_048_576  # the default of memory.large_page_bytes
NUM_PAGES = (1_000, 10_000, 100_000, 1_000_000)
NUM_QUICK_PAGES = (1_000, 32_000)
NUM_ROUNDS, NUM_QUICK_ROUNDS = 8, 3
NUM_SAMPLES = 128  # tables a round, operation and side
NUM_TRACED_PAGES = 32_000
NUM_SHARED_LARGE_PAGES, NUM_SHARED_TABLES = 96, 200
NUM_SHARED_REQUESTS, NUM_QUICK_SHARED_REQUESTS = 30_000, 3_000
OWNER = "robot"

Table = tuple[PageId, ...]
T = TypeVar("T")

OPERATIONS = {
    "alloc": "reserve, pages free",
    "evict_alloc": "reserve, pool full: every page evicts a cached one",
    "free": "release of private pages, the last reference",
    "fork": "retain",
    "unfork": "release, others still read",
    "match": "keys of 64 bytes a page, then the look-up of cached pages",
    "lookup": "the look-up alone",
    "park": "release of keyed pages, the last reference",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One allocator under test."""

    reserve: Callable[[int], Table]
    commit: Callable[[Table, Sequence[PageKey]], None]
    match: Callable[[Sequence[PageKey]], Table]
    retain: Callable[[Table], None]
    release: Callable[[Table], None]


@dataclass(slots=True, kw_only=True)
class _Curve:
    """All samples of one side at one placement. `samples_ns`: by pool size, then operation."""

    side: str
    placement: str
    samples_ns: list[dict[str, list[float]]] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """In front of its metrics' names."""
        side = "" if self.side == "ledger" else "baseline_"
        return side if self.placement == WHOLE else f"{side}{self.placement}_"

    def medians_ns(self, name: str) -> tuple[float, ...]:
        """One figure a pool size."""
        return tuple(float(np.median(samples[name])) for samples in self.samples_ns)


@dataclass(slots=True, kw_only=True)
class _Load:
    """A side with a pool in the middle of its life: 1/8 free, 1/8 private, 3/8 held and keyed, 3/8 cached.

    `samples_ns`: nanoseconds per page, one sample a call.
    """

    side: _Side
    rng: random.Random
    held: list[Table]
    cached: dict[int, None]  # numbers of sequences (see _chunks), the least recently used first
    num_free_tables: int
    next_sequence: int
    samples_ns: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in OPERATIONS}
    )


def run(*, quick: bool, seed: int) -> BenchResult:
    """Time both allocators at every size and placement."""
    sizes = NUM_QUICK_PAGES if quick else NUM_PAGES
    num_rounds = NUM_QUICK_ROUNDS if quick else NUM_ROUNDS
    curves = [
        curve
        for placement in PART_PAGES
        for curve in _curves(placement, sizes, num_rounds=num_rounds, seed=seed)
    ]
    num_requests = NUM_QUICK_SHARED_REQUESTS if quick else NUM_SHARED_REQUESTS
    refused = {
        "refused_share": _refused_share(num_requests, seed, num_pools=1),
        "baseline_refused_share": _refused_share(num_requests, seed, num_pools=3),
    }
    return _result(sizes, curves, refused, seed)


def _curves(
    placement: str, sizes: Sequence[int], *, num_rounds: int, seed: int
) -> tuple[_Curve, ...]:
    curves = tuple(_Curve(side=name, placement=placement) for name in SIDES)
    for num_pages in sizes:
        num_tables = num_pages // TABLE_PAGES
        loads = [
            _filled(make(_num_pool_pages(num_tables)), num_tables, placement, random.Random(seed))
            for make in SIDES.values()
        ]
        for index in range(num_rounds):
            for load in loads if index % 2 else reversed(loads):
                _measure(load)
        for curve, load in zip(curves, loads, strict=True):
            curve.samples_ns.append(load.samples_ns)
    return curves


def _result(
    sizes: Sequence[int], curves: Sequence[_Curve], refused: Mapping[str, float], seed: int
) -> BenchResult:
    metrics = dict(refused)
    for curve in curves:
        for name in OPERATIONS:
            medians = curve.medians_ns(name)
            metrics[f"{curve.prefix}{name}_ns"] = medians[-1]
            metrics[f"{curve.prefix}{name}_flatness_ratio"] = medians[-1] / medians[0]
    for name in OPERATIONS:
        metrics[f"{name}_pages_per_s"] = 1e9 / metrics[f"{name}_ns"]
    metrics |= {"num_pages": float(sizes[-1]), "ledger_bytes_per_page": _bytes_per_page()}
    return BenchResult(
        name="pool",
        metrics=metrics,
        detail={
            "baseline": "one level, free list, dictionaries, OrderedDict: bench/baselines/plain_pool.py",
            "operations": OPERATIONS,
            "ns": f"per page, one call on one table of {TABLE_PAGES} pages; median at {sizes[-1]} pages",
            "flatness_ratio": f"median at {sizes[-1]} pages over median at {sizes[0]} pages",
            "scattered": f"tables that were reserved {PART_PAGES[SCATTERED]} pages at a time, in turns",
            "ledger_bytes_per_page": f"all pages held and keyed, pool of {NUM_TRACED_PAGES} pages",
            "refused_share": "reservations refused while the mixture of three layouts changes, "
            "one pool; baseline: a third of the large pages for each layout",
            "pages_per_large_page": _layout().pages_per_large("kv"),
            "percentiles_ns": {
                f"{curve.side}, {curve.placement}": {
                    f"{size}": {name: percentiles(at[name], prefix="{}") for name in OPERATIONS}
                    for size, at in zip(sizes, curve.samples_ns, strict=True)
                }
                for curve in curves
            },
        },
        n=len(curves[0].samples_ns[-1]["alloc"]),
        seed=seed,
        plots=tuple(
            Plot(
                title=f"{title}, per page",
                x_label="pages in the pool",
                y_label="ns",
                x=tuple(float(size) for size in sizes),
                series={
                    f"{curve.side}, {curve.placement}": curve.medians_ns(name) for curve in curves
                },
                is_log_x=True,
            )
            for title, name in (("Allocate", "alloc"), ("Fork", "fork"), ("Match", "match"))
        ),
    )


# --- the two sides -----------------------------------------------------------------------------------------------


def _layout() -> PoolLayout:
    """Pages as a policy has them: 64 kv pages to a large page, and feature pages that compete for it."""
    kv = PageLayout(
        name="kv", kind=PageKind.KV, shape=(16, PAGE_BYTES // 64), dtype="float32", slots=16
    )
    feature = PageLayout(
        name="feature", kind=PageKind.FEATURE, shape=(PAGE_BYTES,), dtype="float32", slots=1
    )
    return PoolLayout(large_page_bytes=LARGE_PAGE_BYTES, layouts=(kv, feature))


def _ledger_side(num_pages: int) -> _Side:
    layout = _layout()
    ledger = Ledger(layout, num_pages // layout.pages_per_large("kv"))
    return _Side(
        reserve=partial(ledger.reserve, "kv", owner=OWNER),
        commit=partial(ledger.commit, "kv"),
        match=partial(ledger.match, "kv"),
        retain=partial(ledger.retain, "kv", owner=OWNER),
        release=partial(ledger.release, "kv"),
    )


def _plain_side(num_pages: int) -> _Side:
    pool = PlainPool(num_pages)
    return _Side(
        reserve=pool.reserve,
        commit=pool.commit,
        match=pool.match,
        retain=pool.retain,
        release=pool.release,
    )


SIDES: dict[str, Callable[[int], _Side]] = {"ledger": _ledger_side, "plain": _plain_side}


def _bytes_per_page() -> float:
    """Python's memory behind the ledger; the pages' own bytes live in the arena."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        side = _ledger_side(NUM_TRACED_PAGES)
        for number in range(NUM_TRACED_PAGES // TABLE_PAGES):
            side.commit(side.reserve(TABLE_PAGES), _keys(number))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / NUM_TRACED_PAGES


# --- a pool in the middle of its life ----------------------------------------------------------------------------


def _chunks(sequence: int) -> list[bytes]:
    """The contents behind one table, page by page; different for every sequence."""
    head = sequence.to_bytes(8, "little")
    return [head + at.to_bytes(CHUNK_BYTES - 8, "little") for at in range(TABLE_PAGES)]


def _keys(sequence: int) -> tuple[PageKey, ...]:
    return chain("bench", "pool", _chunks(sequence))


def _num_pool_pages(num_tables: int) -> int:
    """Pages for so many tables, and a large page that keeps the tables from filling large pages exactly."""
    return num_tables * TABLE_PAGES + _layout().pages_per_large("kv")


def _filled(side: _Side, num_tables: int, placement: str, rng: random.Random) -> _Load:
    """Reserve everything, then give some back in random order."""
    part_pages = PART_PAGES[placement]
    parts = list(range(num_tables)) * (TABLE_PAGES // part_pages)
    rng.shuffle(parts)
    pages: list[list[PageId]] = [[] for _ in range(num_tables)]
    num_stray = _layout().pages_per_large("kv") // 2
    side.reserve(num_stray)
    for number in parts:
        pages[number] += side.reserve(part_pages)
    side.reserve(num_stray)
    tables = [tuple(table) for table in pages]
    num_free = num_private = max(1, num_tables // 8)
    num_held = (num_tables - num_free - num_private) // 2
    first_cached = num_free + num_private + num_held
    for table in tables[:num_free]:
        side.release(table)
    for number in range(num_free + num_private, num_tables):
        side.commit(tables[number], _keys(number))
    cached = rng.sample(range(first_cached, num_tables), num_tables - first_cached)
    for number in cached:
        side.release(tables[number])
    return _Load(
        side=side,
        rng=rng,
        held=tables[first_cached - num_held : first_cached],
        cached=dict.fromkeys(cached),
        num_free_tables=num_free,
        next_sequence=num_tables,
    )


# --- measuring ---------------------------------------------------------------------------------------------------


def _measure(load: _Load) -> None:
    """One round: every operation on NUM_SAMPLES tables. Leaves the pool in the mixture that it found."""
    _measure_fork(load)
    _measure_match(load, "match", lambda number: partial(_match, load.side, _chunks(number)))
    _measure_match(load, "lookup", lambda number: partial(load.side.match, _keys(number)))
    _measure_alloc(load)
    _measure_evict_alloc(load)


def _timed(samples_ns: list[float], call: Callable[[], T]) -> T:
    clock = RealClock()
    start_ns = clock.now_ns()
    result = call()
    samples_ns.append((clock.now_ns() - start_ns) / TABLE_PAGES)
    return result


def _batches(max_tables: int) -> Iterator[int]:
    """NUM_SAMPLES tables in batches that the pool can hold at once."""
    num_left = NUM_SAMPLES
    while num_left:
        num_tables = min(num_left, max_tables)
        yield num_tables
        num_left -= num_tables


def _measure_fork(load: _Load) -> None:
    side, samples_ns = load.side, load.samples_ns
    for num_tables in _batches(len(load.held)):
        tables = load.rng.sample(load.held, num_tables)
        for table in tables:
            _timed(samples_ns["fork"], partial(side.retain, table))
        for table in tables:
            _timed(samples_ns["unfork"], partial(side.release, table))


def _match(side: _Side, chunks: Sequence[bytes]) -> Table:
    return side.match(chain("bench", "pool", chunks))


def _measure_match(load: _Load, name: str, match_of: Callable[[int], Callable[[], Table]]) -> None:
    side, samples_ns = load.side, load.samples_ns
    for num_tables in _batches(len(load.cached)):
        numbers = load.rng.sample(list(load.cached), num_tables)
        matched = [_timed(samples_ns[name], match_of(number)) for number in numbers]
        for number, table in zip(numbers, matched, strict=True):
            assert len(table) == TABLE_PAGES, f"{len(table)} pages left of sequence {number}"
            _timed(samples_ns["park"], partial(side.release, table))
            del load.cached[number]
            load.cached[number] = None


def _measure_alloc(load: _Load) -> None:
    side, samples_ns = load.side, load.samples_ns
    for num_tables in _batches(load.num_free_tables):
        reserve = partial(side.reserve, TABLE_PAGES)
        taken = [_timed(samples_ns["alloc"], reserve) for _ in range(num_tables)]
        for table in load.rng.sample(taken, num_tables):
            _timed(samples_ns["free"], partial(side.release, table))


def _measure_evict_alloc(load: _Load) -> None:
    side, samples_ns = load.side, load.samples_ns
    filler = [side.reserve(TABLE_PAGES) for _ in range(load.num_free_tables)]
    for num_tables in _batches(len(load.cached)):
        reserve = partial(side.reserve, TABLE_PAGES)
        taken = [_timed(samples_ns["evict_alloc"], reserve) for _ in range(num_tables)]
        for oldest in list(load.cached)[:num_tables]:
            del load.cached[oldest]
        for table in taken:
            side.commit(table, _keys(load.next_sequence))
            side.release(table)
            load.cached[load.next_sequence] = None
            load.next_sequence += 1
    for table in filler:
        side.release(table)


# --- what sharing brings -----------------------------------------------------------------------------------------


def _refused_share(num_requests: int, seed: int, *, num_pools: int) -> float:
    """Tables come and go at random; the layout that most of them are of changes six times."""
    rng = random.Random(seed)
    tables = {"kv": (16_384, 17), "feature": (65_536, 4), "state": (4_096, 60)}
    pool = PoolLayout(
        large_page_bytes=LARGE_PAGE_BYTES,
        layouts=tuple(
            PageLayout(name=name, kind=PageKind.KV, shape=(page_bytes,), dtype="uint8", slots=1)
            for name, (page_bytes, _) in tables.items()
        ),
    )
    ledgers = [Ledger(pool, NUM_SHARED_LARGE_PAGES // num_pools) for _ in range(num_pools)]
    of_layout = {name: ledgers[at % num_pools] for at, name in enumerate(tables)}
    held: list[tuple[str, Table]] = []
    num_refused = 0
    for at in range(num_requests):
        if len(held) >= NUM_SHARED_TABLES:
            name, pages = held.pop(rng.randrange(len(held)))
            of_layout[name].release(name, pages)
        weights = [8 if at * 6 // num_requests % 3 == place else 1 for place in range(3)]
        (name,) = rng.choices(list(tables), weights)
        try:
            held.append((name, of_layout[name].reserve(name, tables[name][1], owner=OWNER)))
        except OutOfPagesError:
            num_refused += 1
    return num_refused / num_requests
