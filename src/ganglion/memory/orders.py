"""Orders: what the ledger decided, as ints for those who own the bytes and for those who remember page ids. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ganglion.types import PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOrder:
    """Copy one page's bytes. Orders are obeyed in their order, before anything else writes."""

    layout: str
    source: PageId
    target: PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class Writable:
    """A table whose page at the asked index may be written, once `copy` is done."""

    pages: tuple[PageId, ...]
    copy: CopyOrder | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Pages that changed their place between two steps, and large pages that left the budget.

    The ledger and all its holders are at the new places already; the bytes follow with `copies`. `places`: layout ->
    old id -> new id. `released`: large pages whose bytes nobody needs until the budget is raised again.
    """

    copies: tuple[CopyOrder, ...]
    places: Mapping[str, Mapping[PageId, PageId]]
    released: tuple[int, ...]
    _sources: Mapping[str, frozenset[PageId]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # three times as fast to look into as the keys of `places`, and every table of every session looks
        sources = {layout: frozenset(places) for layout, places in self.places.items()}
        object.__setattr__(self, "_sources", sources)

    def concern(self, layout: str, pages: Sequence[PageId]) -> bool:
        """Did one of these pages move?"""
        sources = self._sources.get(layout)
        return sources is not None and not sources.isdisjoint(pages)

    def now_at(self, layout: str, pages: Sequence[PageId]) -> tuple[PageId, ...]:
        """Where the pages of a table are now."""
        places = self.places.get(layout, {})
        return tuple([places.get(page, page) for page in pages])


class Holder(Protocol):
    """Whoever remembers page ids from one step to the next: a versioned table, the requests in flight."""

    def relocate(self, moves: Moves) -> None:
        """Replace the old ids; called before the bytes are copied, and never while a step runs."""
        ...
