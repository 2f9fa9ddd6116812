"""Public context: a session's perception as versioned page tables. Owned by the engine, on the loop's thread.

Perception commits version v + 1 atomically; readers hold a version, so an old one dies when nobody reads it
(multi-version concurrency over pages; the public context buffer of Auras, arXiv 2509.09560).
"""

from dataclasses import dataclass

from ganglion.memory.ledger import Ledger
from ganglion.types import PageId, SessionId

Table = tuple[str, tuple[PageId, ...]]  # layout name, pages


@dataclass(slots=True)
class _Version:
    tables: tuple[Table, ...]
    num_holders: int  # readers, and one more while it is the newest


class PublicContext:
    """Versions of one session's context; each version holds one reference to each of its pages."""

    def __init__(self, ledger: Ledger, session_id: SessionId) -> None:
        self._ledger, self._session_id = ledger, session_id
        self._versions: dict[int, _Version] = {}
        self.version = 0

    def publish(self, tables: tuple[Table, ...]) -> int:
        """Commit the next version, taking over the caller's page references; the caller holds it until `release`."""
        self.version += 1
        self._versions[self.version] = _Version(tables, num_holders=2)
        if self.version > 1:
            self.release(self.version - 1)
        return self.version

    def release(self, version: int) -> None:
        """One holder less; the version's pages go back with the last."""
        held = self._versions[version]
        held.num_holders -= 1
        if not held.num_holders:
            del self._versions[version]
            for layout, pages in held.tables:
                self._ledger.release(layout, pages)

    def close(self) -> None:
        """The session is gone: the newest version lives on only while somebody reads it."""
        if self.version:
            self.release(self.version)

    def num_pages(self) -> dict[str, int]:
        """Pages held, by layout, over all living versions."""
        counts: dict[str, int] = {}
        for held in self._versions.values():
            for layout, pages in held.tables:
                counts[layout] = counts.get(layout, 0) + len(pages)
        return counts
