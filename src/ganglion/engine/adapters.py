"""The adapters of one model: who uses which, where its pages are, what of them is read in yet. Called by the engine.

Pages are reserved when the first request that wants an adapter is admitted, written piece by piece between forwards, held
while a request uses them, and cached after it: then they go like all pages, the least valuable first.

Invariants: [0, num_filled) of an adapter's pages hold its numbers and can be found under keys; one reference to each page,
however many requests use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ganglion.engine.language_work import LanguageRow, LanguageWork, Part
from ganglion.errors import FieldError, GanglionError, OutOfPagesError
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.memory.prefix import PageKey, page_keys
from ganglion.models.lora import LoraBatch, LoraRows, Pieces, rows_of
from ganglion.models.lora_load import AdapterSet, LoraAdapter
from ganglion.types import PageId, RequestId


@dataclass(slots=True, kw_only=True)
class _Resident:
    """An adapter that somebody uses."""

    adapter: LoraAdapter
    keys: tuple[PageKey, ...]
    pages: tuple[PageId, ...]
    num_filled: int
    users: set[RequestId] = field(default_factory=set)
    pieces: Pieces | None = None  # views of `pages`

    @property
    def is_ready(self) -> bool:
        return self.num_filled == len(self.pages)


class Adapters:
    """Of one model; `found` None: it has none. The pool must have the layout of `found`."""

    def __init__(self, found: AdapterSet | None, ledger: Ledger, arena: Arena) -> None:
        self._found, self._ledger, self._arena = found, ledger, arena
        self._residents: dict[str, _Resident] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that a request may name."""
        return () if self._found is None else tuple(self._found.adapters)

    @property
    def num_users(self) -> dict[str, int]:
        """Requests that hold each adapter's pages now."""
        return {name: len(resident.users) for name, resident in self._residents.items()}

    def check(self, name: str) -> None:
        """Raise FieldError for an adapter that is not there; "" is none at all."""
        if name and name not in self.names:
            expected = f"one of {', '.join(self.names)}" if self.names else "none: there is none"
            raise FieldError("adapter", expected=expected, got=repr(name)[:200])

    def num_larges(self, name: str) -> int:
        """Large pages that the adapter takes of an empty pool."""
        if not name:
            return 0
        pages = self._arena.pages(self._set.layout.name)
        return -(-self._set.adapters[name].num_pages // pages.shape[1])

    # --- coming and going ----------------------------------------------------------------------------------------

    def has_room(self, name: str, *, num_other_larges: int) -> bool:
        """Is it there, or could it be, beside so many large pages of others? A guess, as `LanguagePages.has_room`."""
        if not name or name in self._residents:
            return True
        layout = self._set.layout.name
        num_pages = self._ledger.num_free(layout) + self._ledger.num_evictable(layout)
        num_others = num_other_larges * self._arena.pages(layout).shape[1]
        return self._set.adapters[name].num_pages + num_others <= num_pages

    def take(self, work: LanguageWork) -> None:
        """Hold its request's adapter until `release`. Raises OutOfPagesError, and has then reserved nothing."""
        name = work.request.adapter
        if not name:
            return
        resident = self._residents.get(name)
        if resident is None:
            resident = self._reserve(name)
            self._residents[name] = resident
        resident.users.add(work.request_id)

    def release(self, work: LanguageWork) -> None:
        """The request holds no page any more. What nobody uses is cached as far as it was read in."""
        resident = self._residents.get(work.request.adapter)
        if resident is None:
            return
        resident.users.discard(work.request_id)
        if not resident.users:
            self._ledger.release(self._set.layout.name, resident.pages)
            del self._residents[work.request.adapter]

    def is_ready(self, row: LanguageRow) -> bool:
        """Can the row be computed?"""
        name = row.work.request.adapter
        return not name or self._residents[name].is_ready

    def fill(self, max_bytes: int) -> dict[str, GanglionError]:
        """Read in what is missing, at least one page if any is; returns adapters that cannot be read, and why."""
        errors: dict[str, GanglionError] = {}
        for name, resident in self._residents.items():
            if resident.is_ready:
                continue
            layout = self._set.layout
            start, num_left = resident.num_filled, len(resident.pages) - resident.num_filled
            stop = start + min(num_left, max(1, max_bytes // layout.page_bytes))
            try:
                resident.adapter.fill(
                    {at: self._page(resident.pages[at]) for at in range(start, stop)}
                )
            except GanglionError as error:
                errors[name] = error
                continue
            self._ledger.commit(layout.name, resident.pages[start:stop], resident.keys[start:stop])
            resident.num_filled = stop
            max_bytes -= (stop - start) * layout.page_bytes
            if max_bytes <= 0:
                break
        return errors

    def relocate(self, moves: Moves) -> None:
        """The ledger moved pages: adapters follow."""
        for resident in self._residents.values():
            layout = self._set.layout.name
            if moves.concern(layout, resident.pages):
                resident.pages = moves.now_at(layout, resident.pages)
                resident.pieces = None

    # --- using ---------------------------------------------------------------------------------------------------

    def batch(self, parts: Sequence[Part]) -> LoraBatch | None:
        """What these parts, one after the other, go through; None: no adapter at all."""
        spans: dict[str, list[range]] = {}
        start = 0
        for part in parts:
            name = part.row.work.request.adapter
            if name:
                spans.setdefault(name, []).append(range(start, start + part.num_tokens))
            start += part.num_tokens
        if not spans:
            return None
        return LoraBatch(
            [
                LoraRows(pieces=self._pieces(self._residents[name]), rows=rows_of(of_one))
                for name, of_one in spans.items()
            ],
            num_tokens=start,
        )

    @property
    def _set(self) -> AdapterSet:
        assert self._found is not None, "asked for an adapter of a model that has none"
        return self._found

    def _reserve(self, name: str) -> _Resident:
        adapter, layout = self._set.adapters[name], self._set.layout.name
        keys = page_keys(f"{layout}\0{name}\0{adapter.version}", b"", adapter.num_pages)
        owner = f"adapter {name}"
        known = self._ledger.match(layout, keys, owner=owner)
        try:
            fresh = self._ledger.reserve(layout, len(keys) - len(known), owner=owner)
        except OutOfPagesError:
            self._ledger.release(layout, known)
            raise
        return _Resident(adapter=adapter, keys=keys, pages=(*known, *fresh), num_filled=len(known))

    def _pieces(self, resident: _Resident) -> Pieces:
        assert resident.is_ready, f"{resident.adapter.name}: {resident.num_filled} pages are there"
        if resident.pieces is None:
            resident.pieces = resident.adapter.pieces([self._page(page) for page in resident.pages])
        return resident.pieces

    def _page(self, page: PageId) -> Tensor:
        """Its numbers, [number]."""
        of_layout = self._arena.pages(self._set.layout.name)
        per_large = of_layout.shape[1]
        return of_layout[page // per_large, page % per_large]
