"""Groups of pages for what a survey found. Called by `hf.load`. Knows layouts; no module and no tensor.

Layers with equal heads and windows share pages of keys and values. The states of recurrent layers, one after the other,
are cut into as many pages as they need: there is no state that is too large.
"""

from collections.abc import Mapping
from math import prod

from ganglion.layout import DTYPE_BYTES, PageKind, PageLayout
from ganglion.models.hf.survey import AttentionFacts, StateFacts
from ganglion.models.language import KvGroup, StateGroup, StateSpan

MAX_SLOTS = 16
MIN_SNAPSHOT_TOKENS, MAX_SNAPSHOT_TOKENS = 64, 1024


def kv_groups(
    facts: Mapping[int, AttentionFacts], *, name: str, dtype: str, max_page_bytes: int
) -> tuple[KvGroup, ...]:
    """Named "<name>.kv", "<name>.kv.1", ... Raises ValueError where not even one layer's token fits into a page."""
    alike: dict[AttentionFacts, list[int]] = {}
    for layer, fact in sorted(facts.items()):
        alike.setdefault(fact, []).append(layer)
    groups: list[KvGroup] = []
    for fact, layers in alike.items():
        slot_bytes = 2 * fact.num_kv_heads * fact.dim * DTYPE_BYTES[dtype]
        max_layers = max_page_bytes // slot_bytes
        if max_layers < 1:
            raise ValueError(
                f"keys and values of one token and one layer take {slot_bytes} bytes, a page at "
                f"most {max_page_bytes}"
            )
        num_parts = -(-len(layers) // max_layers)
        for part in range(num_parts):
            bounds = [at * len(layers) // num_parts for at in (part, part + 1)]
            chosen = tuple(layers[slice(*bounds)])
            slots = MAX_SLOTS
            while slots * len(chosen) * slot_bytes > max_page_bytes:
                slots //= 2
            layout = PageLayout(
                name=f"{name}.kv" if not groups else f"{name}.kv.{len(groups)}",
                kind=PageKind.KV,
                shape=(len(chosen), 2, slots, fact.num_kv_heads, fact.dim),
                dtype=dtype,
                slots=slots,
            )
            groups.append(KvGroup(layout=layout, layers=chosen, window=fact.window))
    return tuple(groups)


def state_groups(
    facts: Mapping[int, StateFacts],
    *,
    name: str,
    max_page_bytes: int,
    kv_token_bytes: int,
    snapshot_tokens: int | None = None,
) -> tuple[StateGroup, ...]:
    """Named "<name>.state", "<name>.state.1", ...

    `snapshot_tokens`: tokens from one snapshot to the next. By default so many that their keys and values take as much
    room as the snapshot does, a power of two.
    """
    spans: list[tuple[int, int]] = []  # layer, numbers
    for layer, fact in sorted(facts.items()):
        spans.append((layer, sum(part.num_numbers for part in fact.parts)))
    total = sum(num for _, num in spans)
    if not total:
        return ()
    if snapshot_tokens is None:
        even = total * DTYPE_BYTES["float32"] / max(1, kv_token_bytes)
        snapshot_tokens = MIN_SNAPSHOT_TOKENS
        while snapshot_tokens < min(even, MAX_SNAPSHOT_TOKENS):
            snapshot_tokens *= 2
    max_numbers = max_page_bytes // DTYPE_BYTES["float32"]
    num_pages = -(-total // max_numbers)
    page_numbers = -(-total // num_pages)
    pages: list[list[StateSpan]] = [[]]
    at = 0  # in the last page
    for layer, num in spans:
        start = 0
        while start < num:
            if at == page_numbers:
                pages.append([])
                at = 0
            stop = min(num, start + page_numbers - at)
            pages[-1].append(StateSpan(layer=layer, start=start, stop=stop, at=at))
            at += stop - start
            start = stop
    return tuple(
        StateGroup(
            layout=PageLayout(
                name=f"{name}.state" if not index else f"{name}.state.{index}",
                kind=PageKind.STATE,
                shape=(of_page[-1].at + of_page[-1].stop - of_page[-1].start,),
                dtype="float32",
                slots=snapshot_tokens,
            ),
            spans=tuple(of_page),
        )
        for index, of_page in enumerate(pages)
    )


def token_bytes(groups: tuple[KvGroup, ...]) -> int:
    """Of all keys and values of one token."""
    return sum(
        prod(group.layout.shape) // group.layout.slots * DTYPE_BYTES[group.layout.dtype]
        for group in groups
    )
