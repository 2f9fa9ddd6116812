"""Carry: obeys a session's orders about carried pages with tensors. Called by the executor; chooses nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ganglion.memory.arena import Arena
from ganglion.memory.carried import EncodeOrder, Kept
from ganglion.memory.codec.codec import Codec


def encode_carried(arena: Arena, codec: Codec, orders: Iterable[EncodeOrder]) -> None:
    """Encode every source into its target, before anything else reads or writes pages."""
    for order in orders:
        pages = arena.gather(order.source_layout, [[order.source]])
        arena.scatter(order.target_layout, [[order.target]], codec.encode(pages))


def gather_carried(
    arena: Arena, codec: Codec, layout: str, rows: Sequence[Sequence[Kept]], *, depth: int
) -> Tensor:
    """Carried pages [row, depth, *page shape of `layout`], oldest first, encoded ones decoded.

    A row with fewer has pages of zeros in front.
    """
    like = arena.pages(layout)
    out = torch.zeros(len(rows), depth, *like.shape[2:], dtype=like.dtype)
    by_layout: dict[str, list[tuple[int, int, Kept]]] = {}
    for at, row in enumerate(rows):
        for place, kept in enumerate(row, start=depth - len(row)):
            by_layout.setdefault(kept.layout, []).append((at, place, kept))
    for name, places in by_layout.items():
        pages = arena.gather(name, [[kept.page for _, _, kept in places]])[0]
        whole = pages if name == layout else codec.decode(pages, like.dtype)
        out[[at for at, _, _ in places], [place for _, place, _ in places]] = whole
    return out
