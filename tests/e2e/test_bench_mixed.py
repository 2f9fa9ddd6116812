"""Bench mixed in its quick form: robots and a planner really run in one service."""

import pytest

from ganglion.bench import mixed


@pytest.mark.slow
def test_quick() -> None:
    result = mixed.run(quick=True, seed=0)
    assert result.metrics["planner_tokens_per_s"] > 0
    assert result.metrics["planner_tokens_per_s_alone"] > 0
    assert 0 <= result.metrics["robot_miss_rate"] <= 1
    assert result.n > 0
