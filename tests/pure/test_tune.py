"""Tuner: degree buys rate with age; it takes what is worth it and stays within its bounds."""

import pytest

from ganglion.config import PipelineConfig
from ganglion.pipeline.tune import Tuner
from ganglion.plan.cost import MeasuredCost
from ganglion.spec import Stage
from ganglion.types import SpanKind


def stage(name: str, kind: SpanKind, num_units: int = 1, *, is_divisible: bool = False) -> Stage:
    return Stage(
        name=name,
        kind=kind,
        num_units=num_units,
        reads=(),
        layout="kv",
        num_pages=1,
        num_slots=1,
        is_shared=False,
        is_divisible=is_divisible,
    )


STAGES = (
    stage("view", SpanKind.ENCODE),
    stage("denoise", SpanKind.DENOISE, 6, is_divisible=True),
)


def tuner(
    step_us: dict[int, float], *, view_us: float = 1_000, num_lanes: int = 1, **config: object
) -> Tuner:
    cost = MeasuredCost(smoothing=0.0)
    for rows in (1, 2, 4, 8):
        cost.observe("m", "view", num_rows=rows, num_units=1, run_us=view_us * rows)
        cost.observe("m", "denoise", num_rows=rows, num_units=1, run_us=step_us[rows])
    pipeline = PipelineConfig(**config)  # type: ignore[arg-type]
    return Tuner(pipeline, cost, model="m", stages=STAGES, num_lanes=num_lanes)


FREE = {1: 10_000, 2: 10_000, 4: 10_000, 8: 10_000}  # a batch costs what one row costs
LINEAR = {1: 10_000, 2: 20_000, 4: 40_000, 8: 80_000}


def test_batches_that_cost_nothing_are_filled() -> None:
    pace = tuner(FREE).pace(1)
    assert (pace.degree, pace.steps_between) == (6, 1)
    assert pace.forecasts[5].rate_hz == pytest.approx(1e6 / 11_000, rel=1e-3)
    assert pace.forecasts[0].rate_hz == pytest.approx(1e6 / 61_000, rel=1e-3)
    assert "degree 6" in pace.reason


def test_batches_that_gain_nothing_are_not() -> None:
    pace = tuner(LINEAR).pace(1)
    assert pace.degree == 1
    assert pace.steps_between == 6


def test_the_bound_of_age_limits_the_degree() -> None:
    some_gain = {1: 10_000, 2: 14_000, 4: 22_000, 8: 40_000}
    free = tuner(some_gain, max_age_ms=1_000.0).pace(1)
    bound = tuner(some_gain, max_age_ms=80.0).pace(1)
    assert free.degree > bound.degree
    assert bound.forecasts[bound.degree - 1].latency_ms <= 80.0


def test_more_robots_fill_the_batch_by_themselves() -> None:
    saturating = {1: 10_000, 2: 10_500, 4: 12_000, 8: 24_000}
    assert tuner(saturating).pace(1).degree > tuner(saturating).pace(8).degree


def test_a_fixed_degree_is_obeyed() -> None:
    pace = tuner(LINEAR, degree=3).pace(1)
    assert (pace.degree, pace.steps_between) == (3, 2)


def test_a_warm_start_leaves_fewer_steps_to_spread() -> None:
    pace = tuner(FREE, degree=6, warm_start=0.5).pace(1)
    assert (pace.degree, pace.steps_between) == (3, 1)


def test_an_indivisible_policy_has_one_chunk_under_way() -> None:
    act = stage("act", SpanKind.DENOISE)
    tuned = Tuner(PipelineConfig(degree=4), MeasuredCost(), model="m", stages=(act,), num_lanes=1)
    assert tuned.pace(1).degree == 1


def test_with_a_lane_more_one_chunk_is_perceived_while_the_others_are_generated() -> None:
    """Only there is a degree beyond the flow steps worth anything: it launches when perception is complete."""
    beside = tuner(LINEAR, view_us=50_000, num_lanes=2, degree=9, max_degree=7).pace(1)
    assert (beside.degree, beside.steps_between) == (7, 0)
    in_turn, at_once = beside.forecasts[5:]
    assert in_turn.rate_hz == pytest.approx(1e6 / (50_000 + 30_000), rel=1e-2)
    assert at_once.rate_hz == pytest.approx(1e6 / (50_000 / 2 + 30_000), rel=1e-2)
    assert tuner(LINEAR, degree=9).pace(1).steps_between == 1
