"""Pictures of one model's rows: features found in pages or made there, and put where a prompt has room for them.

Part of a LanguageHost whose model sees; called by `engine.language` and `language_batch`. Encoding is work of the step like
a prompt: cut per tile of a picture and within layers. Knows neither requests' order nor time.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ganglion.engine.language_forward import Strand
from ganglion.engine.language_pages import OWNER
from ganglion.engine.language_work import LanguageRow
from ganglion.generation import PromptImage
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.memory.prefix import PageKey, page_keys
from ganglion.models.vision import ImageEncoder, TileState
from ganglion.types import PageId


@dataclass(slots=True, kw_only=True, eq=False)
class ImageTable:
    """The features of one picture of one row, one reference a page; valid once `is_ready`."""

    image: PromptImage
    keys: tuple[PageKey, ...]
    pages: list[PageId] = field(default_factory=list)
    is_ready: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Encoding:
    """One picture on its way through the tower: tiles [0, tile) are done, and units [0, next_unit) of the next one."""

    row: LanguageRow
    table: ImageTable
    tile: int = 0
    next_unit: int = 0
    state: TileState | None = None

    @property
    def is_done(self) -> bool:
        """Are all tiles encoded?"""
        return self.tile == len(self.table.image.places)


class LanguageImages:
    """Pictures are found by their content, within a tenant: the same one in two requests is encoded once.

    Features are held from a row's admission until its prompt is computed past them; then they stay as long as they are
    worth their bytes.
    """

    def __init__(self, model: str, encoder: ImageEncoder, ledger: Ledger, arena: Arena) -> None:
        self._model, self._encoder, self._ledger, self._arena = model, encoder, ledger, arena
        self._layout = encoder.layout
        self._tables: dict[LanguageRow, list[ImageTable]] = {}
        self.encoding: Encoding | None = None
        self.num_encoded = self.num_found = 0  # pictures, for whoever counts
        self.is_turn_taken = False  # the last step encoded: whoever decodes is next

    # --- rows ----------------------------------------------------------------------------------------------------

    def open(self, row: LanguageRow) -> None:
        """It was admitted: which of its pictures does it need, and which of those are known?"""
        tables = []
        for image in row.work.request.images:
            if image.end <= row.num_computed:
                continue
            num_tokens = sum(len(place) for place in image.places)
            keys = page_keys(
                f"{len(row.work.request.tenant)}:{row.work.request.tenant}/{self._layout.name}",
                image.key,
                self._layout.num_pages(num_tokens),
            )
            table = ImageTable(image=image, keys=keys)
            self._match(table)
            tables.append(table)
        if tables:
            self._tables[row] = tables

    def is_ready(self, row: LanguageRow) -> bool:
        """Are all its pictures encoded?"""
        return all(table.is_ready for table in self._tables.get(row, ()))

    def settle(self, row: LanguageRow) -> None:
        """Its cursor moved: what it has read is not its own any more."""
        tables = self._tables.get(row, [])
        for table in [table for table in tables if table.image.end <= row.num_computed]:
            self._ledger.release(self._layout.name, table.pages)
            tables.remove(table)
        if not tables:
            self._tables.pop(row, None)

    def release(self, row: LanguageRow) -> None:
        """All its references; half a picture is lost."""
        if self.encoding is not None and self.encoding.row is row:
            self.encoding = None
        for table in self._tables.pop(row, ()):
            self._ledger.release(self._layout.name, table.pages)

    def relocate(self, row: LanguageRow, moves: Moves) -> None:
        """The ledger moved pages: the row's tables follow."""
        for table in self._tables.get(row, ()):
            if moves.concern(self._layout.name, table.pages):
                table.pages = list(moves.now_at(self._layout.name, table.pages))

    # --- encoding ------------------------------------------------------------------------------------------------

    def begin(self, row: LanguageRow) -> Encoding | None:
        """The next picture of this row, its pages reserved; None: it needs none.

        Raises OutOfPagesError, and has then changed nothing.
        """
        for table in self._tables.get(row, ()):
            if table.is_ready or self._match(table):  # somebody may have made it since
                continue
            pages = self._ledger.reserve(
                self._layout.name, len(table.keys), owner=f"request {row.work.request_id}"
            )
            table.pages = list(pages)
            self.encoding = Encoding(row=row, table=table)
            return self.encoding
        return None

    def advance(self, encoding: Encoding, num_units: int) -> int:
        """Through so many units of the tower at most, to the end of a tile at most; returns how many."""
        image, encoder = encoding.table.image, self._encoder
        if encoding.state is None:
            tile = torch.from_numpy(image.pixels[encoding.tile : encoding.tile + 1].copy())
            encoding.state = encoder.begin(tile.to(self._arena.device))
        units = range(encoding.next_unit, min(encoding.next_unit + num_units, encoder.num_units))
        encoder.run(encoding.state, units)
        encoding.next_unit = units.stop
        if units.stop < encoder.num_units:
            return len(units)
        first = sum(len(place) for place in image.places[: encoding.tile])
        rows = range(first, first + len(image.places[encoding.tile]))
        features = encoder.features(encoding.state)
        assert len(features) == len(rows), (len(features), rows)
        self._arena.pages(self._layout.name)[self._places(encoding.table, rows)] = features
        encoding.tile, encoding.next_unit, encoding.state = encoding.tile + 1, 0, None
        if encoding.is_done:
            self._ledger.commit(self._layout.name, encoding.table.pages, encoding.table.keys)
            encoding.table.is_ready = True
            self.num_encoded += 1
            self.encoding = None
        return len(units)

    def fill(self, strand: Strand) -> None:
        """Features instead of what stands for pictures in the hidden states of parts that start out."""
        at = 0
        for part in strand.parts:
            for table in self._tables.get(part.row, ()):
                assert table.is_ready, (
                    f"a part of {part.row.work.request_id} came before its picture"
                )
                self._fill(strand.hidden, at, part.positions, table)
            at += part.num_tokens

    def _fill(self, hidden: Tensor, at: int, positions: range, table: ImageTable) -> None:
        first = 0
        for place in table.image.places:
            low, high = max(place.start, positions.start), min(place.stop, positions.stop)
            if low < high:
                rows = range(first + low - place.start, first + high - place.start)
                into = slice(at + low - positions.start, at + high - positions.start)
                found = self._arena.pages(self._layout.name)[self._places(table, rows)]
                hidden[into] = found.to(hidden.dtype)
            first += len(place)

    def _match(self, table: ImageTable) -> bool:
        """All pages of a picture or none."""
        found = self._ledger.match(self._layout.name, table.keys, owner=OWNER)
        if len(found) < len(table.keys):
            self._ledger.release(self._layout.name, found)
            return False
        table.pages, table.is_ready = list(found), True
        self.num_found += 1
        return True

    def _places(self, table: ImageTable, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Where these features of a picture stand in the arena."""
        per_large = self._arena.pages(self._layout.name).shape[1]
        slots = self._layout.slots
        places = [(table.pages[row // slots], row % slots) for row in rows]
        ids, slot = torch.tensor(places, dtype=torch.int64, device=self._arena.device).unbind(1)
        return ids // per_large, ids % per_large, slot
