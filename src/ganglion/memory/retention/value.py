"""The Value seam: what kept things are worth, so that the least valuable goes first. Called by the ledger. Pure.

Items are cached small pages of one layout, or large pages that nobody reads. It does not know which.
"""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Value(Protocol):
    """Items in the order in which they may go; every method O(1)."""

    def keep(self, item: int, now: int) -> None:
        """Nobody reads `item` from `now` on (the ledger's count of such events; it never runs back)."""
        ...

    def drop(self, item: int) -> None:
        """`item` is read again, or gone."""
        ...

    def weakest(self) -> int | None:
        """The item that is worth least; None when there is none."""
        ...

    def worth(self, item: int) -> float:
        """Worth per byte, comparable between all of a ledger's instances."""
        ...
