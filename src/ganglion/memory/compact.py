"""Compaction: which small pages move so that large pages become empty. Called by the ledger between two steps. Pure.

The emptiest large page of a layout gives its pages to the fullest ones; nothing starts that cannot be finished. Pinned
pages never move. Each choice looks at two large pages a layout, however many there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ganglion.memory.book import Book
from ganglion.memory.orders import CopyOrder
from ganglion.types import PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A large page whose small pages all fit into others of its layout."""

    book: Book
    large: int

    @property
    def cost_bytes(self) -> int:
        """What it takes of the steps' budgets until it is empty."""
        return self.book.slabs.num_live(self.large) * self.book.cost_bytes


def cheapest_victim(books: Mapping[str, Book], budget_bytes: int) -> Victim | None:
    """The large page that costs the least to empty; None when none can be emptied.

    Layouts of which not even one page can move within the budget are left out.
    """
    victims = [
        Victim(book=book, large=large)
        for book in books.values()
        if book.cost_bytes <= budget_bytes
        for large in (book.slabs.emptiest_busy(), book.slabs.emptiest_idle())
        if large is not None and _fits(book, large)
    ]
    return min(victims, key=lambda victim: victim.cost_bytes, default=None)


def _fits(book: Book, large: int) -> bool:
    slabs = book.slabs
    return slabs.num_held(large) <= slabs.room_for_held(large) and slabs.num_live(
        large
    ) <= slabs.room_for_parked(large)


@dataclass(slots=True)
class Itinerary:
    """The moves of one step: copy orders in their order, and from where to where in all."""

    copies: list[CopyOrder] = field(default_factory=list)
    places: dict[str, dict[PageId, PageId]] = field(default_factory=dict)
    _origins: dict[tuple[str, PageId], PageId] = field(default_factory=dict)

    def move(self, victim: Victim, budget_bytes: int, now: int) -> int:
        """Move what the budget allows, held pages first; returns what it took."""
        book, large = victim.book, victim.large
        num_left = budget_bytes // book.cost_bytes
        held = book.held_in(large)[:num_left]
        cached = book.cached_in(large)[: num_left - len(held)]
        if held:
            self._note(book, held, book.slabs.move_held(large, held, now))
        if cached:
            self._note(book, cached, book.slabs.move_parked(large, cached))
        return (len(held) + len(cached)) * book.cost_bytes

    def _note(self, book: Book, sources: list[PageId], targets: list[PageId]) -> None:
        name = book.layout.name
        book.carry(sources, targets)
        places = self.places.setdefault(name, {})
        for source, target in zip(sources, targets, strict=True):
            self.copies.append(CopyOrder(layout=name, source=source, target=target))
            origin = self._origins.pop((name, source), source)  # it may have come here just now
            self._origins[name, target] = origin
            places[origin] = target
