"""One forward of a batch of rows, cut between layers where its caller wants. Made and driven by `engine.language`.

Obeys with tensors: hidden states, positions, pages by id. Chooses nothing. `lead` parts go through all layers; parts of a
`Stage` only through one group of layers a forward, and their hidden states wait in it for the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ganglion.engine.adapters import Adapters
from ganglion.engine.kv_rows import KvRow, TableOfRow
from ganglion.engine.kv_space import PagedKv
from ganglion.engine.language_work import LanguageRow, Part
from ganglion.memory.arena import Arena
from ganglion.models.language import KvSpace, LanguageModel
from ganglion.models.lora import AdaptableModel, LoraBatch


class Strand:
    """Parts that go through the same layers together, and their hidden states [token, width]."""

    def __init__(self, model: LanguageModel, parts: Sequence[Part], device: torch.device) -> None:
        self.parts = list(parts)
        ids = [token for part in parts for token in part.token_ids]
        positions = [at for part in parts for at in part.positions]
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self.hidden = model.embed(torch.tensor(ids, dtype=torch.int64, device=device))

    @property
    def num_tokens(self) -> int:
        """Of all parts."""
        return len(self.positions)

    def drop(self, row: LanguageRow) -> None:
        """Go on without this row."""
        at = 0
        for part in self.parts:
            if part.row is row:
                end = at + part.num_tokens
                self.positions = torch.cat([self.positions[:at], self.positions[end:]])
                self.hidden = torch.cat([self.hidden[:at], self.hidden[end:]])
            else:
                at += part.num_tokens
        self.parts = [part for part in self.parts if part.row is not row]


@dataclass(slots=True, kw_only=True)
class Stage:
    """Rows on their way through groups of layers, one group a forward."""

    strand: Strand
    groups: tuple[range, ...]
    next_group: int = 0

    @property
    def is_done(self) -> bool:
        """Did they go through all layers?"""
        return self.next_group == len(self.groups)


class Forward:
    """One batch on its way through the layers; [0, next_layer) are done."""

    def __init__(
        self,
        model: LanguageModel,
        arena: Arena,
        lead: Strand | None,
        stage: Stage | None,
        *,
        adapters: Adapters | None = None,
        is_deterministic: bool,
    ) -> None:
        self._model, self._arena, self._is_deterministic = model, arena, is_deterministic
        self._adapters = adapters
        self.lead, self.stage = lead, stage
        self._num_layers = model.spec.num_layers
        self._staged = range(0) if stage is None else stage.groups[stage.next_group]
        self.next_layer = 0 if lead is not None else self._staged.start
        self._last = self._num_layers if lead is not None else self._staged.stop
        # of the slice before
        self._found: tuple[list[Part], PagedKv, LoraBatch | None] | None = None

    @property
    def is_done(self) -> bool:
        """Is the last of its layers computed?"""
        return self.next_layer == self._last

    @property
    def parts(self) -> list[Part]:
        """Of all rows that go through the next layer."""
        return [part for strand in self._strands(self.next_layer) for part in strand.parts]

    @property
    def num_layers_left(self) -> int:
        """Layers still to be run."""
        return self._last - self.next_layer

    @property
    def num_tokens(self) -> int:
        """That go through the next layer."""
        return sum(strand.num_tokens for strand in self._strands(self.next_layer))

    @property
    def next_cut(self) -> int:
        """The first layer from the next one on where other tokens go through, or the end."""
        bounds = (self._staged.start, self._staged.stop, self._last)
        return min(bound for bound in bounds if bound > self.next_layer)

    def run(self, num_layers: int) -> None:
        """Through so many layers, none of them beyond `next_cut`."""
        layers = range(self.next_layer, self.next_layer + num_layers)
        assert layers.stop <= self.next_cut, (layers, self.next_cut)
        strands = self._strands(self.next_layer)
        parts = [part for strand in strands for part in strand.parts]
        hidden = torch.cat([strand.hidden for strand in strands])
        positions = torch.cat([strand.positions for strand in strands])
        if self._is_deterministic:
            hidden = self._run_singly(hidden, positions, parts, layers)
        elif parts:
            kv, adapters = self._find(parts)
            hidden = self._through(hidden, positions, kv, layers, adapters)
        sizes = [strand.num_tokens for strand in strands]
        for strand, of_strand in zip(strands, torch.split(hidden, sizes), strict=True):
            strand.hidden = of_strand
        self.next_layer = layers.stop

    def forget_pages(self) -> None:
        """Pages moved: the rows' tables say where they are now."""
        self._found = None

    def _find(self, parts: list[Part]) -> tuple[PagedKv, LoraBatch | None]:
        if self._found is None or self._found[0] != parts:
            kv = PagedKv(self._arena, self._model.groups, [_kv_row(part) for part in parts])
            self._found = (parts, kv, self._batch_of(parts))
        return self._found[1], self._found[2]

    def _batch_of(self, parts: Sequence[Part]) -> LoraBatch | None:
        return None if self._adapters is None else self._adapters.batch(parts)

    def _through(
        self,
        hidden: Tensor,
        positions: Tensor,
        kv: KvSpace,
        layers: range,
        adapters: LoraBatch | None,
    ) -> Tensor:
        if adapters is None:
            return self._model.run(hidden, positions, kv, layers)
        assert isinstance(self._model, AdaptableModel), f"{self._model.spec.name} takes no adapters"
        return self._model.run_adapted(hidden, positions, kv, layers, adapters)

    def _run_singly(
        self, hidden: Tensor, positions: Tensor, parts: Sequence[Part], layers: range
    ) -> Tensor:
        """Token by token: what comes out cannot depend on what else is in the batch."""
        out, at = [], 0
        for part in parts:
            for start in part.positions:
                single = Part(row=part.row, start=start, num_tokens=1)
                kv = PagedKv(self._arena, self._model.groups, [_kv_row(single)])
                here = slice(at, at + 1)
                adapters = self._batch_of([single])
                out.append(self._through(hidden[here], positions[here], kv, layers, adapters))
                at += 1
        return torch.cat(out) if out else hidden

    def _strands(self, layer: int) -> list[Strand]:
        strands = [] if self.lead is None else [self.lead]
        if self.stage is not None and layer in self._staged:
            strands.append(self.stage.strand)
        return strands

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [token, vocab] of hidden states that went through all layers."""
        if not self._is_deterministic:
            return self._model.logits(hidden)
        return torch.cat([self._model.logits(line[None]) for line in hidden])


def _kv_row(part: Part) -> KvRow:
    return KvRow(
        start=part.start,
        num_tokens=part.num_tokens,
        tables=tuple(
            TableOfRow(pages=table.pages, num_dropped=table.num_dropped)
            for table in part.row.tables
        ),
    )
