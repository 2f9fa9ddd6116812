"""Bench delay in miniature: every mode has its figures, and modes that are the same without delay ran once."""

import math

import pytest

from ganglion.bench import delay
from ganglion.bench.delay import MODES, SERIES, Mode, Point, point, share
from ganglion.train.evaluate import EvaluateConfig, TaskResult
from ganglion.types import Execution


def test_quick_run_has_every_mode() -> None:
    result = delay.run(quick=True, seed=0)
    assert {mode.execution for mode in MODES} == set(Execution), "all seven, and the pipelined ones"
    assert result.metrics.keys() >= {"success_at_8_share", "naive_success_at_8_share"}
    assert all(math.isfinite(value) for value in result.metrics.values())
    points = result.detail["points"]
    assert points.keys() == set(SERIES) > {mode.name for mode in MODES}
    for of_mode in points.values():
        assert of_mode.keys() == {"0", "8"}
        assert all(0 < point["mean_ticks"] <= 40 for point in of_mode.values())
    assert points["prefix"]["0"] == points["naive"]["0"]
    assert points["prefix"]["8"]["switch_jump"] < points["naive"]["8"]["switch_jump"]
    for plot in result.plots:
        assert plot.series.keys() == points.keys()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_ticks_between_chunks(mode: Mode) -> None:
    base = EvaluateConfig()
    for late in (0, 2, 8, 20):
        config = mode.config(base, late)
        assert config.ticks_per_chunk == (3 if mode.is_pipelined else max(3, late))
        assert config.delay_ticks == late
        is_rolled = mode.execution is Execution.ROLLED
        assert config.is_context_public == (mode.is_pipelined and late > 0 and not is_rolled)
        assert config.execution is (mode.execution if late else config.execution)


def test_a_point_counts_unsolved_episodes_in_full() -> None:
    results = [
        TaskResult(task="a", prompt="", solved_ticks={0: 10, 1: None}, switch_jump=0.2, jerk=0.0),
        TaskResult(task="b", prompt="", solved_ticks={0: 30, 1: 60}, switch_jump=0.4, jerk=0.2),
    ]
    found = point(results, 100)
    assert found == Point(
        success=0.75,
        num_solved=3,
        num_episodes=4,
        mean_ticks=50.0,
        switch_jump=pytest.approx(0.3),
        jerk=pytest.approx(0.1),
        success_by_task={"a": 0.5, "b": 1.0},
    )
    none = point([TaskResult(task="a", prompt="", solved_ticks={0: None})], 100)
    assert share(found, found) == 1.0
    assert share(found, none) == 0.0
