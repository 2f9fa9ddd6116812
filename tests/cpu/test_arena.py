"""The arena against plain tensors: every layout sees its own pages, whatever the sizes, and copies isolate."""

import mmap
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganglion.errors import OutOfPagesError
from ganglion.layout import DTYPE_BYTES, PageKind, PageLayout, PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import CopyOrder
from ganglion.memory.prefix import PageKey
from ganglion.types import PageId


def layout(name: str, shape: tuple[int, ...], dtype: str = "float32") -> PageLayout:
    return PageLayout(name=name, kind=PageKind.KV, shape=shape, dtype=dtype, slots=1)


def numbered(page_layout: PageLayout, num_rows: int, num_pages: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 100, (num_rows, num_pages, *page_layout.shape), generator=rng)
    return values.to(getattr(torch, page_layout.dtype))


def ids(rows: list[list[int]]) -> list[list[PageId]]:
    return [[PageId(page) for page in row] for row in rows]


# "even" fills a large page of 96 bytes exactly, the others leave a rest.
POOL = PoolLayout(
    large_page_bytes=96,
    layouts=(
        layout("even", (2, 3)),
        layout("odd", (5,)),
        layout("half", (7,), "bfloat16"),
        layout("byte", (11,), "uint8"),
        layout("scalar", (), "int64"),
    ),
)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(POOL.layouts),
    st.sampled_from([64, 96, 100, 128]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_what_was_scattered_is_gathered(
    page_layout: PageLayout, large_bytes: int, num_large: int, num_rows: int, rng: random.Random
) -> None:
    pool = PoolLayout(large_page_bytes=large_bytes, layouts=POOL.layouts)
    arena = Arena(pool, num_large)
    num_pages = num_large * pool.pages_per_large(page_layout.name)
    width = num_pages // num_rows
    chosen = rng.sample(range(num_pages), width * num_rows)
    rows = ids([chosen[at * width : (at + 1) * width] for at in range(num_rows)])
    values = numbered(page_layout, num_rows, width)
    arena.scatter(page_layout.name, rows, values)
    assert torch.equal(arena.gather(page_layout.name, rows), values)
    expected = torch.zeros(num_pages, *page_layout.shape, dtype=values.dtype)
    for row, of_row in zip(rows, values, strict=True):
        for page, value in zip(row, of_row, strict=True):
            expected[page] = value
    assert torch.equal(arena.pages(page_layout.name).flatten(0, 1), expected), "nobody else's page"


def test_every_bit_arrives() -> None:
    """Bytes are moved in words of another dtype: whatever those would mean, NaN with its payload too."""
    pool = PoolLayout(
        large_page_bytes=192,
        layouts=(layout("words", (48,), "uint8"), layout("odd", (40,), "bfloat16")),
    )
    arena, rng = Arena(pool, 64), torch.Generator().manual_seed(0)
    for name in ("words", "odd"):
        num_pages = 64 * pool.pages_per_large(name)
        raw = torch.randint(0, 256, (num_pages, pool[name].page_bytes), generator=rng)
        raw[:, 6:8] = 0x7F  # every word a float64 NaN, signalling or quiet
        raw = raw.to(torch.uint8)
        values = raw.view(getattr(torch, pool[name].dtype))[None]
        rows = ids([list(range(num_pages))])
        arena.scatter(name, rows, values)
        assert torch.equal(arena.gather(name, rows).view(torch.uint8)[0], raw)


def test_an_arena_may_be_empty() -> None:
    arena = Arena(POOL, 0)
    assert arena.num_bytes == 0
    assert arena.gather("odd", []).shape == (0, 0, 5)


def test_values_may_begin_anywhere() -> None:
    arena = Arena(POOL, 2)
    values = torch.arange(1 + 12, dtype=torch.float32)[1:].view(1, 2, 2, 3)
    arena.scatter("even", ids([[3, 0]]), values)
    assert torch.equal(arena.gather("even", ids([[3, 0]])), values)
    spread = torch.arange(24, dtype=torch.float32).view(1, 2, 2, 6)[..., ::2]
    arena.scatter("even", ids([[1, 2]]), spread)
    assert torch.equal(arena.gather("even", ids([[1, 2]])), spread)


def test_large_pages_never_overlap() -> None:
    """Every large page in another layout's hands: all keep what they were given."""
    arena = Arena(POOL, len(POOL.layouts))
    given_pages: dict[str, tuple[list[list[PageId]], Tensor]] = {}
    for large, page_layout in enumerate(POOL.layouts):
        per_large = POOL.pages_per_large(page_layout.name)
        assert per_large * page_layout.page_bytes <= POOL.large_page_bytes
        rows = ids([[large * per_large + at for at in range(per_large)]])
        values = numbered(page_layout, 1, per_large, seed=large)
        arena.scatter(page_layout.name, rows, values)
        given_pages[page_layout.name] = rows, values
    for name, (rows, values) in given_pages.items():
        assert torch.equal(arena.gather(name, rows), values), name


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_has_aligned_pages(dtype: str) -> None:
    """Large pages of an odd number of bytes: views of wide dtypes must still start where they may."""
    page_layout = layout("x", (3,), dtype)
    pool = PoolLayout(large_page_bytes=101, layouts=(page_layout,))
    arena = Arena(pool, 3)
    last = ids([[3 * pool.pages_per_large("x") - 1]])
    values = numbered(page_layout, 1, 1)
    arena.scatter("x", last, values)
    assert torch.equal(arena.gather("x", last), values)
    assert torch.equal(arena.pages("x")[-1, -1], values[0, 0]), "the view sees the same bytes"
    assert arena.num_bytes >= 3 * 101


def test_gathered_pages_are_copies_and_an_id_may_repeat() -> None:
    arena = Arena(POOL, 2)
    arena.scatter("odd", ids([[3]]), torch.full((1, 1, 5), 7.0))
    for name in ("odd", "even"):
        rows = ids([[3, 3], [0, 3]])
        got = arena.gather(name, rows)
        assert torch.equal(got[0, 0], got[0, 1])
        before = arena.gather(name, rows)
        got += 1
        assert torch.equal(arena.gather(name, rows), before), "writing to a copy writes to no page"


def test_nothing_may_be_gathered() -> None:
    arena = Arena(POOL, 1)
    for name in ("odd", "even"):
        shape = POOL[name].shape
        assert arena.gather(name, ids([[], []])).shape == (2, 0, *shape)
        assert arena.gather(name, []).shape == (0, 0, *shape)
        arena.scatter(name, ids([[]]), torch.empty(1, 0, *shape))
    arena.copy([])
    assert not arena.pages("even").any()


@pytest.mark.parametrize("name", ["even", "odd"])
def test_what_does_not_fit_is_refused_and_writes_nothing(name: str) -> None:
    arena = Arena(POOL, 1)
    shape = POOL[name].shape
    one = ids([[0]])
    with pytest.raises(ValueError, match="same number"):
        arena.gather(name, ids([[0, 1], [2]]))
    with pytest.raises(ValueError, match=r"expected torch.float32 \[1, 1, .*got torch.float64"):
        arena.scatter(name, one, torch.ones(1, 1, *shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=name):
        arena.scatter(name, one, torch.ones(1, 2, *shape))
    with pytest.raises(ValueError, match=name):
        arena.scatter(name, one, torch.ones(1, *shape))
    with pytest.raises(IndexError):
        arena.gather(name, ids([[POOL.pages_per_large(name)]]))
    assert not arena.pages(name).any()


def order(name: str, source: int, target: int) -> CopyOrder:
    return CopyOrder(layout=name, source=PageId(source), target=PageId(target))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.builds(order, st.sampled_from(["even", "odd"]), st.integers(0, 5), st.integers(0, 5)),
        max_size=12,
    )
)
def test_copy_orders_count_as_one_after_the_other(orders: list[CopyOrder]) -> None:
    """Chains, repeated targets, a page copied to itself: the same as a loop over plain tensors."""
    # Two arenas' worth of large pages: "even" lives in the lower half, "odd" in the upper one.
    arena = Arena(POOL, 4)
    first = {"even": 0, "odd": 2 * POOL.pages_per_large("odd")}
    plain: dict[str, Tensor] = {}
    for name, start in first.items():
        values = numbered(POOL[name], 1, 6, seed=start)
        arena.scatter(name, ids([list(range(start, start + 6))]), values)
        plain[name] = values[0].clone()
    for asked in orders:
        plain[asked.layout][asked.target] = plain[asked.layout][asked.source].clone()
    arena.copy(
        order(asked.layout, first[asked.layout] + asked.source, first[asked.layout] + asked.target)
        for asked in orders
    )
    for name, start in first.items():
        assert torch.equal(arena.gather(name, ids([list(range(start, start + 6))]))[0], plain[name])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["new", "fork", "write", "write", "drop", "drop", "recall", "tidy"]),
            st.integers(0, 99),
            st.integers(0, 99),
        ),
        max_size=40,
    ),
    st.integers(1, 6),
    st.sampled_from(["even", "odd"]),
)
def test_nobody_sees_another_holders_writes(
    events: list[tuple[str, int, int]], num_large: int, name: str
) -> None:
    """Ledger and arena together: tables that fork, share by content, are written to and move, against lists of numbers."""
    ledger, arena = Ledger(POOL, num_large), Arena(POOL, num_large)
    tables: list[tuple[tuple[PageId, ...], list[int]]] = []
    made: list[tuple[list[PageKey], list[int]]] = []

    def fill(page: PageId, value: int) -> None:
        arena.scatter(name, [[page]], torch.full((1, 1, *POOL[name].shape), float(value)))

    for event, (what, at, index) in enumerate(events, start=1):
        if what == "new":
            contents = [event, event + 1000, event + 2000][: 1 + at % 3]
            keys = [PageKey(bytes([event, place])) for place in range(len(contents))]
            try:
                pages = ledger.reserve(name, len(contents), owner="a")
            except OutOfPagesError:
                continue
            for page, value in zip(pages, contents, strict=True):
                fill(page, value)
            ledger.commit(name, pages, keys)
            tables.append((pages, contents))
            made.append((keys, list(contents)))
        elif what == "recall" and made:
            keys, contents = made[at % len(made)]
            pages = ledger.match(name, keys)
            tables.append((pages, contents[: len(pages)]))
        elif what == "fork" and tables:
            pages, contents = tables[at % len(tables)]
            ledger.retain(name, pages, owner="b")
            tables.append((pages, list(contents)))
        elif what == "drop" and tables:
            pages, _ = tables.pop(at % len(tables))
            ledger.release(name, pages)
        elif what == "write" and tables and tables[at % len(tables)][0]:
            pages, contents = tables[at % len(tables)]
            place = index % len(pages)
            try:
                written = ledger.writable(name, pages, place, owner="c")
            except OutOfPagesError:
                continue
            if written.copy is not None:
                arena.copy([written.copy])
                assert torch.equal(
                    arena.gather(name, [[written.pages[place]]]),
                    torch.full((1, 1, *POOL[name].shape), float(contents[place])),
                ), "the copy starts as what it was copied from"
            fill(written.pages[place], -event)
            ledger.commit(name, (written.pages[place],), None)
            contents = [*contents[:place], -event, *contents[place + 1 :]]
            tables[at % len(tables)] = written.pages, contents
        elif what == "tidy":
            ledger.set_num_large_pages(index % (num_large + 1))
            moves = ledger.plan_moves(4096 * at, num_spare=num_large)
            if moves is not None:
                arena.copy(moves.copies)
                arena.release(moves.released)
                tables = [(moves.now_at(name, pages), contents) for pages, contents in tables]
            ledger.set_num_large_pages(num_large)
        ledger.check_integrity()
        for pages, contents in tables:
            seen = arena.gather(name, [pages])[0].flatten(1)
            assert torch.equal(
                seen, torch.tensor(contents, dtype=torch.float32)[:, None].expand_as(seen)
            )


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_a_lower_budget_gives_memory_back_to_the_system_and_a_higher_one_takes_it() -> None:
    """64 MiB in use, of which a sixteenth is still wanted: defragmentation, then the memory is really gone."""
    mib = 1 << 20
    pool = PoolLayout(large_page_bytes=mib, layouts=(layout("kv", (mib // 64,), "float32"),))
    ledger = Ledger(pool, 64)
    before = resident_bytes()
    arena = Arena(pool, 64)
    assert resident_bytes() - before < 8 * mib, "address space only"
    pages = ledger.reserve("kv", 64 * 16, owner="a")
    values = torch.arange(len(pages), dtype=torch.float32)[:, None]
    for start in range(0, len(pages), 64):
        part = values[start : start + 64].expand(-1, mib // 64)
        arena.scatter("kv", [pages[start : start + 64]], part[None])
    full = resident_bytes()
    assert full - before > 60 * mib
    kept = pages[3::16]
    ledger.release("kv", [page for page in pages if page not in kept])
    ledger.set_num_large_pages(4)
    num_steps = 0
    while ledger.num_large_pages > 4:
        moves = ledger.plan_moves(256 * 1024, num_spare=0)
        assert moves is not None
        assert len(moves.copies) <= 4
        arena.copy(moves.copies)
        arena.release(moves.released)
        kept = moves.now_at("kv", kept)
        num_steps += 1
    assert num_steps == 15
    assert full - resident_bytes() > 56 * mib
    assert torch.equal(arena.gather("kv", [kept])[0, :, :1], values[3::16])
    ledger.set_num_large_pages(64)
    more = ledger.reserve("kv", 60 * 16, owner="b")
    arena.scatter("kv", [more], torch.ones(1, len(more), mib // 64))
    assert resident_bytes() - before > 60 * mib
    assert torch.equal(arena.gather("kv", [kept])[0, :, :1], values[3::16])
    ledger.check_integrity()


def test_only_whole_pages_of_the_system_are_given_back() -> None:
    pool = PoolLayout(large_page_bytes=10_000, layouts=(layout("x", (1250,), "float32"),))
    arena = Arena(pool, 3)
    arena.scatter("x", ids([list(range(6))]), torch.ones(1, 6, 1250))
    assert 4096 <= arena.release([1]) <= 8192
    assert torch.equal(arena.gather("x", ids([[0, 1, 4, 5]])), torch.ones(1, 4, 1250))
    assert Arena(POOL, 2).release([0, 1]) == 0, "smaller than a page of the system"
    assert Arena(POOL, 0).release([]) == 0
