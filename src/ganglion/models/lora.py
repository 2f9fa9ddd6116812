"""LoRA (arXiv 2106.09685): low-rank additions to a decoder's products, another one for each row of a batch.

Arranged by `lora_load`, found in pages by `engine.adapters`, added by `decoder`. Base weights are read once for all rows;
each adapter's for its own rows only (S-LoRA, arXiv 2311.03285). Knows no page id and no request.

Dimension names: token, low and high (widths before and after a product), rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ganglion.models.language import KvSpace

MAX_TOKENS_TOGETHER = 64  # up to here every token may as well meet every adapter of its batch


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
    form: tuple[tuple[int, int, int, int], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # pieces of one form meet a batch in the same way, whatever their numbers
        form = [(part.first, part.start, *part.up.shape) for part in self.columns]
        object.__setattr__(self, "form", tuple(form))


Pieces = Mapping[tuple[int, str], Sequence[LoraPiece]]  # by layer and product


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRows:
    """Tokens of a batch that go through one adapter: a slice where they stand side by side."""

    pieces: Pieces
    rows: slice | Int[Tensor, " token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Columns from `start` on of several pieces in one product: which ranks go there, and for which tokens."""

    start: int
    places: tuple[tuple[int, int], ...]  # piece, its columns
    ranks: Int[Tensor, " rank"]  # of all pieces, one below the other
    is_own: Float[Tensor, "token rank"]  # 1 where the rank is of the token's adapter, else 0


class _Together:
    """Adapters of a small batch side by side: two products for all of them instead of two for each.

    A token meets the ranks of all adapters, and those of others are multiplied by 0: at these sizes that takes less time
    than to part the tokens.
    """

    def __init__(self, groups: Sequence[LoraRows], num_tokens: int) -> None:
        self._groups, self._num_tokens = groups, num_tokens
        self._known: dict[object, tuple[_Share, ...]] = {}  # by form: mostly one for all layers

    def add(
        self,
        key: tuple[int, str],
        x: Float[Tensor, "token low"],
        out: Float[Tensor, "token high"],
    ) -> None:
        pieces: list[LoraPiece] = []
        owners: list[int] = []
        for at, group in enumerate(self._groups):
            of_group = group.pieces.get(key, ())
            pieces += of_group
            owners += [at] * len(of_group)
        if not pieces:
            return
        form = (x.dtype, tuple(owners), tuple([piece.form for piece in pieces]))
        shares = self._known.get(form)
        if shares is None:
            shares = self._known[form] = self._shares(pieces, owners, x)
        narrow = functional.linear(x, torch.cat([piece.down for piece in pieces]))
        for share in shares:
            own = narrow.index_select(1, share.ranks).mul_(share.is_own)
            up = torch.cat([pieces[at].columns[part].up for at, part in share.places])
            out.narrow(1, share.start, up.shape[1]).addmm_(own, up)

    def _shares(
        self, pieces: Sequence[LoraPiece], owners: Sequence[int], x: Tensor
    ) -> tuple[_Share, ...]:
        places: dict[int, list[tuple[int, int]]] = {}
        ranks: dict[int, list[int]] = {}
        is_own: dict[int, list[Tensor]] = {}
        first = 0
        for at, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
            own = x.new_zeros(self._num_tokens)
            own[self._groups[owner].rows] = 1.0
            for part, columns in enumerate(piece.columns):
                start, num_ranks = columns.start, len(columns.up)
                places.setdefault(start, []).append((at, part))
                here = range(first + columns.first, first + columns.first + num_ranks)
                ranks.setdefault(start, []).extend(here)
                is_own.setdefault(start, []).extend([own] * num_ranks)
            first += len(piece.down)
        return tuple(
            _Share(
                start=start,
                places=tuple(places[start]),
                ranks=torch.tensor(ranks[start], dtype=torch.int64, device=x.device),
                is_own=torch.stack(is_own[start], dim=1),
            )
            for start in places
        )


class LayerDeltas:
    """What the adapters of a batch add in one layer."""

    def __init__(
        self, layer: int, groups: Sequence[LoraRows], together: _Together | None = None
    ) -> None:
        self._layer, self._groups, self._together = layer, groups, together

    def touches(self, *products: str) -> bool:
        """Does any adapter add to one of these?"""
        return any(
            (self._layer, product) in group.pieces for group in self._groups for product in products
        )

    def pieces(self, product: str) -> Iterator[tuple[slice | Int[Tensor, " token"], LoraPiece]]:
        """For a product that is never made as such: tokens, and what their adapter has for it."""
        for group in self._groups:
            for piece in group.pieces.get((self._layer, product), ()):
                yield group.rows, piece

    def add(
        self, product: str, x: Float[Tensor, "token low"], out: Float[Tensor, "token high"]
    ) -> None:
        """In place: `out` is the base's product of `x`, fresh."""
        key = (self._layer, product)
        if self._together is not None:
            self._together.add(key, x, out)
            return
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
            of_part = narrow.narrow(1, part.first, len(part.up))
            out.narrow(1, part.start, part.up.shape[1]).addmm_(of_part, part.up)


class LoraBatch:
    """Which tokens of one batch go through which adapter; tokens in no group through none."""

    def __init__(self, groups: Sequence[LoraRows], *, num_tokens: int) -> None:
        """`num_tokens`: of the batch."""
        self._groups = tuple(groups)
        self._layers = frozenset(layer for group in groups for layer, _ in group.pieces)
        is_small = len(groups) > 1 and num_tokens <= MAX_TOKENS_TOGETHER
        self._together = _Together(self._groups, num_tokens) if is_small else None

    def of_layer(self, layer: int) -> LayerDeltas | None:
        """None where nothing is added."""
        if layer not in self._layers:
            return None
        return LayerDeltas(layer, self._groups, self._together)


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
