"""The ledger by example: sharing, caching, eviction in order, copy-on-write, all or nothing."""

import pytest

from ganglion.errors import OutOfPagesError
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import CopyOrder
from ganglion.memory.prefix import PageKey, chain, page_keys
from ganglion.types import LivePage, PageId


def layout(name: str, page_bytes: int) -> PageLayout:
    return PageLayout(name=name, kind=PageKind.KV, shape=(page_bytes,), dtype="uint8", slots=1)


POOL = PoolLayout(large_page_bytes=64, layouts=(layout("kv", 16), layout("feature", 24)))


def keys(*names: str) -> tuple[PageKey, ...]:
    return tuple(PageKey(name.encode()) for name in names)


def cached(ledger: Ledger, *names: str, layout_name: str = "kv") -> tuple[PageId, ...]:
    pages = ledger.reserve(layout_name, len(names), owner="maker")
    ledger.commit(layout_name, pages, keys(*names))
    ledger.release(layout_name, pages)
    return pages


def test_pages_of_one_content_are_shared() -> None:
    ledger = Ledger(POOL, 2)
    pages = ledger.reserve("kv", 3, owner="a")
    assert ledger.match("kv", keys("x")) == (), "not committed yet"
    ledger.commit("kv", pages[:2], keys("x", "y"))
    assert ledger.match("kv", keys("x", "y", "z")) == pages[:2]
    assert ledger.match("feature", keys("x")) == (), "layouts do not share"
    stats = ledger.stats()
    assert (stats.num_hits, stats.num_misses) == (2, 3)
    owners = {page.page_id: (page.owner, page.num_refs) for page in stats.live_pages}
    assert owners == {pages[0]: ("shared", 2), pages[1]: ("shared", 2), pages[2]: ("a", 1)}
    ledger.check_integrity()


def test_a_known_key_stays_with_its_page() -> None:
    ledger = Ledger(POOL, 2)
    first, second = ledger.reserve("kv", 2, owner="a")
    ledger.commit("kv", (first, second), keys("x", "x"))
    assert ledger.match("kv", keys("x")) == (first,)
    ledger.release("kv", (second,))
    assert ledger.stats().num_cached_pages["kv"] == 0, "a private page is free at once"
    ledger.check_integrity()


def test_keyed_pages_stay_until_room_is_needed_oldest_and_tail_first() -> None:
    ledger = Ledger(POOL, 1)
    old = cached(ledger, "x", "y")
    new = cached(ledger, "z")
    assert (ledger.num_free("kv"), ledger.num_evictable("kv")) == (1, 3)
    assert ledger.match("kv", keys("x")) == old[:1]
    ledger.release("kv", old[:1])
    taken = ledger.reserve("kv", 2, owner="b")
    assert old[1] in taken, "y is the oldest: x was read since, z came later"
    ledger.reserve("kv", 1, owner="b")
    assert ledger.match("kv", keys("z")) == ()
    assert ledger.match("kv", keys("x")) == old[:1]
    assert new[0] != old[0]
    ledger.check_integrity()


def test_the_end_of_a_table_is_evicted_before_its_beginning() -> None:
    ledger = Ledger(POOL, 1)
    pages = cached(ledger, "x", "y", "z")
    ledger.reserve("kv", 2, owner="b")
    assert ledger.match("kv", keys("x", "y", "z")) == pages[:2]


