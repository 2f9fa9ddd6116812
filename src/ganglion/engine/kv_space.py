"""Keys, values and states of one batch, in pages of the arena. Made by `engine.language_forward`, asked by models.

Writes what is new, gathers what is asked. States: `engine.state_space`. Knows page ids, positions and tensors; neither requests nor who owns a page.
Dimension names as in `models.language`; row: one sequence of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ganglion.engine.kv_rows import KvRow, TableOfRow
from ganglion.engine.state_space import StateSpace
from ganglion.memory.arena import Arena
from ganglion.models.language import KvGroup, RecurrentStep, StateGroup
from ganglion.types import PageId

MAX_PAD_RATIO = 1.5  # rows that ask together have at most so many times the pages of the shortest
MAX_READ_BYTES = 2 << 20  # that they read in one layer: what a core's cache holds until it is asked
MAX_PLAIN_TOKENS = 256  # of one call where scores are written out

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Single:
    """A row of one token: its place in the batch, its position, the pages that it asks and the first one's number."""

    at: int
    position: int
    pages: Sequence[PageId]
    first_page: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Singles:
    """Rows of one token each that ask together."""

    at: Tensor  # [row], in the batch
    pages: Tensor  # [row * page]
    mask: Tensor  # [row, 1, 1, key], added to the scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One row of several tokens. `mask` None: none came before, so that the new keys are all that there is."""

    here: slice  # in the batch
    pages: Tensor
    num_keys: int
    mask: Tensor | None  # [token, key]


