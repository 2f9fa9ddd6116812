"""LoRA (arXiv 2106.09685): low-rank additions to a decoder's products, another one for each row of a batch.

Arranged by `lora_load`, found in pages by `engine.adapters`, added by `decoder`. Base weights are read once for all rows;
each adapter's for its own rows only (S-LoRA, arXiv 2311.03285). Knows no page id and no request.

Dimension names: token, low and high (widths before and after a product), rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ganglion.models.language import KvSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraColumns:
    """Ranks [first, first + len(up)) of a piece make columns [start, start + high) of the product."""

    first: int
    start: int
    up: Float[Tensor, "rank high"]  # B transposed, with the adapter's scale in it


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPiece:
    """What one adapter adds to one product, as far as it stands in one page: x @ down.T, then each `up`."""

    down: Float[Tensor, "rank low"]
    columns: tuple[LoraColumns, ...]


Pieces = Mapping[tuple[int, str], Sequence[LoraPiece]]  # by layer and product


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRows:
    """Tokens of a batch that go through one adapter: a slice where they stand side by side."""

    pieces: Pieces
    rows: slice | Int[Tensor, " token"]


class LayerDeltas:
    """What the adapters of a batch add in one layer."""

    def __init__(self, layer: int, groups: Sequence[LoraRows]) -> None:
        self._layer, self._groups = layer, groups

    def touches(self, *products: str) -> bool:
        """Does any adapter add to one of these?"""
        return any(
            (self._layer, product) in group.pieces for group in self._groups for product in products
        )

    def add(
        self, product: str, x: Float[Tensor, "token low"], out: Float[Tensor, "token high"]
    ) -> None:
        """In place: `out` is the base's product of `x`, fresh."""
        key = (self._layer, product)
        for group in self._groups:
            pieces = group.pieces.get(key)
            if not pieces:
                continue
            if isinstance(group.rows, slice):
                _add(pieces, x[group.rows], out[group.rows])
            else:
                of_group = out[group.rows]
                _add(pieces, x[group.rows], of_group)
                out[group.rows] = of_group


def _add(
    pieces: Sequence[LoraPiece], x: Float[Tensor, "token low"], out: Float[Tensor, "token high"]
) -> None:
    for piece in pieces:
        narrow = functional.linear(x, piece.down)
        for part in piece.columns:
            num_ranks, num_columns = part.up.shape
            of_part = narrow[:, part.first : part.first + num_ranks]
            out[:, part.start : part.start + num_columns].addmm_(of_part, part.up)


class LoraBatch:
    """Which tokens of one batch go through which adapter; tokens in no group through none."""

    def __init__(self, groups: Sequence[LoraRows]) -> None:
        self._groups = tuple(groups)
        self._layers = frozenset(layer for group in groups for layer, _ in group.pieces)

    def of_layer(self, layer: int) -> LayerDeltas | None:
        """None where nothing is added."""
        return LayerDeltas(layer, self._groups) if layer in self._layers else None


@runtime_checkable
class AdaptableModel(Protocol):
    """A LanguageModel whose products adapters can be added to."""

    def run_adapted(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
        adapters: LoraBatch,
    ) -> Float[Tensor, "token width"]:
        """As `LanguageModel.run`, with these added."""
        ...


def rows_of(spans: Sequence[range]) -> slice | Int[Tensor, " token"]:
    """Tokens of these spans of a batch, in order."""
    if all(before.stop == after.start for before, after in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return torch.tensor([at for span in spans for at in span], dtype=torch.int64)