def test_an_idle_large_page_of_another_layout_is_taken_over() -> None:
    ledger = Ledger(POOL, 2)
    cached(ledger, "x", "y")
    held = ledger.reserve("feature", 2, owner="a")
    assert (ledger.num_free("feature"), ledger.num_evictable("feature")) == (0, 2)
    more = ledger.reserve("feature", 1, owner="a")
    assert ledger.match("kv", keys("x")) == ()
    assert (more[0] // 2, held[0] // 2) == (0, 1)
    ledger.check_integrity()


def test_a_large_page_with_one_reader_is_not_taken_over() -> None:
    ledger = Ledger(POOL, 1)
    cached(ledger, "x", "y")
    ledger.match("kv", keys("x"))
    with pytest.raises(OutOfPagesError) as caught:
        ledger.reserve("feature", 1, owner="a")
    assert (caught.value.need, caught.value.free, caught.value.evictable) == (1, 0, 0)
    assert "need 1 feature pages, 0 free + 0 evictable" in str(caught.value)


def test_the_older_of_own_page_and_foreign_large_page_goes_first() -> None:
    ledger = Ledger(POOL, 2)
    cached(ledger, "f", "g", layout_name="feature")
    held = ledger.reserve("kv", 3, owner="a")
    cached(ledger, "x")
    ledger.reserve("kv", 1, owner="a")
    assert ledger.match("kv", keys("x")) != (), "the features had waited longer"
    assert ledger.match("feature", keys("f")) == ()
    assert len(held) == 3
    ledger.check_integrity()


def test_a_reservation_that_fails_changes_nothing() -> None:
    ledger = Ledger(POOL, 2)
    cached(ledger, "x", "y")
    before = ledger.stats()
    with pytest.raises(OutOfPagesError):
        ledger.reserve("kv", 9, owner="a")
    assert ledger.stats() == before
    assert len(ledger.reserve("kv", 8, owner="a")) == 8


def test_a_page_with_two_readers_is_copied_before_it_is_written() -> None:
    ledger = Ledger(POOL, 2)
    mine = ledger.reserve("kv", 2, owner="a")
    assert ledger.writable("kv", mine, 1, owner="a").copy is None
    ledger.retain("kv", mine, owner="b")
    theirs = ledger.writable("kv", mine, 1, owner="b")
    assert theirs.pages[0] == mine[0]
    assert theirs.copy == CopyOrder(layout="kv", source=mine[1], target=theirs.pages[1])
    assert ledger.writable("kv", mine, 1, owner="a").copy is None, "a is its only reader again"
    ledger.release("kv", mine)
    ledger.release("kv", theirs.pages)
    assert ledger.num_free("kv") == 8
    ledger.check_integrity()


def test_a_keyed_page_is_never_written_in_place() -> None:
    ledger = Ledger(POOL, 2)
    pages = ledger.reserve("kv", 1, owner="a")
    ledger.commit("kv", pages, keys("x"))
    written = ledger.writable("kv", pages, 0, owner="a")
    assert written.copy is not None
    assert ledger.match("kv", keys("x")) == pages, "what was promised for x is still there"


def test_no_room_for_a_copy_changes_nothing() -> None:
    ledger = Ledger(POOL, 1)
    pages = ledger.reserve("kv", 4, owner="a")
    ledger.retain("kv", pages, owner="b")
    before = ledger.stats()
    with pytest.raises(OutOfPagesError):
        ledger.writable("kv", pages, 0, owner="b")
    assert ledger.stats() == before


def test_pinned_pages_stay() -> None:
    ledger = Ledger(POOL, 1)
    pages = cached(ledger, "x")
    ledger.pin("kv", pages)
    ledger.pin("kv", pages)
    ledger.unpin("kv", pages)
    with pytest.raises(OutOfPagesError):
        ledger.reserve("kv", 4, owner="a")
    assert ledger.stats().live_pages == (
        LivePage(page_id=pages[0], layout="kv", kind="kv", owner="pinned", num_refs=0),
    )
    ledger.unpin("kv", pages)
    assert len(ledger.reserve("kv", 4, owner="a")) == 4
    ledger.check_integrity()


def test_misuse_is_an_assertion_with_numbers() -> None:
    ledger = Ledger(POOL, 1)
    pages = ledger.reserve("kv", 1, owner="a")
    with pytest.raises(AssertionError, match="no pin"):
        ledger.unpin("kv", pages)
    ledger.release("kv", pages)
    for misuse in (
        lambda: ledger.release("kv", pages),
        lambda: ledger.retain("kv", pages, owner="b"),
        lambda: ledger.commit("kv", pages, None),
        lambda: ledger.writable("kv", pages, 0, owner="a"),
        lambda: ledger.pin("kv", pages),
    ):
        with pytest.raises(AssertionError, match=f"page {pages[0]}"):
            misuse()
    ledger.check_integrity()


def test_a_stale_page_id_is_found() -> None:
    ledger = Ledger(POOL, 1)
    pages = ledger.reserve("kv", 1, owner="a")
    ledger.commit("kv", pages, None)
    epochs = ledger.epochs("kv", pages)
    ledger.check_held("kv", pages, epochs)
    ledger.release("kv", pages)
    with pytest.raises(AssertionError, match="nobody's"):
        ledger.check_held("kv", pages, epochs)
    assert ledger.reserve("kv", 1, owner="b") == pages
    with pytest.raises(AssertionError, match="stale"):
        ledger.check_held("kv", pages, epochs)
    with pytest.raises(AssertionError, match="not committed"):
        ledger.check_held("kv", pages, ledger.epochs("kv", pages))


def test_the_picture_of_a_large_pool_is_bounded() -> None:
    ledger = Ledger(POOL, 100)
    ledger.reserve("kv", 400, owner="a")
    stats = ledger.stats(max_live_pages=10)
    assert (len(stats.live_pages), stats.num_used_pages["kv"]) == (10, 400)


def test_keys_depend_on_everything_before_and_never_cross_a_tenant_or_model() -> None:
    abc = chain("t", "m", [b"a", b"b", b"c"])
    assert chain("t", "m", [b"a", b"b"]) == abc[:2]
    assert chain("t", "m", [b"x", b"b", b"c"])[2] != abc[2]
    others = [chain("u", "m", [b"a"]), chain("t", "n", [b"a"]), chain("tm", "", [b"a"])]
    assert len({abc[:1], *others}) == 4
    assert chain("t", "m", [b"a", b"b"])[1] != chain("t", "m", [b"ab"])[0]
    assert len({*page_keys("m/view", b"image", 3), *page_keys("m/vie", b"wimage", 3)}) == 6
