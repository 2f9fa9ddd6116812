"""Relevance: what was attended to stays, and fades. A Value for pages of a history. Pure.

A page's score is the attention that it received, each share halved every `half_life` events. All scores fade at one
rate, so their order changes only when a page is noted again: an item's rank is a number that does not depend on now,

    rank = t + half_life * log2(score at t),

the time at which a page of score 1 would be worth as much. So ranks compare with `Lru`'s worth, which is a time. Heavy
hitters of attention: H2O (arXiv 2306.14048), with decay.
"""

import heapq
import math

from ganglion.memory.retention.value import Item

_LEAST_SCORE = 1e-9  # a page that nobody ever attended to has a rank too
_MAX_STRANGERS = (
    1024  # scores remembered of items that are not kept: being read, or gone without `forget`
)


class Relevance:
    """Items by decayed attention. `note` and `keep` cost O(log items), the rest O(1) in the mean."""

    def __init__(self, *, half_life: float, first_score: float = 0.25) -> None:
        """`first_score`: what a new page is worth until attention has spoken. Raises ValueError unless positive."""
        if half_life <= 0 or first_score <= 0:
            raise ValueError(
                f"half_life {half_life} and first_score {first_score} must be positive"
            )
        self._half_life, self._first_score = half_life, first_score
        # of all items that were ever kept or noted, till `forget`
        self._ranks: dict[Item, float] = {}
        self._kept: set[Item] = set()
        # (rank, order of arrival, item); may hold items that have moved on, which `weakest` skips
        self._heap: list[tuple[float, int, Item]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, item: Item, now: int) -> None:
        if item not in self._ranks:
            self._ranks[item] = self._rank(self._first_score, now)
        self._kept.add(item)
        if len(self._ranks) > 2 * len(self._kept) + _MAX_STRANGERS:
            self._ranks = {item: self._ranks[item] for item in self._kept}
        self._push(item)

    def note(self, item: Item, mass: float, now: int) -> None:
        """`item` received `mass` of attention (0 to 1) at `now`. Raises ValueError when it is not a share."""
        if not 0.0 <= mass <= 1.0:
            raise ValueError(f"attention mass of item {item!r} must lie in 0..1, got {mass}")
        self._ranks[item] = self._rank(self.score(item, now) + mass, now)
        if item in self._kept:
            self._push(item)

    def drop(self, item: Item) -> None:
        self._kept.remove(item)

    def forget(self, item: Item) -> None:
        """The item's page is gone: its number may come again for another."""
        self._kept.discard(item)
        self._ranks.pop(item, None)

    def weakest(self) -> Item | None:
        while self._heap:
            item = self._heap[0][2]
            if self._is_current(self._heap[0]):
                return item
            heapq.heappop(self._heap)
        return None

    def worth(self, item: Item) -> float:
        return self._ranks[item]

    def score(self, item: Item, now: int) -> float:
        """The attention that is left of all it received; `first_score` for an unknown item."""
        rank = self._ranks.get(item)
        return self._first_score if rank is None else math.exp2((rank - now) / self._half_life)

    def _rank(self, score: float, now: int) -> float:
        return now + self._half_life * math.log2(max(score, _LEAST_SCORE))

    def _push(self, item: Item) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (self._ranks[item], self._num_pushed, item))
        if len(self._heap) > 4 * len(self._kept) + 16:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def _is_current(self, entry: tuple[float, int, Item]) -> bool:
        rank, _, item = entry
        return item in self._kept and self._ranks[item] == rank
