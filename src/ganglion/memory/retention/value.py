"""The Value seam: what kept things are worth, so that the least valuable goes first. Called by the ledger. Pure.

Items are cached small pages of one layout by their keys, so that they keep their worth wherever they move, or large
pages that nobody reads by their numbers. It does not know which.
"""

from typing import Protocol, runtime_checkable

Item = int | bytes


@runtime_checkable
class Value(Protocol):
    """Items in the order in which they may go; every method O(1)."""

    def keep(self, item: Item, now: int) -> None:
        """Nobody reads `item` from `now` on (the ledger's count of such events; it never runs back)."""
        ...

    def drop(self, item: Item) -> None:
        """`item` is read again, or gone."""
        ...

    def weakest(self) -> Item | None:
        """The item that is worth least; None when there is none."""
        ...

    def worth(self, item: Item) -> float:
        """Worth per byte, comparable between all of a ledger's instances."""
        ...
