"""Defragmentation and the pool's budget by example: what moves, what stays, what it costs, who learns of it."""

import random

import pytest

from ganglion.errors import FieldError, OutOfPagesError
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.book import PAGE_COST_BYTES
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import CopyOrder, Moves
from ganglion.memory.prefix import PageKey
from ganglion.memory.table import PageTable, VersionedTable
from ganglion.types import PageId

KV = PageLayout(name="kv", kind=PageKind.KV, shape=(16,), dtype="uint8", slots=1)
FEATURE = PageLayout(name="feature", kind=PageKind.FEATURE, shape=(64,), dtype="uint8", slots=1)
POOL = PoolLayout(large_page_bytes=64, layouts=(KV, FEATURE))
ONE = PAGE_COST_BYTES  # takes of the budget: moving a page as small as ours
ALL = 100 * ONE


def keys(*names: str) -> tuple[PageKey, ...]:
    return tuple(PageKey(name.encode()) for name in names)


def with_holes(ledger: Ledger, *kept: tuple[int, ...]) -> list[PageId]:
    """One full large page of kv after the other, of which these places are kept; each page that is left."""
    pages = ledger.reserve("kv", 4 * len(kept), owner="a")
    ledger.commit("kv", pages, None)
    left = [pages[4 * large + place] for large, places in enumerate(kept) for place in places]
    ledger.release("kv", [page for page in pages if page not in left])
    return left


def num_free(ledger: Ledger) -> int:
    ledger.check_integrity()
    return ledger.stats().num_free_large_pages


def test_the_emptiest_large_page_moves_into_the_fullest() -> None:
    ledger = Ledger(POOL, 3)
    left = with_holes(ledger, (0, 1, 2), (3,), (0, 1))
    assert ledger.plan_moves(ALL, num_spare=0) is None, "nobody needs it"
    with pytest.raises(OutOfPagesError):
        ledger.reserve("feature", 1, owner="b")
    moves = ledger.plan_moves(ALL, num_spare=1)
    assert moves == Moves(
        copies=(CopyOrder(layout="kv", source=PageId(7), target=PageId(3)),),
        places={"kv": {PageId(7): PageId(3)}},
        released=(),
    )
    assert moves.now_at("kv", left) == (0, 1, 2, 3, 8, 9)
    assert moves.now_at("feature", left) == tuple(left), "another layout's ids"
    assert num_free(ledger) == 1
    assert ledger.plan_moves(ALL, num_spare=1) is None, "enough"
    assert ledger.plan_moves(ALL, num_spare=2) is None, "two pages do not fit anywhere else"
    assert ledger.reserve("feature", 1, owner="b") == (1,)
    with pytest.raises(AssertionError, match="which nobody holds"):
        ledger.release("kv", left[3:4])


def test_a_step_moves_no_more_than_its_budget_and_the_next_one_goes_on() -> None:
    ledger = Ledger(POOL, 2)
    left = tuple(with_holes(ledger, (0, 1), (2, 3)))
    assert ledger.plan_moves(ONE - 1, num_spare=1) is None, "less than a page"
    for budget_bytes, num_left in ((2 * ONE - 1, 1), (ONE, 0)):
        moves = ledger.plan_moves(budget_bytes, num_spare=1)
        assert moves is not None
        assert len(moves.copies) == 1
        left = moves.now_at("kv", left)
        assert num_free(ledger) == (0 if num_left else 1)
    assert sorted(left) == [0, 1, 2, 3] or sorted(left) == [4, 5, 6, 7]


def test_nothing_starts_that_cannot_be_finished() -> None:
    ledger = Ledger(POOL, 2)
    with_holes(ledger, (0, 1, 2), (0, 1))
    assert ledger.plan_moves(ALL, num_spare=1) is None


