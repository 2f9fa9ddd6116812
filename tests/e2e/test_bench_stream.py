"""What is read off a stream of decisions, and co-simulation: worked out by hand, and against the engine's own rhythm."""

import numpy as np
import pytest

from ganglion.bench import moving
from ganglion.bench.cosim import Cosim, CostTable, Flight
from ganglion.bench.stream import Decision, Stream
from ganglion.config import PipelineConfig
from ganglion.models.registry import load_policy, policy_folder
from ganglion.robots.catalog import open_arm
from ganglion.types import Execution

# every 100 ms a chunk that rests on an observation 40 ms older
STEADY = Stream(
    decisions=tuple(Decision(obs_s=at / 10, done_s=at / 10 + 0.04) for at in range(10)),
    run_s=1.0,
    rate_hz=20.0,
)


def test_a_steady_stream() -> None:
    assert STEADY.decisions_per_s == pytest.approx(10.0)
    assert STEADY.jitter == pytest.approx(0.0, abs=1e-9)
    ages = STEADY.ages_ms()
    assert len(ages) == 20
    assert max(ages) == pytest.approx(100.0)
    reactions = STEADY.reactions_ms(num_changes=500, seed=0)
    assert min(reactions) >= 50.0
    assert max(reactions) <= 150.0 + 1e-6


def test_what_nobody_saw_counts_until_the_end() -> None:
    blind = Stream(decisions=(), run_s=1.0, rate_hz=20.0)
    assert min(blind.reactions_ms(num_changes=100, seed=0)) >= 200.0, "changes end at 0.8 s"
    assert max(blind.ages_ms()) == pytest.approx(950.0)


def test_uneven_intervals_are_jitter() -> None:
    done_s = (0.1, 0.2, 0.5, 0.6, 0.9)
    uneven = Stream(
        decisions=tuple(Decision(obs_s=0.0, done_s=at) for at in done_s), run_s=1.0, rate_hz=20.0
    )
    assert uneven.jitter == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("degree", "num_lanes", "interval_ms"),
    [(1, 1, 10 + 5 * 10), (5, 1, 10 + 30), (6, 2, 1 + 8 + 15)],  # last: 2 rows beside the other 3
)
def test_cosimulated_chunks_come_when_their_pieces_cost_says(
    degree: int, num_lanes: int, interval_ms: float
) -> None:
    model = load_policy(policy_folder("metaworld-ten"), dtype="float32")
    table = CostTable(
        unit_us={
            "view.0": {1: 1_000},
            "view.1": {1: 1_000},
            "text": {1: 0.0},
            "observation": {1: 8_000 / 51},
            "denoise": {1: 10_000, 2: 15_000, 3: 20_000, 5: 30_000},
        },
        step_us=0.0,
    )
    flight = Flight(
        pipeline=PipelineConfig(degree=degree),
        execution=Execution.NAIVE,
        rate_hz=80.0,
        max_ticks=40,
        num_lanes=num_lanes,
    )
    arm = open_arm("metaworld:drawer-open")
    try:
        result = Cosim(model, table, flight).fly(arm, 20_000)
    finally:
        arm.world.close()
    steady = np.diff(result.done_s)[2:] * 1e3  # the first ones fill the pipeline
    assert len(steady) >= 4
    np.testing.assert_allclose(steady, interval_ms, atol=12.5, err_msg="but for the next tick")
    assert result.num_errors == 0


def test_moving_flies_what_pipeline_measured() -> None:
    result = moving.run(quick=True, seed=0)
    assert result.n == 2
    assert set(result.detail["success"]) == {"B0", "n=3 public, warm start 0.6"}
    assert result.metrics["rate_ratio"] > 1
