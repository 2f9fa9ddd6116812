"""Least recently used: what was read last stays longest. The ledger's default Value. Pure."""

from collections import OrderedDict

from ganglion.memory.retention.value import Item


class Lru:
    """Items by the time of their last reader.

    An OrderedDict: about as fast as a linked list over preallocated lists (docs/decisions/0010-page-pool.md), and it
    takes memory only for what is kept.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Item, int] = OrderedDict()

    def keep(self, item: Item, now: int) -> None:
        self._kept[item] = now

    def drop(self, item: Item) -> None:
        del self._kept[item]

    def weakest(self) -> Item | None:
        return next(iter(self._kept), None)

    def worth(self, item: Item) -> float:
        return self._kept[item]
