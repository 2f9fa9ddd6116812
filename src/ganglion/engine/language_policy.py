"""Policies: which tokens of which rows one batch computes, and through which layers. Pure functions of ints.

Called by `engine.language` when it makes a batch. A row with one token left decodes, with more it prefills; rows come
in the order in which their requests came. What differs is how a prompt is cut:

| policy | cut | cost |
|---|---|---|
| whole | not at all | those who decode wait for the longest prompt |
| chunked | tokens (Sarathi, OSDI 2024) | weights, experts above all, are read again for every chunk |
| layered | layers (arXiv 2510.08055) | a prompt's hidden states are kept between batches |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

MIN_CHUNK_TOKENS = 16  # so that prompts come forward, however small the budget
MAX_LAYER_TOKENS = (
    8192  # that go through one group of layers together: bounds what is kept between batches
)
STRETCH = 4  # times as long as without a prompt may a batch take with one, where rows decode


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """Tokens per row; rows of `staged` go through one of `num_stages` groups of layers a batch, all others through all."""

    num_tokens: tuple[int, ...]  # 0: the row sits out
    staged: frozenset[int] = frozenset()  # places of rows
    num_stages: int = 1


class Policy(Protocol):
    """One of the functions below."""

    def __call__(
        self,
        num_left: Sequence[int],
        max_tokens: int,
        *,
        is_stage_busy: bool,
        max_layer_tokens: int = MAX_LAYER_TOKENS,
    ) -> BatchOrder:
        """Advance rows that have `num_left` tokens to compute each, with about `max_tokens` in one batch.

        `is_stage_busy`: rows are between two groups of layers already; no other may begin to be. `max_layer_tokens`: that
        one layer can take without holding robots up.
        """
        ...


def whole(
    num_left: Sequence[int],
    max_tokens: int,
    *,
    is_stage_busy: bool,
    max_layer_tokens: int = MAX_LAYER_TOKENS,
) -> BatchOrder:
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


def chunked(
    num_left: Sequence[int],
    max_tokens: int,
    *,
    is_stage_busy: bool,
    max_layer_tokens: int = MAX_LAYER_TOKENS,
) -> BatchOrder:
    """Decode first; prompts get what is left of the limit, the oldest first, and at least MIN_CHUNK_TOKENS in all."""
    num_spare = max(MIN_CHUNK_TOKENS, max_tokens - sum(left == 1 for left in num_left))
    counts: list[int] = []
    for left in num_left:
        count = 1 if left == 1 else min(left, num_spare)
        counts.append(count)
        num_spare -= 0 if left == 1 else count
    return BatchOrder(num_tokens=tuple(counts))


def layered(
    num_left: Sequence[int],
    max_tokens: int,
    *,
    is_stage_busy: bool,
    max_layer_tokens: int = MAX_LAYER_TOKENS,
) -> BatchOrder:
    """Decode through all layers; prompts that wait, whole, through one group of layers a batch.

    What is longer than `max_layer_tokens` is cut by tokens, too.
    """
    num_spare = 0 if is_stage_busy else max(MIN_CHUNK_TOKENS, max_layer_tokens)
    counts: list[int] = []
    staged: set[int] = set()
    for at, left in enumerate(num_left):
        count = 1 if left == 1 else min(left, num_spare)
        counts.append(count)
        if left > 1 and count:
            staged.add(at)
            num_spare -= count
    return BatchOrder(
        num_tokens=tuple(counts),
        staged=frozenset(staged),
        num_stages=num_stages(sum(counts[at] for at in staged)),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRoom:
    """Tokens of a batch with a prompt in it: through all layers, and through one group of them."""

    num_tokens: int
    num_layer_tokens: int


def batch_room(
    layer_us: Callable[[int], float], *, num_decoding: int, slice_us: float, most: int
) -> BatchRoom:
    """At least 1, at most `most` through all layers, by what a layer takes for how many tokens (`layer_us`).

    A forward stops between two layers where its slice ends, so no layer may take longer than a slice: that, and not the
    whole forward, is what robots wait for. Rows that decode wait for the whole forward: it may be STRETCH times as long
    as theirs alone. Smaller chunks would read all weights again for few tokens.
    """
    least_us = layer_us(max(1, num_decoding))
    of_layer = _most_tokens(layer_us, max(slice_us, least_us), MAX_LAYER_TOKENS)
    num_tokens = min(of_layer, most)
    if num_decoding:
        num_tokens = _most_tokens(layer_us, STRETCH * least_us, num_tokens)
    return BatchRoom(num_tokens=num_tokens, num_layer_tokens=of_layer)


def _most_tokens(layer_us: Callable[[int], float], most_us: float, most: int) -> int:
    """The most tokens that a layer takes within `most_us`; at least 1."""

    def fits(num_tokens: int) -> bool:
        return num_tokens <= most and layer_us(num_tokens) <= most_us

    num_tokens = 1
    while fits(2 * num_tokens):
        num_tokens *= 2
    extra = num_tokens // 2
    while extra:
        num_tokens += extra if fits(num_tokens + extra) else 0
        extra //= 2
    return num_tokens


POLICIES: dict[str, Policy] = {"whole": whole, "chunked": chunked, "layered": layered}
