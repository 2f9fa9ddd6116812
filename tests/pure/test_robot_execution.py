"""What a robot tells of its plan, how its state is rolled forward, how bad a road may be: rules, without a loop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.errors import FieldError
from ganglion.robots.catalog import METAWORLD_ARM, PUSHT_ARM
from ganglion.robots.episode import EpisodePlan
from ganglion.robots.execution import ChunkExecution, DelayForecast, Outlook, roll
from ganglion.robots.impairment import MAX_MS, Impairment, Road
from ganglion.robots.loop import LoopConfig, Pace
from ganglion.robots.queue import QueueConfig
from ganglion.robots.runner import RunnerConfig
from ganglion.types import Execution

METADATA = {
    "policy": "p",
    "horizon": 16,
    "max_prefix": 6,
    "state": {"state": [4]},
    "executions": [execution.value for execution in Execution],
}
VIEWS = {"view": np.zeros((2, 2, 3), np.uint8), "state": np.zeros(4, np.float32)}


def execution(mode: Execution, arm=METAWORLD_ARM, **changes) -> ChunkExecution:
    return ChunkExecution(mode, metadata=METADATA | changes, embodiment=arm, replan_ticks=3)


def outlook(**changes) -> Outlook:
    plan = np.full((9, 4), 0.5, np.float32)
    fields = {"tick": 20, "plan": plan, "delay_ticks": 4, "num_certain": 4}
    return Outlook(**{**fields, **changes})


@pytest.mark.parametrize("mode", list(Execution))
def test_a_dry_queue_commits_nothing(mode):
    told = execution(mode).told(VIEWS, outlook(plan=np.zeros((0, 4), np.float32)))
    assert "action_prefix" not in told.hints
    assert told.hints.get("inference_delay_hint", 0) == 0
    assert told.first_tick == 20
    assert told.hints.get("executed_until") == (None if mode is Execution.SYNC else 20)
    assert told.views["state"].tolist() == [0.0] * 4


@given(
    delay_ticks=st.integers(0, 40),
    num_certain=st.integers(0, 40),
    num_rows=st.integers(0, 20),
    mode=st.sampled_from([Execution.PREFIX, Execution.RTC, Execution.RTC_IDENTITY]),
)
def test_what_is_told_is_always_what_a_server_takes(delay_ticks, num_certain, num_rows, mode):
    plan = np.full((num_rows, 4), 0.1, np.float32)
    looks = outlook(plan=plan, delay_ticks=delay_ticks, num_certain=num_certain)
    hints = execution(mode).told(VIEWS, looks).hints
    prefix = hints.get("action_prefix", plan[:0])
    assert len(prefix) <= min(6, num_certain, delay_ticks, num_rows)
    assert 0 <= hints["inference_delay_hint"] <= 16


def test_the_forecast_is_the_longest_of_the_last_ten():
    forecast = DelayForecast(1)
    for ticks in (2, 9, 3):
        forecast.add(ticks)
    assert (forecast.ticks, forecast.least_ticks) == (9, 1)
    for _ in range(9):
        forecast.add(4)
    assert (forecast.ticks, forecast.least_ticks) == (4, 3)


def test_the_hand_rolls_by_its_actions_and_stops_at_its_bounds():
    state = np.array([0.0, 0.99, 0.06, 0.5], np.float32)
    actions = np.array([[1.0, 1.0, -1.0, 1.0]] * 3, np.float32)
    assert roll(state, actions, METAWORLD_ARM) == pytest.approx([0.03, 1.0, 0.05, 0.32])
    assert state.tolist() == pytest.approx([0.0, 0.99, 0.06, 0.5]), "a copy"
    outside = np.array([0.0, 0.6, 0.02, 0.5], np.float32)  # the hand sags below its box
    assert roll(outside, actions, METAWORLD_ARM)[2] == pytest.approx(0.02)


def test_a_position_arm_will_be_where_it_was_sent_last():
    actions = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert roll(np.zeros(2, np.float32), actions, PUSHT_ARM).tolist() == [3.0, 4.0]
    assert roll(np.zeros(2, np.float32), actions[:0], PUSHT_ARM).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delay_ms", -1.0),
        ("delay_ms", MAX_MS + 1),
        ("delay_ms", math.nan),
        ("jitter_ms", math.inf),
        ("jitter_ms", "12"),
        ("loss", 1.1),
        ("loss", True),
        ("loss", [0.5]),
    ],
)
def test_absurd_impairments_are_refused_by_name(name, value):
    with pytest.raises(FieldError, match=name):
        Impairment.from_json({"type": "impair", name: value})


def test_a_road_is_as_bad_as_it_is_made_and_repeats():
    bad = Impairment(delay_ms=100.0, jitter_ms=40.0, loss=0.25)
    roads = Road("arm-1"), Road("arm-1"), Road("arm-2")
    for road in roads:
        assert road.travel_s() == 0.0
        road.impairment = bad
    first, again, other = ([road.travel_s() for _ in range(4_000)] for road in roads)
    assert first == again != other
    kept = [value for value in first if value is not None]
    assert len(kept) / len(first) == pytest.approx(0.75, abs=0.03)
    assert 0.05 <= min(kept) < 0.052
    assert 0.068 < max(kept) <= 0.07


def test_a_robots_config_travels_to_its_process():
    config = RunnerConfig(
        robot_id="a", url="ws://x", api_key=None, has_side_channel=False, cores=(1,), niceness=3,
        connect_s=2.0, impairment=Impairment(delay_ms=5.0, loss=0.5),
        loop=LoopConfig(
            execution=Execution.ROLLED, pace=Pace.LOCKSTEP, delay_ticks=9, queue=QueueConfig(old_share=0.1)
        ),
    )  # fmt: skip
    assert RunnerConfig.from_json(config.to_json()) == config
    assert EpisodePlan.from_json(EpisodePlan(world="pusht", seed=1).to_json()).seed == 1