def test_all_that_is_known_of_a_page_moves_along() -> None:
    ledger = Ledger(POOL, 4)
    shared, cached_old, cached_new, pinned = with_holes(ledger, (0,), (0,), (0,), (0,))
    for page, name in ((shared, "s"), (cached_old, "o"), (cached_new, "n")):
        ledger.commit("kv", (page,), keys(name))
    ledger.retain("kv", (shared,), owner="b")
    epochs = ledger.epochs("kv", (shared,))
    ledger.release("kv", (cached_old,))
    ledger.release("kv", (cached_new,))
    ledger.pin("kv", (pinned,))
    moves = ledger.plan_moves(ALL, num_spare=3)
    assert moves is not None
    assert num_free(ledger) == 3
    places = moves.places["kv"]
    assert pinned not in places
    assert {page // 4 for page in places.values()} == {pinned // 4}, "where it cannot be emptied"
    assert ledger.epochs("kv", (places[shared],)) == epochs
    ledger.check_held("kv", (places[shared],), epochs)
    assert ledger.match("kv", keys("s")) == (places[shared],)
    live = {page.page_id: (page.owner, page.num_refs) for page in ledger.stats().live_pages}
    assert live[places[shared]] == ("shared", 3)
    ledger.reserve("kv", 13, owner="c")
    assert ledger.match("kv", keys("o")) == (), "still the first to go"
    assert ledger.match("kv", keys("n")) == (places[cached_new],)


def test_a_large_page_is_not_moved_into_one_that_is_only_cached() -> None:
    """It would free one large page and take the other from everybody else."""
    ledger = Ledger(POOL, 2)
    held, _ = with_holes(ledger, (0,), (0,))
    ledger.commit("kv", (PageId(4),), keys("x"))
    ledger.release("kv", (PageId(4),))
    moves = ledger.plan_moves(ALL, num_spare=1)
    assert moves is not None
    assert moves.places == {"kv": {PageId(4): PageId(1)}}, "the cached page moves instead"
    assert ledger.match("kv", keys("x")) == (1,)
    assert held == 0
    assert num_free(ledger) == 1


def test_cached_pages_that_are_in_the_way_go_the_least_valuable_first() -> None:
    """Every large page is full, three quarters are cached: nobody else could ever have one."""
    ledger = Ledger(POOL, 3)
    pages = ledger.reserve("kv", 12, owner="a")
    ledger.commit("kv", pages, keys(*"abcdefghijkl"))
    held = pages[::4]
    ledger.release("kv", [page for page in reversed(pages) if page not in held])
    assert (ledger.num_free("feature"), ledger.num_evictable("feature")) == (0, 0)
    assert ledger.plan_moves(2 * ONE, num_spare=1) is None, "two cached pages less, not yet enough"
    assert ledger.match("kv", keys("b")) == ()
    moves = ledger.plan_moves(ALL, num_spare=1)
    assert moves is not None
    assert num_free(ledger) == 1
    assert len(ledger.stats().live_pages) == 8, "no more than one large page was emptied"
    assert ledger.match("kv", keys("l")) != (), "what was released last is still known"
    now = moves.now_at("kv", held)
    for key, page in zip(keys(*"aei"), now, strict=True):
        assert ledger.match("kv", (key,)) == (page,)
    ledger.check_integrity()


def test_no_cache_is_lost_in_vain() -> None:
    ledger = Ledger(POOL, 2)
    pages = ledger.reserve("kv", 8, owner="a")
    ledger.commit("kv", pages, keys(*"abcdefgh"))
    ledger.release("kv", pages[:3])
    assert ledger.plan_moves(ALL, num_spare=1) is None
    assert ledger.stats().num_cached_pages["kv"] == 3, "five held pages need both large pages"


def test_leases_in_readers_hands_follow() -> None:
    ledger = Ledger(POOL, 3)
    left = with_holes(ledger, (0, 1, 2), (3,), (0, 1, 2, 3))
    versions = VersionedTable(ledger)
    versions.publish(PageTable(layout="kv", pages=(left[3], left[0]), num_slots=2))
    ledger.retain("kv", (left[3],), owner="b")
    old = versions.acquire()
    versions.publish(PageTable(layout="kv", pages=(left[3],), num_slots=1))
    newest = versions.acquire()
    assert old is not None
    assert newest is not None
    assert ledger.plan_moves(ALL, num_spare=1) is not None
    assert old.tables[0].pages == (3, 0)
    assert newest.tables[0].pages == (3,)
    versions.check_integrity()
    versions.release(old)
    versions.close()
    versions.release(newest)
    ledger.release("kv", (left[1], left[2], *left[4:]))
    assert num_free(ledger) == 3
    assert ledger.plan_moves(ALL, num_spare=3) is None


def test_who_holds_nothing_is_forgotten() -> None:
    ledger = Ledger(POOL, 3)
    told: list[Moves] = []

    class Remembers:
        def relocate(self, moves: Moves) -> None:
            told.append(moves)

    holder = Remembers()
    ledger.attach(holder)
    with_holes(ledger, (0,), (0,), (0,))
    moves = ledger.plan_moves(ONE, num_spare=2)
    assert told == [moves]
    ledger.detach(holder)
    assert ledger.plan_moves(ONE, num_spare=2) is not None
    assert len(told) == 1


def test_a_lower_budget_takes_free_large_pages_at_once_and_frees_the_others_by_moving() -> None:
    ledger = Ledger(POOL, 6)
    left = with_holes(ledger, (0,), (0, 1), (0,))
    ledger.set_num_large_pages(1)
    assert ledger.num_large_pages == 6
    moves = ledger.plan_moves(ONE, num_spare=0)
    assert moves is not None
    assert len(moves.copies) == 1
    assert sorted(moves.released) in ([0, 3, 4, 5], [2, 3, 4, 5])
    last = ledger.plan_moves(ALL, num_spare=0)
    assert last is not None
    assert len(last.released) == 1
    assert ledger.num_large_pages == 1
    ledger.check_integrity()
    with pytest.raises(OutOfPagesError):
        ledger.reserve("feature", 1, owner="b")
    now = last.now_at("kv", moves.now_at("kv", left))
    assert len({page // 4 for page in now}) == 1
    ledger.set_num_large_pages(3)
    assert ledger.num_large_pages == 3
    assert len(ledger.reserve("feature", 2, owner="b")) == 2
    ledger.check_integrity()


def test_a_lower_budget_evicts_what_is_cached_and_waits_for_what_is_held() -> None:
    ledger = Ledger(POOL, 3)
    pages = ledger.reserve("kv", 8, owner="a")
    ledger.commit("kv", pages, keys(*"abcdefgh"))
    ledger.release("kv", pages)
    (held,) = ledger.reserve("feature", 1, owner="a")
    ledger.set_num_large_pages(0)
    for num_large_pages in (3, 2, 1, 1):
        ledger.plan_moves(3 * ONE, num_spare=0)
        ledger.check_integrity()
        assert ledger.num_large_pages == num_large_pages
    ledger.release("feature", (held,))
    assert ledger.plan_moves(0, num_spare=0) == Moves(copies=(), places={}, released=(held,))
    assert ledger.num_large_pages == 0


def test_a_budget_that_the_arena_does_not_have_is_refused() -> None:
    ledger = Ledger(POOL, 2, max_large_pages=4)
    ledger.set_num_large_pages(4)
    assert num_free(ledger) == 4
    with pytest.raises(FieldError, match=r"num_large_pages: expected 0..4, .*got 5") as caught:
        ledger.set_num_large_pages(5)
    assert "memory.arena_bytes" in caught.value.advice
    assert ledger.num_large_pages == 4


def test_copies_of_known_content_are_merged() -> None:
    """Two robots sent the same at the same time: both computed it, one of the results stays."""
    ledger = Ledger(POOL, 4)
    first, second = (ledger.reserve("kv", 2, owner=owner) for owner in "ab")
    for pages in (first, second):
        ledger.commit("kv", pages, keys("x", "y"))
    assert ledger.merge("kv", first, keys("x", "y"), owner="a") == first
    assert ledger.merge("kv", second, keys("x", "y"), owner="b") == first
    assert {page.page_id: page.owner for page in ledger.stats().live_pages} == dict.fromkeys(
        first, "shared"
    )
    for _ in range(2):
        ledger.release("kv", first)
    third = ledger.reserve("kv", 1, owner="c")
    ledger.commit("kv", third, keys("y"))
    assert ledger.merge("kv", third, keys("y"), owner="c") == first[1:], "a cached one is revived"
    assert ledger.stats().num_used_pages["kv"] == 1
    ledger.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_one_layout_can_always_be_packed(seed: int) -> None:
    """Without pins and other layouts nothing remains to be freed, and every page keeps its reference."""
    rng = random.Random(seed)
    ledger = Ledger(POOL, 60)
    pages = ledger.reserve("kv", 240, owner="a")
    ledger.commit("kv", pages, None)
    left = tuple(rng.sample(pages, rng.randrange(1, 120)))
    ledger.release("kv", [page for page in pages if page not in left])
    num_steps = 0
    while moves := ledger.plan_moves(8 * ONE, num_spare=60):
        left = moves.now_at("kv", left)
        ledger.check_integrity()
        num_steps += 1
    assert num_free(ledger) == 60 - -(-len(left) // 4)
    assert num_steps <= len(pages)
    ledger.release("kv", left)
    assert num_free(ledger) == 60
