import re
import threading

import numpy as np
import pytest

from ganglion.errors import DeadlineMissedError, SupersededError
from ganglion.metrics import COUNTERS, GAUGES, HISTOGRAMS, OTHER, Metrics, metrics_page
from ganglion.types import (
    ActionChunk,
    PieceRecord,
    PoolStats,
    ServiceStats,
    SessionId,
    SpanKind,
    StepRecord,
    Timing,
)


def test_every_row_of_the_table_is_an_attribute_and_is_rendered() -> None:
    metrics = Metrics()
    text = metrics.render().decode()
    for attribute, spec in {**COUNTERS, **GAUGES, **HISTOGRAMS}.items():
        assert hasattr(metrics, attribute)
        assert f"# HELP {spec.name.removesuffix('_total')}" in text
        assert f"`{spec.name}`" in metrics_page()


def test_names_carry_a_unit_or_count_things() -> None:
    assert all(spec.name.endswith("_total") for spec in COUNTERS.values())
    for spec in HISTOGRAMS.values():
        assert re.search(r"_(seconds|rows|tokens|ratio|bytes)$", spec.name)
        assert list(spec.buckets) == sorted(spec.buckets)


def test_values_land_under_their_labels() -> None:
    metrics = Metrics()
    metrics.errors.inc(code="superseded")
    metrics.errors.inc(2, code="superseded")
    metrics.pool_pages.set(7, layout="kv", state="used")
    metrics.connections.inc(channel="robot")
    metrics.connections.inc(-1, channel="robot")
    metrics.infer_seconds.observe(0.012)
    text = metrics.render().decode()
    assert 'ganglion_errors_total{code="superseded"} 3.0' in text
    assert 'ganglion_pool_pages{layout="kv",state="used"} 7.0' in text
    assert 'ganglion_connections{channel="robot"} 0.0' in text
    assert 'ganglion_infer_seconds_bucket{le="0.02"} 1.0' in text
    assert 'ganglion_infer_seconds_bucket{le="0.01"} 0.0' in text


def test_a_peer_cannot_grow_the_number_of_series() -> None:
    metrics = Metrics()
    for index in range(1000):
        metrics.ignored_keys.inc(key=f"key {index} " + "x" * 200)
    text = metrics.render().decode()
    series = [line for line in text.splitlines() if line.startswith("ganglion_ignored_keys_total{")]
    limit = COUNTERS["ignored_keys"].max_series
    assert len(series) == limit + 1
    assert f'ganglion_ignored_keys_total{{key="{OTHER}"}} {1000.0 - limit}' in text
    assert max(len(line) for line in series) < 128


@pytest.mark.parametrize("labels", [{}, {"colour": "red"}, {"code": "internal", "colour": "red"}])
def test_wrong_labels_are_a_defect_that_names_them(labels: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"ganglion_errors_total takes the labels \('code',\)"):
        Metrics().errors.inc(**labels)


def test_two_registries_do_not_share_numbers_and_threads_lose_none() -> None:
    ours, other = Metrics(), Metrics()

    def count() -> None:
        for index in range(500):
            ours.errors.inc(code=f"code{index % 100}")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = ours.render().decode().splitlines()
    values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("ganglion_errors_total{")]
    assert sum(float(value) for value in values) == 2000
    assert "ganglion_errors_total{" not in other.render().decode()


def chunk(*, is_deadline_met: bool) -> ActionChunk:
    return ActionChunk(
        session_id=SessionId("a"),
        obs_seq=1,
        context_seq=1,
        obs_time_ns=None,
        actions=np.zeros((2, 4), np.float32),
        prompt="",
        is_prompt_overridden=False,
        model_version="v",
        context_version=1,
        batch_size=1,
        is_deadline_met=is_deadline_met,
        timing=Timing(queue_ms=1, perceive_ms=5, generate_ms=5, wait_ms=1, infer_ms=12),
    )


def test_outcomes_are_counted_once_each() -> None:
    metrics = Metrics()
    metrics.observe_outcome(chunk(is_deadline_met=True))
    metrics.observe_outcome(chunk(is_deadline_met=False))
    metrics.observe_outcome(SupersededError(seq=1, newest_seq=2))
    metrics.observe_outcome(DeadlineMissedError(late_ms=1, deadline_ms=2))
    text = metrics.render().decode()
    assert "ganglion_results_total 2.0" in text
    assert "ganglion_deadline_misses_total 2.0" in text
    assert 'ganglion_errors_total{code="superseded"} 1.0' in text
    assert 'ganglion_errors_total{code="deadline_missed"} 1.0' in text
    assert "ganglion_infer_seconds_sum 0.024" in text


def test_steps_and_the_pool_are_counted() -> None:
    metrics = Metrics()
    piece = PieceRecord(
        model="m", stage="denoise", kind=SpanKind.DENOISE, lane=0, num_rows=3, num_units=5,
        start_s=0.0, run_us=4000.0, rows=(),
    )  # fmt: skip
    metrics.observe_step(
        StepRecord(step=1, start_s=0, run_us=5000, budget_us=20000, num_waiting=2, pieces=(piece,))
    )
    for num_hits in (10, 14):
        pool = PoolStats(
            large_page_bytes=1024, num_large_pages=4, num_free_large_pages=1, pages_per_large={"kv": 2},
            num_used_pages={"kv": 3}, num_cached_pages={"kv": 1}, num_hits=num_hits, num_misses=2,
            live_pages=(),
        )  # fmt: skip
        metrics.observe_stats(
            ServiceStats(
                now_s=0, is_ready=True, stage="serving", sessions=(), pool=pool, steps=(),
                num_requests=0, num_results=0, num_errors=0, num_cancelled=0,
            )
        )  # fmt: skip
    text = metrics.render().decode()
    assert 'ganglion_batch_rows_sum{kind="denoise"} 3.0' in text
    assert 'ganglion_piece_seconds_sum{kind="denoise"} 0.004' in text
    assert "ganglion_waiting_requests 2.0" in text
    assert "ganglion_page_hits_total 14.0" in text
    assert "ganglion_page_misses_total 2.0" in text
    assert 'ganglion_pool_pages{layout="kv",state="cached"} 1.0' in text
    assert "ganglion_pool_free_bytes 1024.0" in text
    assert "ganglion_ready 1.0" in text
