"""States of recurrent layers of one batch, in pages of the arena. Part of `engine.kv_space`.

Reads the state before a row's tokens, writes the one after them, and on the way one for each page that is passed: a
snapshot. Knows page ids and positions; no layer's mathematics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ganglion.engine.kv_rows import KvRow, TableOfRow
from ganglion.models.language import RecurrentStep, StateGroup, StateSpan
from ganglion.types import PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """So many tokens of each of these rows, none of them beyond the page that it begins in."""

    rows: tuple[int, ...]  # of the batch
    num_tokens: int
    at: Tensor  # [row * token], in the batch
    starts: tuple[int, ...]  # of each row: how many tokens came before


class StateSpace:
    """The states of all rows. One `add` for each group, then `recur` for each layer that has one."""

    def __init__(self, rows: Sequence[KvRow]) -> None:
        self._rows = rows
        self._pieces: dict[int, list[_Piece]] = {}  # by slots
        self._layers: dict[int, list[tuple[_Pages, StateSpan]]] = {}

    def add(self, group: StateGroup, tables: Sequence[TableOfRow], pages: Tensor) -> None:
        """`pages`: [large, page of large, number], all of the group's layout."""
        slots = group.layout.slots
        if slots not in self._pieces:
            self._pieces[slots] = _cut(self._rows, slots, pages.device)
        plan = _Pages(self._pieces[slots], slots, tables, pages)
        for span in group.spans:
            self._layers.setdefault(span.layer, []).append((plan, span))

    def recur(self, layer: int, inputs: Tensor, step: RecurrentStep) -> Tensor:
        """See `KvSpace.recur`."""
        parts = self._layers[layer]
        out: Tensor | None = None
        for index, piece in enumerate(parts[0][0].pieces):
            before = [plan.read(index, span) for plan, span in parts]
            state = before[0] if len(before) == 1 else torch.cat(before, dim=-1)
            given = inputs[piece.at].view(len(piece.rows), piece.num_tokens, -1)
            made, state = step(given, state)
            for plan, span in parts:
                plan.write(index, span, state[:, span.start : span.stop])
            if out is None:
                out = made.new_empty((len(inputs), made.shape[-1]))
            out[piece.at] = made.flatten(0, 1)
        return inputs if out is None else out


class _Pages:
    """One group's pages: which of them each piece reads and writes."""

    def __init__(
        self,
        pieces: Sequence[_Piece],
        slots: int,
        tables: Sequence[TableOfRow],
        pages: Tensor,
    ) -> None:
        self.pieces, self._pages = pieces, pages
        per_large, device = pages.shape[1], pages.device

        def places(ids: Sequence[PageId]) -> tuple[Tensor, Tensor]:
            of_ids = torch.tensor(ids, dtype=torch.int64, device=device)
            return of_ids // per_large, of_ids % per_large

        self._read: list[tuple[Tensor, Tensor]] = []
        self._written: list[tuple[Tensor, Tensor]] = []
        self._fresh: list[list[int]] = []  # rows of each piece that have no state yet
        for piece in pieces:
            before, after = [], []
            for row, start in zip(piece.rows, piece.starts, strict=True):
                table, end = tables[row], start + piece.num_tokens
                after.append(table.pages[(end - 1) // slots - table.num_dropped])
                before.append(table.pages[max(0, start - 1) // slots - table.num_dropped])
            self._read.append(places(before))
            self._written.append(places(after))
            self._fresh.append([at for at, start in enumerate(piece.starts) if not start])

    def read(self, index: int, span: StateSpan) -> Tensor:
        """[row, number] before a piece; a copy."""
        state = self._of(span)[self._read[index]]
        if self._fresh[index]:
            state[self._fresh[index]] = 0.0
        return state

    def write(self, index: int, span: StateSpan, state: Tensor) -> None:
        """[row, number] after a piece."""
        self._of(span)[self._written[index]] = state.to(self._pages.dtype)

    def _of(self, span: StateSpan) -> Tensor:
        return self._pages[:, :, span.at : span.at + span.stop - span.start]


def _cut(rows: Sequence[KvRow], slots: int, device: torch.device) -> list[_Piece]:
    """All tokens, so that each row's pieces come in order: lone tokens together, longer runs row by row, page by page."""
    singles: list[tuple[int, int, int]] = []  # row, its place in the batch, its start
    pieces: list[_Piece] = []
    first = 0
    for at, row in enumerate(rows):
        if row.num_tokens == 1:
            singles.append((at, first, row.start))
        else:
            start, end = row.start, row.start + row.num_tokens
            while start < end:
                stop = min(end, (start // slots + 1) * slots)
                here = first + start - row.start
                places = torch.arange(here, here + stop - start, device=device)
                pieces.append(
                    _Piece(rows=(at,), num_tokens=stop - start, at=places, starts=(start,))
                )
                start = stop
        first += row.num_tokens
    if singles:
        at_rows, places_of, starts = zip(*singles, strict=True)
        places = torch.tensor(places_of, dtype=torch.int64, device=device)
        pieces.append(_Piece(rows=at_rows, num_tokens=1, at=places, starts=starts))
    return pieces
