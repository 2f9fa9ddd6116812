"""Robots beside a planner in simulated time: what slices keep, and what is lost without them."""

from dataclasses import replace

import pytest

from ganglion.bench.cosim import CostTable
from ganglion.bench.mixed_sim import EventClock, LanguageCosts, SimulatedSide, Traffic, simulate
from ganglion.config import EngineConfig

from .toy import Toy

# half the layers of 0.5 B, and about the shipped policy, on two cores
LAYER_US = {1: 1250.0, 4: 1300.0, 16: 1600.0, 64: 3500.0, 128: 6200.0, 256: 11_000.0, 512: 21_000.0}
COSTS = LanguageCosts(layer_us=LAYER_US, head_us={1: 2600.0, 4: 2800.0}, num_layers=14)
ROBOT = CostTable(
    unit_us={
        "view": {1: 1000.0, 2: 1700.0},
        "context": {1: 2400.0, 2: 4000.0},
        "flow": {1: 1800.0, 2: 2300.0, 4: 3600.0},
    },
    step_us=0.0,
)
TRAFFIC = Traffic(
    num_robots=2,
    rate_hz=20.0,
    deadline_ms=100.0,
    num_prompts=2,
    num_prompt_tokens=600,
    num_new_tokens=8,
    num_open=2,
    seed=0,
)
UNSLICED_US = 10_000_000


def side(engine: EngineConfig, *, num_robots: int) -> SimulatedSide:
    return simulate(Toy(), ROBOT, COSTS, engine, replace(TRAFFIC, num_robots=num_robots))


def test_sliced_prompts_cost_no_robot_its_deadline_and_go_on_at_half_their_rate() -> None:
    engine = EngineConfig(dtype="float32")
    alone, beside = side(engine, num_robots=0), side(engine, num_robots=2)
    assert len(beside.waits_ms) > 40
    assert beside.miss_rate(100.0) < 0.01
    assert beside.tokens_per_s >= 0.5 * alone.tokens_per_s
    # 256 tokens of a prompt take 154 ms: chunks of 16 would take nearly as long for each 109
    assert alone.tokens_per_s > 900


def test_unsliced_prompts_do() -> None:
    engine = EngineConfig(
        dtype="float32", step_budget_us=UNSLICED_US, language_slice_us=UNSLICED_US
    )
    assert side(engine, num_robots=2).miss_rate(100.0) > 0.2


def test_events_come_on_time_while_work_runs() -> None:
    clock, seen = EventClock(), list[tuple[str, float]]()
    clock.call_at(2.0, lambda: seen.append(("late", clock.now_s())))
    clock.call_at(1.0, lambda: seen.append(("early", clock.now_s())))
    clock.advance(1.5e6)
    assert seen == [("early", 1.0)]
    assert clock.now_s() == 1.5
    clock.skip()
    assert seen[1:] == [("late", 2.0)]
    with pytest.raises(IndexError):
        clock.skip()
