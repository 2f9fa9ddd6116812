"""Versions: readers keep what they read, old pages come back with their last reader."""

import pytest

from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.ledger import Ledger
from ganglion.memory.table import PageTable, VersionedTable

KV = PageLayout(name="kv", kind=PageKind.KV, shape=(16,), dtype="uint8", slots=4)
POOL = PoolLayout(large_page_bytes=64, layouts=(KV,))


def table(ledger: Ledger, num_slots: int = 5) -> PageTable:
    pages = ledger.reserve("kv", KV.num_pages(num_slots), owner="a")
    ledger.commit("kv", pages, None)
    return PageTable(layout="kv", pages=pages, num_slots=num_slots)


def num_used(ledger: Ledger) -> int:
    ledger.check_integrity()
    return ledger.stats().num_used_pages["kv"]


def test_readers_keep_their_version_writers_do_not_wait() -> None:
    ledger = Ledger(POOL, 8)
    versions = VersionedTable(ledger)
    assert versions.acquire() is None
    first = table(ledger)
    assert versions.publish(first) == 1
    reader, other = versions.acquire(), versions.acquire()
    assert reader is not None
    assert other is not None
    assert reader.tables == (first,)
    assert versions.publish(table(ledger), table(ledger)) == 2
    assert (versions.num_versions, versions.num_pages()) == (2, {"kv": 6})
    versions.release(reader)
    assert num_used(ledger) == 6
    versions.release(other)
    assert (versions.num_versions, num_used(ledger)) == (1, 4)
    versions.check_integrity()
    versions.close()
    assert num_used(ledger) == 0
    assert versions.acquire() is None


def test_a_version_that_is_read_outlives_its_session() -> None:
    ledger = Ledger(POOL, 8)
    versions = VersionedTable(ledger)
    versions.publish(table(ledger))
    lease = versions.acquire()
    assert lease is not None
    versions.close()
    assert num_used(ledger) == 2
    versions.release(lease)
    assert num_used(ledger) == 0
    with pytest.raises(AssertionError, match="version 1 is gone"):
        versions.release(lease)


def test_pages_that_are_not_committed_cannot_be_published() -> None:
    ledger = Ledger(POOL, 8)
    pages = ledger.reserve("kv", 1, owner="a")
    with pytest.raises(AssertionError, match="not committed"):
        VersionedTable(ledger).publish(PageTable(layout="kv", pages=pages, num_slots=1))


def test_integrity_finds_a_page_that_was_given_out_again() -> None:
    ledger = Ledger(POOL, 8)
    versions = VersionedTable(ledger)
    published = table(ledger)
    versions.publish(published)
    ledger.release("kv", published.pages)  # a defect: the reference is the table's now
    table(ledger)
    with pytest.raises(AssertionError, match="stale kv page"):
        versions.check_integrity()
