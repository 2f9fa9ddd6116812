"""Two levels of pages: partial large pages first, whole large pages back, counters that always agree."""

import pytest

from ganglion.memory.pool import LargePages, Slabs
from ganglion.memory.retention.lru import Lru
from ganglion.types import PageId


def slabs(large: LargePages, per_large: int = 4) -> Slabs:
    return Slabs(large, pages_per_large=per_large, idle=Lru())


def test_a_partial_large_page_is_filled_before_a_new_one_is_opened() -> None:
    large = LargePages(3, 3)
    pool = slabs(large)
    first = pool.take(6)
    assert (pool.num_open, pool.num_free, large.num_free) == (2, 2, 1)
    pool.give(first[:1], 1)  # one hole in the full large page
    more = pool.take(3)
    assert pool.num_open == 2
    assert {page // 4 for page in more} == {0, 1}
    pool.check_integrity(held={*first[1:], *more}, parked=set())


def test_an_unused_large_page_goes_to_whoever_comes_next() -> None:
    large = LargePages(2, 2)
    small, big = slabs(large), slabs(large, per_large=1)
    pages = small.take(5)
    small.give(pages[:4], 1)
    assert large.num_free == 1
    (page,) = big.take(1)
    assert page == pages[0] // 4, "the large page that came back"
    small.check_integrity(held={pages[4]}, parked=set())
    big.check_integrity(held={page}, parked=set())


def test_a_large_page_is_idle_while_nobody_holds_any_of_it() -> None:
    pool = slabs(LargePages(1, 1))
    a, b = pool.take(2)
    pool.park(a, 1)
    assert pool.num_idle == 0
    pool.give([b], 2)
    assert (pool.num_idle, pool.idle.weakest()) == (1, 0)
    pool.unpark(a)
    assert pool.num_idle == 0
    pool.park(a, 3)
    (c,) = pool.take(1)
    assert pool.num_idle == 0
    pool.check_integrity(held={c}, parked={a})
    pool.evict(a)
    pool.give([c], 4)
    assert (pool.num_open, pool.num_idle) == (0, 0)


def test_integrity_sees_a_page_in_two_states() -> None:
    pool = slabs(LargePages(1, 1))
    (page,) = pool.take(1)
    with pytest.raises(AssertionError, match="two states"):
        pool.check_integrity(held={page, PageId(3)}, parked=set())


def test_lru_order() -> None:
    lru = Lru()
    for now, item in enumerate((5, 6, 7), start=1):
        lru.keep(item, now)
    lru.drop(5)
    lru.keep(5, 4)
    assert [lru.worth(6), lru.worth(7), lru.worth(5)] == [2, 3, 4]
    assert lru.weakest() == 6
    for item in (6, 7, 5):
        lru.drop(item)
    assert lru.weakest() is None
