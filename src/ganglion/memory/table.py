"""Page tables: the ordered pages of one thing, and its versions while somebody reads them. Pure; called by the engine.

A writer publishes whole tables, readers lease the newest version: neither waits for the other, and an old version's
pages go back to the ledger with its last reader. Knows pages by id; what they hold is the caller's affair.
"""

from dataclasses import dataclass, replace

from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.types import PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """Pages in order; `num_slots` rows of them are in use, the rest of the last page is not."""

    layout: str
    pages: tuple[PageId, ...]
    num_slots: int


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """Readers' right to one version: its pages stay, unchanged, until `VersionedTable.release`.

    Between two steps their bytes may move: `tables` always says where they are, a page id taken from it does not.
    """

    version: int
    tables: tuple[PageTable, ...]


@dataclass(slots=True)
class _Version:
    lease: Lease
    epochs: tuple[
        tuple[int, ...], ...
    ]  # of each table's pages: a page that was given out again shows
    num_holders: int  # readers, and one more while it is the newest


class VersionedTable:
    """Tables that change together; each living version holds one reference to each of its pages.

    A lease costs a counter, however long the tables are: forking a table for one more reader touches no page.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._versions: dict[int, _Version] = {}
        self.version = 0  # the newest; 0 before the first

    @property
    def num_versions(self) -> int:
        """Versions whose pages are still held."""
        return len(self._versions)

    def publish(self, *tables: PageTable) -> int:
        """Make these the newest version. Takes the caller's page references over; all pages must be committed."""
        epochs = tuple(self._ledger.epochs(table.layout, table.pages) for table in tables)
        for table, of_table in zip(tables, epochs, strict=True):
            self._ledger.check_held(table.layout, table.pages, of_table)
        superseded = self._versions.get(self.version)
        if not self._versions:
            self._ledger.attach(self)
        self.version += 1
        lease = Lease(version=self.version, tables=tables)
        self._versions[self.version] = _Version(lease, epochs, num_holders=1)
        if superseded is not None:
            self._let_go(superseded)
        return self.version

    def acquire(self) -> Lease | None:
        """The newest version, for one reader; None when there is none."""
        newest = self._versions.get(self.version)
        if newest is None:
            return None
        newest.num_holders += 1
        return newest.lease

    def release(self, lease: Lease) -> None:
        """The reader is done."""
        version = self._versions.get(lease.version)
        assert version is not None, (
            f"version {lease.version} is gone already; living: {sorted(self._versions)}"
        )
        self._let_go(version)

    def close(self) -> None:
        """Nothing newer will come and nobody may start to read; versions that are being read live on."""
        newest = self._versions.get(self.version)
        self.version += 1  # so that `acquire` finds nothing
        if newest is not None:
            self._let_go(newest)

    def relocate(self, moves: Moves) -> None:
        """The ledger moved pages: leases in readers' hands follow."""
        for version in self._versions.values():
            lease = version.lease
            for table in lease.tables:
                if moves.concern(table.layout, table.pages):
                    lease.tables = tuple([_moved(table, moves) for table in lease.tables])
                    break

    def num_pages(self) -> dict[str, int]:
        """Pages held, by layout, over all living versions."""
        counts: dict[str, int] = {}
        for version in self._versions.values():
            for table in version.lease.tables:
                counts[table.layout] = counts.get(table.layout, 0) + len(table.pages)
        return counts

    def check_integrity(self) -> None:
        """Raise AssertionError when a page of a living version is not held, or has been given out again."""
        for version in self._versions.values():
            assert version.num_holders > 0, f"version {version.lease.version} has no holder"
            for table, epochs in zip(version.lease.tables, version.epochs, strict=True):
                self._ledger.check_held(table.layout, table.pages, epochs)

    def _let_go(self, version: _Version) -> None:
        version.num_holders -= 1
        if not version.num_holders:
            del self._versions[version.lease.version]
            for table in version.lease.tables:
                self._ledger.release(table.layout, table.pages)
            if not self._versions:
                self._ledger.detach(self)


def _moved(table: PageTable, moves: Moves) -> PageTable:
    return replace(table, pages=moves.now_at(table.layout, table.pages))
