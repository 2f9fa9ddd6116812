"""Attention over pages equals plain dense attention, whatever the pages' order, the rows' lengths, windows and cuts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganglion.engine.kv_rows import KvRow, TableOfRow
from ganglion.engine.kv_space import PagedKv, blank
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.arena import Arena
from ganglion.models.language import KvGroup
from ganglion.types import PageId


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    *,
    window: int | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Tokens [start, start + len(query)) ask all keys of their sequence, one head after the other."""
    out = torch.empty(*query.shape[:2], values.shape[-1])
    heads_per_kv = query.shape[1] // keys.shape[1]
    for token in range(len(query)):
        position = start + token
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(query.shape[1]):
            kv = head // heads_per_kv
            scores = keys[first : position + 1, kv].double() @ query[token, head].double() * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = scores.softmax(0)[: position + 1 - first]
            out[token, head] = (weights @ values[first : position + 1, kv].double()).float()
    return out


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, object]:
    num_kv = draw(st.integers(1, 3))
    dim = draw(st.sampled_from([1, 4, 6]))
    return {
        "num_kv": num_kv,
        "num_heads": num_kv * draw(st.integers(1, 3)),
        "dim": dim,
        "value_dim": draw(st.none() | st.integers(1, dim)),
        "slots": draw(st.sampled_from([1, 2, 4, 8])),
        "window": draw(st.none() | st.integers(1, 12)),
        "softcap": draw(st.none() | st.just(2.0)),
        "has_sinks": draw(st.booleans()),
        "num_odd_bytes": draw(st.sampled_from([0, 64, 200])),
        "rows": draw(
            st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=6)
        ),
        "seed": draw(st.integers(0, 99)),
    }


@given(case=spaces())
@settings(max_examples=40, deadline=None)
def test_equals_dense_attention(case) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(case["seed"])
    slots, dim, num_kv = case["slots"], case["dim"], case["num_kv"]
    value_dim = case["value_dim"]
    layout = PageLayout(
        name="kv",
        kind=PageKind.KV,
        shape=(2, 1 if value_dim else 2, slots, num_kv, dim),
        dtype="float32",
        slots=slots,
    )
    group = KvGroup(layout=layout, layers=(1, 4), window=case["window"], value_dim=value_dim)
    per_large = 3
    large_bytes = layout.page_bytes * per_large + case["num_odd_bytes"] % layout.page_bytes
    num_pages = sum(layout.num_pages(start + count) for start, count in case["rows"])
    num_larges = -(-num_pages // per_large)
    arena = Arena(PoolLayout(large_page_bytes=large_bytes, layouts=(layout,)), num_larges)
    arena.pages("kv").fill_(torch.nan)
    ids = torch.randperm(num_larges * per_large, generator=generator).tolist()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sinks = random(case["num_heads"]) if case["has_sinks"] else None
    how = {"scale": 0.7, "sinks": sinks, "softcap": case["softcap"]}
    rows, sequences = [], []
    for start, count in case["rows"]:
        pages = [PageId(ids.pop()) for _ in range(layout.num_pages(start + count))]
        blank(arena, "kv", pages)
        first = 0 if case["window"] is None else max(0, start - case["window"] + 1)
        num_dropped = first // slots
        table = TableOfRow(pages=pages[num_dropped:], num_dropped=num_dropped)
        whole = TableOfRow(pages=pages)
        keys = random(start + count, num_kv, dim)
        values = keys[..., :value_dim] if value_dim else random(start + count, num_kv, dim)
        sequences.append((start, keys, values))
        if start:  # what came before, for both layers, in one run
            before = PagedKv(arena, (group,), [KvRow(start=0, num_tokens=start, tables=(whole,))])
            for layer in (1, 4):
                shift = float(layer == 4)
                before.attend(
                    layer,
                    random(start, case["num_heads"], dim),
                    keys[:start] + shift,
                    None if value_dim else values[:start],
                    **how,
                )
        rows.append(KvRow(start=start, num_tokens=count, tables=(table,)))
    kv = PagedKv(arena, (group,), rows)
    new_keys = torch.cat([keys[start:] for start, keys, _ in sequences])
    new_values = torch.cat([values[start:] for start, _, values in sequences])
    query = random(len(new_keys), case["num_heads"], dim)
    for layer in (1, 4):
        shift = float(layer == 4)
        got = kv.attend(layer, query, new_keys + shift, None if value_dim else new_values, **how)
        at = 0
        for start, keys, values in sequences:
            num = len(keys) - start
            of_layer = keys + shift
            want = dense(
                query[at : at + num],
                of_layer,
                of_layer[..., :value_dim] if value_dim else values,
                start,
                window=case["window"],
                **how,
            )
            torch.testing.assert_close(got[at : at + num], want, rtol=1e-4, atol=1e-5)
            at += num


def test_lower_precision_pages_do_not_depend_on_the_cut() -> None:
    """Keys are rounded to the pages' dtype before they are asked, also those that never leave the batch."""
    layout = PageLayout(
        name="kv", kind=PageKind.KV, shape=(1, 2, 4, 1, 8), dtype="bfloat16", slots=4
    )
    group = KvGroup(layout=layout, layers=(0,))
    arena = Arena(PoolLayout(large_page_bytes=layout.page_bytes, layouts=(layout,)), 8)
    key, value = torch.randn(2, 12, 1, 8, generator=torch.Generator().manual_seed(0))
    query = key + 1
    outs = []
    for cuts, pages in (((0, 12), (0, 1, 2)), ((0, 5, 12), (3, 4, 5))):
        table = TableOfRow(pages=[PageId(page) for page in pages])
        parts = []
        for start, end in pairwise(cuts):
            row = KvRow(start=start, num_tokens=end - start, tables=(table,))
            kv = PagedKv(arena, (group,), [row])
            here = slice(start, end)
            parts.append(kv.attend(0, query[here], key[here], value[here], scale=0.3))
        outs.append(torch.cat(parts))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


def test_a_missing_value_needs_a_value_dim() -> None:
    layout = PageLayout(
        name="kv", kind=PageKind.KV, shape=(1, 2, 4, 1, 8), dtype="float32", slots=4
    )
    arena = Arena(PoolLayout(large_page_bytes=layout.page_bytes, layouts=(layout,)), 1)
    row = KvRow(start=0, num_tokens=1, tables=(TableOfRow(pages=[PageId(0)]),))
    kv = PagedKv(arena, (KvGroup(layout=layout, layers=(0,)),), [row])
    with pytest.raises(AssertionError, match="value_dim"):
        kv.attend(0, torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), None, scale=1.0)