class _GroupPlan:
    """Where one group's tokens are written and what they ask: the same for all its layers."""

    def __init__(
        self, group: KvGroup, rows: Sequence[KvRow], tables: Sequence[TableOfRow], pages: Tensor
    ) -> None:
        self.value_dim, self.dtype = group.value_dim, pages.dtype
        self._window, self._slots = group.window, group.layout.slots
        self._per_large, self._pages = pages.shape[1], pages
        is_even = pages.shape[1] == 1 or pages.stride(0) == pages.stride(1) * pages.shape[1]
        self._flat = pages.flatten(0, 1) if is_even else None
        ids: list[Array] = []
        slots: list[Array] = []
        singles: list[_Single] = []
        self.runs: list[_Run] = []
        first = 0
        for row, table in zip(rows, tables, strict=True):
            positions = np.arange(row.start, row.start + row.num_tokens)
            first_page = row.start // self._slots
            written = np.array(table.pages[first_page - table.num_dropped :], dtype=np.int64)
            ids.append(written[positions // self._slots - first_page])
            slots.append(positions % self._slots)
            span = row.span(self._window, self._slots)
            asked = table.pages[span.start - table.num_dropped : span.stop - table.num_dropped]
            if row.num_tokens == 1:
                singles.append(
                    _Single(at=first, position=row.start, pages=asked, first_page=span.start)
                )
            else:
                self.runs.append(self._run(first, row, asked, span.start))
            first += row.num_tokens
        self._large, self._within = self._split(self._tensor(np.concatenate(ids)))
        self._slot = self._tensor(np.concatenate(slots))
        layer_bytes = pages[0, 0, 0].numel() * pages.itemsize
        max_pages = MAX_READ_BYTES // layer_bytes
        self.singles = [self._together(bucket) for bucket in _buckets(singles, max_pages)]
        read = [singles.pages for singles in self.singles]
        read += [run.pages for run in self.runs if run.mask is not None]
        self._max_read = max((len(pages) for pages in read), default=0)
        self._scratch: dict[int, Tensor] = {}

    def write(self, layer_at: int, key: Tensor, value: Tensor | None) -> None:
        """Put every token where it belongs."""
        of_layer = self._pages[:, :, layer_at]
        place = (self._large, self._within, self._slot)
        of_layer[:, :, 0][place] = key.to(self.dtype)
        if value is not None:
            of_layer[:, :, 1][place] = value.to(self.dtype)

    def read(self, layer_at: int, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values [row, key, kv, dim] of these pages, until the next call."""
        keys = self._gather(layer_at, 0, ids, num_rows)
        if self.value_dim is not None:
            return keys, keys[..., : self.value_dim]
        return keys, self._gather(layer_at, 1, ids, num_rows)

    def _gather(self, layer_at: int, half: int, ids: Tensor, num_rows: int) -> Tensor:
        if self._flat is None:
            large, within = self._split(ids)
            out = self._pages[:, :, layer_at, half][large, within]
        else:
            # one buffer for all layers: fresh ones of this size come from the system, page fault by page fault
            of_half = self._flat[:, layer_at, half]
            scratch = self._scratch.get(half)
            if scratch is None:
                scratch = of_half.new_empty((self._max_read, *of_half.shape[1:]))
                self._scratch[half] = scratch
            out = scratch[: len(ids)]
            torch.index_select(of_half, 0, ids, out=out)
        return out.view(num_rows, -1, *out.shape[2:])

    def _split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids // self._per_large, ids % self._per_large

    def _together(self, bucket: Sequence[_Single]) -> _Singles:
        num_pages = max(len(single.pages) for single in bucket)
        ids = np.empty((len(bucket), num_pages), dtype=np.int64)
        for line, single in zip(ids, bucket, strict=True):
            line[: len(single.pages)] = single.pages
            line[len(single.pages) :] = single.pages[0]  # any that holds numbers: the mask hides it
        asks = np.array([single.position for single in bucket])[:, None]
        keys = np.array([single.first_page * self._slots for single in bucket])[:, None]
        mask = self._mask(asks, keys + np.arange(num_pages * self._slots))
        return _Singles(
            at=self._tensor(np.array([single.at for single in bucket])),
            pages=self._tensor(ids.reshape(-1)),
            mask=mask[:, None, None],
        )

    def _run(self, first: int, row: KvRow, pages: Sequence[PageId], first_page: int) -> _Run:
        end, key_start = row.start + row.num_tokens, first_page * self._slots
        mask = None
        if row.start or (self._window is not None and self._window < row.num_tokens):
            mask = self._mask(np.arange(row.start, end)[:, None], np.arange(key_start, end)[None])
        return _Run(
            here=slice(first, first + row.num_tokens),
            pages=self._tensor(np.array(pages, dtype=np.int64)),
            num_keys=end - key_start,
            mask=mask,
        )

    def _mask(self, asks: Array, keys: Array) -> Tensor:
        """0 where a token at position `asks` sees a key at position `keys`, else -inf."""
        is_hidden = keys > asks
        if self._window is not None:
            is_hidden |= keys <= asks - self._window
        mask = torch.zeros(is_hidden.shape, dtype=self.dtype, device=self._pages.device)
        return mask.masked_fill_(self._tensor(is_hidden), -torch.inf)

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._pages.device)


class PagedKv:
    """A `KvSpace` over the arena's pages.

    Their slots must hold numbers from the start (`blank`): what the mask hides is still multiplied by zero.
    """

    def __init__(
        self, arena: Arena, groups: Sequence[KvGroup | StateGroup], rows: Sequence[KvRow]
    ) -> None:
        self._plans: dict[int, tuple[_GroupPlan, int]] = {}  # layer -> its group's, its place there
        self._states = StateSpace(rows)
        for at, group in enumerate(groups):
            tables = [row.tables[at] for row in rows]
            pages = arena.pages(group.layout.name)
            if isinstance(group, StateGroup):
                self._states.add(group, tables, pages)
                continue
            plan = _GroupPlan(group, rows, tables, pages)
            self._plans.update(
                {layer: (plan, layer_at) for layer_at, layer in enumerate(group.layers)}
            )

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        *,
        scale: float,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `KvSpace.attend`. `softcap`: scores become softcap * tanh(score / softcap)."""
        plan, layer_at = self._plans[layer]
        is_latent = plan.value_dim is not None
        assert (value is None) == is_latent, f"layer {layer}: value_dim is {plan.value_dim}"
        plan.write(layer_at, key, value)
        new_value = key[..., : plan.value_dim] if value is None else value
        num_tokens, num_heads = query.shape[:2]
        num_kv, dtype = key.shape[1], query.dtype
        out = query.new_empty((num_tokens, num_heads, new_value.shape[-1]))
        grouped = query.view(
            num_tokens, num_kv, -1, query.shape[-1]
        )  # [token, kv, head of kv, dim]
        of_heads = None if sinks is None else sinks.view(num_kv, -1)
        for singles in plan.singles:
            read = plan.read(layer_at, singles.pages, len(singles.at))
            keys, values = (part.to(dtype).transpose(1, 2) for part in read)
            # the heads that ask one key head ask like tokens: nothing is expanded
            part = _attend(
                grouped[singles.at],
                keys,
                values,
                singles.mask.to(dtype),
                scale=scale,
                sinks=of_heads,
                softcap=softcap,
            )
            out[singles.at] = part.flatten(1, 2)
        for run in plan.runs:
            if (
                run.mask is None
            ):  # rounded as the pages are, so that cutting a prompt changes nothing
                pair = (key[run.here].to(plan.dtype), new_value[run.here].to(plan.dtype))
            else:
                read = plan.read(layer_at, run.pages, 1)
                pair = (read[0][0, : run.num_keys], read[1][0, : run.num_keys])
            # every head's numbers side by side, which pays from some hundred tokens on: [kv, head of kv, token, dim]
            asked = grouped[run.here].permute(1, 2, 0, 3).contiguous()
            shape = (*asked.shape[:2], -1, -1)
            by_head = (part.to(dtype).transpose(0, 1).contiguous() for part in pair)
            keys, values = (part[:, None].expand(shape) for part in by_head)
            part = _attend(
                asked,
                keys,
                values,
                None if run.mask is None else run.mask.to(dtype),
                scale=scale,
                sinks=None if of_heads is None else of_heads[:, :, None],
                softcap=softcap,
            )
            out[run.here] = part.permute(2, 0, 1, 3).flatten(1, 2)
        return out

    def recur(self, layer: int, inputs: Tensor, step: RecurrentStep) -> Tensor:
        """See `KvSpace.recur`."""
        return self._states.recur(layer, inputs, step)


def blank(arena: Arena, layout_name: str, pages: Sequence[PageId]) -> None:
    """Zeros into fresh pages: the bytes there may be of another layout, and no numbers in this one."""
    of_layout = arena.pages(layout_name)
    per_large = of_layout.shape[1]
    for page in pages:
        of_layout[page // per_large, page % per_large].zero_()


def _buckets(singles: Sequence[_Single], max_pages: int) -> list[list[_Single]]:
    """Rows whose numbers of pages are alike, so that little is gathered in vain; few enough to stay in the cache."""
    buckets: list[list[_Single]] = []
    for single in sorted(singles, key=lambda single: len(single.pages)):
        num_pages = len(single.pages)
        last = buckets[-1] if buckets else []
        is_alike = last and num_pages <= MAX_PAD_RATIO * len(last[0].pages) + 1
        if is_alike and num_pages * (len(last) + 1) <= max_pages:
            last.append(single)
        else:
            buckets.append([single])
    return buckets


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """[a, b, token, dim] asks [a, b, key, dim]. `mask` None: token i asks keys 0..i. `sinks` fits [a, b, token]."""
    if sinks is None and softcap is None and values.shape[-1] == keys.shape[-1]:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    num_tokens, num_keys = query.shape[2], keys.shape[2]
    if mask is None:
        mask = query.new_full((num_tokens, num_keys), -torch.inf).triu(1)
    out = query.new_empty((*query.shape[:3], values.shape[-1]))
    for first in range(0, num_tokens, MAX_PLAIN_TOKENS):
        here = slice(first, first + MAX_PLAIN_TOKENS)
        scores = (query[:, :, here].float() * scale) @ keys.float().transpose(-1, -2)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores += mask[..., here, :] if mask.shape[-2] > 1 else mask
        highest = scores.amax(-1, keepdim=True)
        if sinks is not None:
            of_sinks = sinks.float().expand(query.shape[:3])[:, :, here, None]
            highest = torch.maximum(highest, of_sinks)
        weights = (scores - highest).exp_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (of_sinks - highest).exp()
        out[:, :, here] = ((weights / total) @ values.float()).to(query.dtype)
    return out
