"""Arena: the bytes of one tier, seen as typed pages. Called by the executor, on any of its lanes.

The only torch in memory. Does what it is told by page ids; knows nothing of references, keys or owners.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ganglion.layout import PoolLayout
from ganglion.memory.ledger import CopyOrder
from ganglion.types import PageId

ALIGN_BYTES = 64
Ids = Sequence[Sequence[PageId]]


class Arena:
    """One tensor of bytes, large page after large page, each seen as small pages of whatever layout it holds.

    Two threads may use it at once as long as none reads the pages that the other writes.
    """

    def __init__(
        self, pool_layout: PoolLayout, num_large_pages: int, device: torch.device | str = "cpu"
    ) -> None:
        # A stride of whole cache lines: every dtype is aligned, whatever the size of a large page.
        stride_bytes = -(-pool_layout.large_page_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.device = torch.device(device)
        self._bytes = torch.zeros(num_large_pages * stride_bytes, dtype=torch.uint8, device=device)
        self._pages: dict[str, Tensor] = {}  # [large, per_large, *shape]
        self._flat: dict[
            str, Tensor
        ] = {}  # [page, *shape], of layouts that fill a large page exactly
        for layout in pool_layout.layouts:
            dtype: torch.dtype = getattr(torch, layout.dtype)
            per_large = pool_layout.pages_per_large(layout.name)
            typed = self._bytes.view(dtype)
            page_shape = torch.Size(layout.shape)
            page_strides = [page_shape[at + 1 :].numel() for at in range(len(page_shape))]
            self._pages[layout.name] = pages = typed.as_strided(
                (num_large_pages, per_large, *page_shape),
                (stride_bytes // dtype.itemsize, page_shape.numel(), *page_strides),
            )
            if pages.is_contiguous():
                self._flat[layout.name] = pages.flatten(0, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tier."""
        return self._bytes.numel()

    def pages(self, layout_name: str) -> Tensor:
        """All pages as [large, per_large, *shape]: a view, so writing to it writes to the arena."""
        return self._pages[layout_name]

    def gather(self, layout_name: str, ids: Ids) -> Tensor:
        """Copies of the pages, [row, page, *shape]. Every row has the same number of pages; an id may occur often."""
        index = self._index(ids)
        flat = self._flat.get(layout_name)
        pages = self._pages[layout_name]
        if flat is not None:
            out = flat.index_select(0, index.flatten())
        else:
            out = pages[self._split(layout_name, index.flatten())]
        return out.view(*index.shape, *pages.shape[2:])

    def scatter(self, layout_name: str, ids: Ids, values: Tensor) -> None:
        """Overwrite the pages with `values` [row, page, *shape], of the layout's dtype. No id may occur twice."""
        index = self._index(ids)
        pages = self._pages[layout_name]
        shape = (*index.shape, *pages.shape[2:])
        if values.shape != shape or values.dtype != pages.dtype:
            raise ValueError(
                f"{layout_name}: expected {pages.dtype} {list(shape)}, "
                f"got {values.dtype} {list(values.shape)}"
            )
        values = values.reshape(-1, *pages.shape[2:])
        flat = self._flat.get(layout_name)
        if flat is not None:
            flat[index.flatten()] = values
        else:
            pages[self._split(layout_name, index.flatten())] = values

    def copy(self, orders: Iterable[CopyOrder]) -> None:
        """Obey copy orders as if one after the other; runs that do not touch each other's pages go in one batch."""
        for layout_name, of_layout in groupby(orders, key=lambda order: order.layout):
            sources: list[PageId] = []
            targets: dict[PageId, None] = {}  # in order
            for order in of_layout:
                if order.source in targets or order.target in targets:
                    self._copy(layout_name, sources, targets)
                    sources, targets = [], {}
                sources.append(order.source)
                targets[order.target] = None
            self._copy(layout_name, sources, targets)

    def _copy(self, layout_name: str, sources: Sequence[PageId], targets: Iterable[PageId]) -> None:
        self.scatter(layout_name, [list(targets)], self.gather(layout_name, [sources]))

    def _index(self, ids: Ids) -> Tensor:
        widths = {len(row) for row in ids}
        if len(widths) > 1:
            raise ValueError(f"rows of {sorted(widths)} pages: all must have the same number")
        index = torch.tensor([list(row) for row in ids], dtype=torch.int64).to(self.device)
        return index.view(len(ids), widths.pop() if widths else 0)

    def _split(self, layout_name: str, index: Tensor) -> tuple[Tensor, Tensor]:
        per_large = self._pages[layout_name].shape[1]
        return index // per_large, index % per_large
