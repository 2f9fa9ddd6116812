"""Bench pool measures what the results page promises, and its baseline is an allocator that works."""

import math

import pytest

from ganglion.bench.baselines.plain_pool import PlainPool
from ganglion.bench.pool import OPERATIONS, run
from ganglion.bench.report import CLAIMS
from ganglion.errors import OutOfPagesError
from ganglion.memory.prefix import chain


def test_every_promised_figure_is_measured() -> None:
    result = run(quick=True, seed=1)
    for claim in CLAIMS:
        if claim.bench == "pool":
            assert {claim.metric, claim.baseline} <= result.metrics.keys()
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert all(value > 0 for name, value in result.metrics.items() if name.endswith("_ns"))
    assert result.metrics["refused_share"] < result.metrics["baseline_refused_share"], (
        "one pool serves a changing mixture better than fixed shares do"
    )
    assert len(result.detail["percentiles_ns"]) == 4, "two sides, two placements"
    for by_size in result.detail["percentiles_ns"].values():
        for figures in by_size.values():
            assert figures.keys() == OPERATIONS.keys()


def test_the_baseline_shares_evicts_and_refuses() -> None:
    pool = PlainPool(4)
    keys = chain("t", "m", [b"a", b"b", b"c"])
    pages = pool.reserve(3)
    pool.commit(pages, keys)
    assert pool.match(keys) == pages
    pool.release(pages)
    pool.retain(pages[:1])
    pool.release(pages)
    assert pool.match(keys[:1]) == pages[:1], "held by the fork"
    with pytest.raises(OutOfPagesError):
        pool.reserve(4)
    assert set(pool.reserve(2)) == {3, pages[2]}, "the free one, then the end of the cached prefix"
    assert pool.match(keys) == pages[:2]
