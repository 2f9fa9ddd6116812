"""Arena: the bytes of one tier, seen as typed pages. Called by the executor, on any of its lanes.

The only torch in memory. Does what it is told by page ids; knows nothing of references, keys or owners.
"""

import mmap
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import gcd, prod

import numpy as np
import torch
from torch import Tensor

from ganglion.layout import PoolLayout
from ganglion.memory.orders import CopyOrder
from ganglion.types import PageId

ALIGN_BYTES = 64
# To move bytes, not to compute: torch moves float64 as fast as memcpy, int64 only half as fast.
WORDS = (torch.float64, torch.int32, torch.int16, torch.uint8)
Ids = Sequence[Sequence[PageId]]


class Arena:
    """One tensor of bytes, large page after large page, each seen as small pages of whatever layout it holds.

    On the CPU it is made of address space: a large page takes memory once it is written to, until `release`. Two
    threads may use it at once as long as none reads the pages that the other writes.
    """

    def __init__(
        self, pool_layout: PoolLayout, num_large_pages: int, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        # A stride of whole cache lines: every dtype is aligned, whatever the size of a large page.
        stride_bytes = -(-pool_layout.large_page_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self._stride_bytes = stride_bytes
        num_bytes = num_large_pages * stride_bytes
        self._map = None
        if self.device.type == "cpu" and num_bytes:
            self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            flat = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            flat = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        self._bytes = flat.view(num_large_pages, stride_bytes)
        self._pages: dict[str, Tensor] = {}  # [large, per_large, *shape]
        self._runs: dict[str, Tensor] = {}  # [run, word]: a page is one or more whole runs
        for layout in pool_layout.layouts:
            name, page_bytes = layout.name, layout.page_bytes
            per_large = pool_layout.pages_per_large(name)
            pages = self._bytes[:, : per_large * page_bytes].view(
                num_large_pages, per_large, page_bytes
            )
            dtype: torch.dtype = getattr(torch, layout.dtype)
            self._pages[name] = pages.view(dtype).view(*pages.shape[:2], *layout.shape)
            run_bytes = gcd(page_bytes, stride_bytes)
            # The largest words that fit: as bfloat16 numbers, the same bytes take three times as long.
            word = next(word for word in WORDS if run_bytes % word.itemsize == 0)
            num_runs = self._bytes.numel() // run_bytes
            self._runs[name] = self._bytes.view(word).view(num_runs, run_bytes // word.itemsize)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tier, in use or not."""
        return self._bytes.numel()

    def pages(self, layout_name: str) -> Tensor:
        """All pages as [large, per_large, *shape]: a view, so writing to it writes to the arena."""
        return self._pages[layout_name]

    def gather(self, layout_name: str, ids: Ids) -> Tensor:
        """Copies of the pages, [row, page, *shape]. Every row has the same number of pages; an id may occur often."""
        index = self._index(ids)
        pages = self._pages[layout_name]
        runs = self._runs[layout_name].index_select(0, self._places(layout_name, index))
        return runs.view(-1).view(pages.dtype).view(*index.shape, *pages.shape[2:])

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
        runs = self._runs[layout_name]
        values = values.contiguous()
        if values.storage_offset() * values.itemsize % runs.itemsize:
            values = values.clone()  # a word cannot begin there
        values = values.view(-1).view(runs.dtype).view(-1, runs.shape[1])
        runs[self._places(layout_name, index)] = values

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

    def release(self, large_pages: Iterable[int]) -> int:
        """Give these large pages' memory back to the system; returns its bytes. Their contents are undefined after it.

        Only whole pages of the system's own: a large page's ends may stay. They are taken again by being written to.
        Memory of another device stays as it is: 0.
        """
        if self._map is None:
            return 0
        num_bytes = 0
        for large in large_pages:
            start = -(-large * self._stride_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (large + 1) * self._stride_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
                num_bytes += end - start
        return num_bytes

    def _copy(self, layout_name: str, sources: Sequence[PageId], targets: Iterable[PageId]) -> None:
        self.scatter(layout_name, [list(targets)], self.gather(layout_name, [sources]))

    def _index(self, ids: Ids) -> Tensor:
        widths = {len(row) for row in ids}
        if len(widths) > 1:
            raise ValueError(f"rows of {sorted(widths)} pages: all must have the same number")
        # numpy reads nested tuples several times as fast as torch
        index = np.array(ids, dtype=np.int64).reshape(len(ids), widths.pop() if widths else 0)
        return torch.from_numpy(index).to(self.device)

    def _places(self, layout_name: str, index: Tensor) -> Tensor:
        """Where the pages' runs lie, in order: one run a page where pages fill a large page exactly."""
        pages, runs = self._pages[layout_name], self._runs[layout_name]
        run_bytes = runs.shape[1] * runs.itemsize
        page_bytes, per_large = prod(pages.shape[2:]) * pages.itemsize, pages.shape[1]
        if page_bytes * per_large == self._stride_bytes:
            return index.flatten()
        starts = index // per_large * self._stride_bytes + index % per_large * page_bytes
        within = torch.arange(page_bytes // run_bytes, device=self.device)
        return (starts[..., None] // run_bytes + within).flatten()
