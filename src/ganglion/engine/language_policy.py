"""Policies: which tokens of which rows one batch computes, and through which layers. Pure functions of ints.

Called by `engine.language` when it makes a batch. A row with one token left decodes, with more it prefills; rows come
in the order in which their requests came. What differs is how a prompt is cut:

| policy | cut | cost |
|---|---|---|
| whole | not at all | those who decode wait for the longest prompt |
| chunked | tokens (Sarathi, OSDI 2024) | weights, experts above all, are read again for every chunk |
| layered | layers (arXiv 2510.08055) | a prompt's hidden states are kept between batches |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

MIN_CHUNK_TOKENS = 16  # so that prompts come forward, however small the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """Tokens per row; rows of `staged` go through one of `num_stages` groups of layers a batch, all others through all."""

    num_tokens: tuple[int, ...]  # 0: the row sits out
    staged: frozenset[int] = frozenset()  # places of rows
    num_stages: int = 1


class Policy(Protocol):
    """One of the functions below."""

    def __call__(
        self, num_left: Sequence[int], max_tokens: int, *, is_stage_busy: bool
    ) -> BatchOrder:
        """Advance rows that have `num_left` tokens to compute each, with about `max_tokens` in one batch.

        `is_stage_busy`: rows are between two groups of layers already; no other may begin to be.
        """
        ...


def whole(num_left: Sequence[int], max_tokens: int, *, is_stage_busy: bool) -> BatchOrder:
    """Every row up to its newest token, prompts in one piece. The limit only keeps a second prompt for later."""
    counts: list[int] = []
    num_prefilled = 0
    num_decoding = sum(left == 1 for left in num_left)
    for left in num_left:
        is_in = left == 1 or not num_prefilled or num_decoding + num_prefilled + left <= max_tokens
        counts.append(left if is_in else 0)
        if is_in and left > 1:
            num_prefilled += left
    return BatchOrder(num_tokens=tuple(counts))


def chunked(num_left: Sequence[int], max_tokens: int, *, is_stage_busy: bool) -> BatchOrder:
    """Decode first; prompts get what is left of the limit, the oldest first, and at least MIN_CHUNK_TOKENS in all."""
    num_spare = max(MIN_CHUNK_TOKENS, max_tokens - sum(left == 1 for left in num_left))
    counts: list[int] = []
    for left in num_left:
        count = 1 if left == 1 else min(left, num_spare)
        counts.append(count)
        num_spare -= 0 if left == 1 else count
    return BatchOrder(num_tokens=tuple(counts))


def layered(num_left: Sequence[int], max_tokens: int, *, is_stage_busy: bool) -> BatchOrder:
    """Decode through all layers; all prompts that wait, whole, through one group of layers a batch."""
    is_prefill = [left > 1 and not is_stage_busy for left in num_left]
    counts = [
        left if left == 1 or is_in else 0 for left, is_in in zip(num_left, is_prefill, strict=True)
    ]
    staged = frozenset(at for at, is_in in enumerate(is_prefill) if is_in)
    return BatchOrder(
        num_tokens=tuple(counts),
        staged=staged,
        num_stages=num_stages(sum(num_left[at] for at in staged)),
    )


def num_stages(num_tokens: int) -> int:
    """Groups of layers for prompts of so many tokens together, as in layered prefill's own code: 512 tokens each."""
    for most, count in ((512, 1), (1024, 2), (2048, 4), (4096, 8)):
        if num_tokens <= most:
            return count
    return 16


def stage_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """All layers in order, in at most `num_stages` groups as even as can be."""
    count = min(num_stages, num_layers)
    bounds = [num_layers * at // count for at in range(count + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


POLICIES: dict[str, Policy] = {"whole": whole, "chunked": chunked, "layered": layered}
