"""LoRA adapters as numbers in pages: where each matrix stands, written from a mapped file when it is wanted.

Called by the composition root, benches and tests; pages are found and filled by `engine.adapters`. A product's matrices
stand side by side, cut between ranks where a page ends, so that they are read where they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ganglion.errors import CheckpointError
from ganglion.layout import DTYPE_BYTES, PageKind, PageLayout
from ganglion.models.decoder_spec import DecoderSpec
from ganglion.models.lora import LoraColumns, LoraPiece
from ganglion.models.lora_folder import DOWN, UP, LoraFolder, LoraPair

ALIGN_BYTES = 64  # of every matrix in a page: a cache line


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Ranks [first, first + num_ranks) of a pair; `up_at`: where its B stands in the page, in numbers."""

    pair: LoraPair
    first: int
    num_ranks: int
    up_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A piece in a page: A of all blocks, one below the other, at number `down_at`."""

    page: int
    down_at: int
    blocks: tuple[_Block, ...]


class LoraAdapter:
    """An adapter as numbers in pages of one layout: what to write into each, and how to read it there."""

    def __init__(self, folder: LoraFolder, layout: PageLayout, *, name: str) -> None:
        self.name, self.version, self.max_rank = name, folder.version, folder.max_rank
        self._folder = folder
        (num_numbers,) = layout.shape
        self._placed = _arrange(folder.pairs, num_numbers, DTYPE_BYTES[layout.dtype], folder.path)
        self.num_pages = self._placed[-1].page + 1

    def fill(self, pages: Mapping[int, Tensor]) -> None:
        """Write these of the adapter's pages, by number: each a tensor [number] of the layout.

        Raises CheckpointError where the file changed, cannot be read, or holds what is no number.
        """
        self._folder.check_unchanged()
        try:
            with safe_open(self._folder.path, framework="pt") as file:
                for placed in self._placed:
                    if placed.page in pages:
                        self._write(file, placed, pages[placed.page])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self._folder.path}: cannot be read: {error}") from error

    def pieces(self, pages: Sequence[Tensor]) -> dict[tuple[int, str], list[LoraPiece]]:
        """Views of its filled pages, all of them in order, as additions by layer and product."""
        found: dict[tuple[int, str], list[LoraPiece]] = {}
        for placed in self._placed:
            page, site = pages[placed.page], placed.blocks[0].pair.site
            columns: list[LoraColumns] = []
            first = 0
            for block in placed.blocks:
                site = block.pair.site
                up = page[block.up_at : block.up_at + block.num_ranks * site.num_outputs]
                columns.append(
                    LoraColumns(
                        first=first, start=site.start, up=up.view(block.num_ranks, site.num_outputs)
                    )
                )
                first += block.num_ranks
            down = page[placed.down_at : placed.down_at + first * site.num_inputs]
            piece = LoraPiece(down=down.view(first, site.num_inputs), columns=tuple(columns))
            found.setdefault((site.layer, site.product), []).append(piece)
        return found

    def _write(self, file: Any, placed: _Placed, page: Tensor) -> None:
        at = placed.down_at
        for block in placed.blocks:
            pair, ranks = block.pair, slice(block.first, block.first + block.num_ranks)
            down: Tensor = file.get_slice(pair.module + DOWN)[ranks]
            up: Tensor = file.get_slice(pair.module + UP)[:, ranks]
            into = page[at : at + down.numel()]
            into.view(down.shape).copy_(down)
            at += down.numel()
            up_into = page[block.up_at : block.up_at + up.numel()]
            up_into.view(block.num_ranks, -1).copy_((up.float() * pair.scale).t())
            for key, numbers in ((DOWN, into), (UP, up_into)):
                if not bool(torch.isfinite(numbers).all()):
                    raise CheckpointError(
                        f"{self._folder.path}: {pair.module}{key}: holds numbers that are not finite in "
                        f"{str(page.dtype).removeprefix('torch.')}",
                        next_step="train or export the adapter again",
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSet:
    """All adapters of one model by name, and the layout of their pages."""

    layout: PageLayout
    adapters: Mapping[str, LoraAdapter]


def read_adapters(
    folders: Mapping[str, Path],
    spec: DecoderSpec,
    *,
    model: str,
    dtype: str,
    max_page_bytes: int = 1 << 20,
) -> AdapterSet:
    """Adapters by name for the model called `model`, whose products are of `dtype`. At least one.

    A page is as large as can be, so that few matrices are cut, but no larger than the largest adapter needs. Raises
    CheckpointError for a folder that cannot be served.
    """
    read = {name: LoraFolder(folder, spec) for name, folder in folders.items()}
    item_bytes = DTYPE_BYTES[dtype]
    needs = [_num_numbers(folder.pairs, item_bytes) for folder in read.values()]
    layout = PageLayout(
        name=f"{model}.adapter",
        kind=PageKind.ADAPTER,
        shape=(min(max(needs), max_page_bytes // item_bytes),),
        dtype=dtype,
        slots=1,
    )
    return AdapterSet(
        layout=layout,
        adapters={name: LoraAdapter(folder, layout, name=name) for name, folder in read.items()},
    )


# --- places in pages ---------------------------------------------------------------------------------------------


def _num_numbers(pairs: Sequence[LoraPair], item_bytes: int) -> int:
    """Of one page that holds them all."""
    align = ALIGN_BYTES // item_bytes
    total = 0
    for _, of_product in groupby(pairs, key=_product):
        members = list(of_product)
        total += _up(sum(pair.rank * pair.site.num_inputs for pair in members), align)
        total += sum(_up(pair.rank * pair.site.num_outputs, align) for pair in members)
    return total


def _arrange(
    pairs: Sequence[LoraPair], num_numbers: int, item_bytes: int, path: Path
) -> tuple[_Placed, ...]:
    """One product after the other. What a page has no room for goes on in the next one, cut between ranks."""
    align = ALIGN_BYTES // item_bytes
    placed: list[_Placed] = []
    page = cursor = 0
    for _, of_product in groupby(pairs, key=_product):
        left = [(pair, 0) for pair in of_product]
        while left:
            num_inputs = left[0][0].site.num_inputs
            taken: list[tuple[LoraPair, int, int]] = []  # pair, first rank, ranks
            num_down = num_up = 0
            rest: list[tuple[LoraPair, int]] = []
            for pair, first in left:
                count = 0 if rest else pair.rank - first
                room = num_numbers - cursor - num_up
                while count:
                    down = _up(num_down + count * num_inputs, align)
                    if down + _up(count * pair.site.num_outputs, align) <= room:
                        break
                    count -= 1
                if count:
                    taken.append((pair, first, count))
                    num_down += count * num_inputs
                    num_up += _up(count * pair.site.num_outputs, align)
                if count < pair.rank - first:
                    rest.append((pair, first + count))
            if taken:
                up_at = cursor + _up(num_down, align)
                blocks: list[_Block] = []
                for pair, first, count in taken:
                    blocks.append(_Block(pair=pair, first=first, num_ranks=count, up_at=up_at))
                    up_at += _up(count * pair.site.num_outputs, align)
                placed.append(_Placed(page=page, down_at=cursor, blocks=tuple(blocks)))
                cursor = up_at
            elif not cursor:
                pair = left[0][0]
                raise CheckpointError(
                    f"{path}: {pair.module}: one rank of {pair.site.num_inputs} + {pair.site.num_outputs} "
                    f"numbers does not fit into a page of {num_numbers * item_bytes} bytes",
                    next_step="raise memory.large_page_bytes",
                )
            if rest:
                page, cursor = page + 1, 0
            left = rest
    return tuple(placed)


def _product(pair: LoraPair) -> tuple[int, str]:
    return pair.site.layer, pair.site.product


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
