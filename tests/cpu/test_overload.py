"""Fleets against a server of known speed, in simulated time: who is served under too much load, and by which quality.

The dispatcher, the engine's step, scheduler and ledger are the real ones; the executor charges a cost table (shaped like
the shipped policy's on one core) and computes nothing.
"""

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from ganglion.clock import SimulatedClock
from ganglion.config import PipelineConfig
from ganglion.engine.executor import PieceResult
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.engine.work import StepPlan
from ganglion.layout import PoolLayout
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import TINY_PROMPTS, tiny_flow
from ganglion.pipeline.admission import Admission
from ganglion.pipeline.dispatch import Dispatcher
from ganglion.pipeline.ladder import Ladder, Rung
from ganglion.pipeline.session import Submission
from ganglion.pipeline.triage import Triage
from ganglion.pipeline.tune import Tuner
from ganglion.plan.cost import MeasuredCost
from ganglion.service import Outcome
from ganglion.spec import Stage
from ganglion.types import (
    ActionChunk,
    Float32Array,
    Observation,
    PageId,
    RequestId,
    RobotId,
    SessionId,
    SpanKind,
)

TICK_S, INTERVAL_TICKS, MAX_AGE_S = 0.05, 4, 0.25
WARM_S, RUN_S = 2.0, 4.0
ROWS = (1, 4, 16, 64)
PIECE_MS = {  # one piece by rows; of a denoise stage, one flow step
    SpanKind.ENCODE: (1.0, 2.3, 7.0, 28.0),
    SpanKind.PREFILL: (0.9, 2.2, 7.0, 28.0),
    SpanKind.DENOISE: (1.5, 2.9, 8.2, 33.0),
}
LADDER = Ladder(rungs=tuple(Rung(num_flow_steps=steps) for steps in (5, 3, 2, 1)))
_CHECKPOINT = tiny_flow()
MODEL = FlowModel(_CHECKPOINT.policy, _CHECKPOINT.processor, _CHECKPOINT.spec)


def piece_us(stage: Stage, num_rows: int) -> float:
    if stage.name == "text":
        return 50.0
    return float(np.interp(num_rows, ROWS, PIECE_MS[stage.kind])) * 1e3


class ChargingExecutor:
    """Moves the clock by the table, `slowness` times."""

    def __init__(self, clock: SimulatedClock, slowness: float) -> None:
        self._clock, self._slowness = clock, slowness

    def run(self, plan: StepPlan) -> tuple[PieceResult, ...]:
        results = []
        for piece in plan.pieces:
            stage, start_s = piece.order.stage, self._clock.now_s()
            num_steps = piece.order.num_units if stage.is_divisible else 1
            run_us = piece_us(stage, len(piece.order.rows)) * num_steps * self._slowness
            self._clock.advance(run_us * 1e-6)
            results.append(PieceResult(start_s=start_s, run_us=run_us, failed_rows={}))
        self._clock.advance(0.0005)
        return tuple(results)

    def emit(
        self,
        model: str,
        stage: Stage,
        pages: Sequence[Sequence[PageId]],
        observations: tuple[Observation, ...],
    ) -> Float32Array:
        self._clock.advance(0.0007 * len(observations))
        spec = MODEL.spec
        return np.zeros((len(observations), spec.horizon, spec.action_dim), np.float32)


@dataclass(slots=True)
class Fleet:
    """Robots that ask every INTERVAL_TICKS, whatever is under way, and what they got."""

    num_robots: int
    is_admitted_by_need: bool = True
    slowness: float = 1.0
    ladder: Ladder | None = None
    num_ticks: int = 0
    num_misses: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    misses_of: dict[int, int] = field(default_factory=dict)
    rung: str | None = None
    wait_ratios: tuple[float, ...] = ()

    @property
    def miss_rate(self) -> float:
        return self.num_misses / self.num_ticks

    def run(self) -> "Fleet":
        clock = SimulatedClock()
        dispatcher = self._dispatcher(clock)
        rng, ids = random.Random(0), itertools.count(1)
        seen_s: list[dict[int, float]] = [{} for _ in range(self.num_robots)]
        newest_s = [float("-inf")] * self.num_robots
        ticks = [(rng.random() * TICK_S * INTERVAL_TICKS, at, 0) for at in range(self.num_robots)]
        heapq.heapify(ticks)
        while clock.now_s() < WARM_S + RUN_S:
            while ticks[0][0] <= clock.now_s():
                now_s, robot, tick = heapq.heappop(ticks)
                heapq.heappush(ticks, (now_s + TICK_S, robot, tick + 1))
                if now_s > WARM_S:
                    is_miss = now_s - newest_s[robot] > MAX_AGE_S
                    self.num_ticks += 1
                    self.num_misses += is_miss
                    self.misses_of[robot] = self.misses_of.get(robot, 0) + is_miss
                if tick % INTERVAL_TICKS:
                    continue
                seen_s[robot][tick] = now_s

                def on_done(outcome: Outcome, robot: int = robot) -> None:
                    if isinstance(outcome, ActionChunk):
                        taken_s = seen_s[robot][outcome.context_seq]
                        newest_s[robot] = max(newest_s[robot], taken_s)
                    else:
                        self.codes[outcome.code] = self.codes.get(outcome.code, 0) + 1

                dispatcher.handle(
                    Submission(
                        request_id=RequestId(next(ids)),
                        observation=_observation(robot, tick),
                        on_done=on_done,
                        submitted_s=now_s,
                        deadline_s=now_s + MAX_AGE_S,
                        is_deadline_strict=True,
                    )
                )
            if dispatcher.has_work:
                dispatcher.step()
            else:
                clock.sleep_until(ticks[0][0] + 1e-6)
        stats = dispatcher.picture(is_ready=True, stage="")
        self.rung = stats.rung
        self.wait_ratios = tuple(session.wait_ratio for session in stats.sessions)
        return self

    def _dispatcher(self, clock: SimulatedClock) -> Dispatcher:
        cost, name = MeasuredCost(), MODEL.spec.name
        for stage in MODEL.stages:
            for rows in (1, 2, 4, 8, 16):
                num_units = 1 if stage.is_divisible else stage.num_units
                run_us = piece_us(stage, rows) * self.slowness
                cost.observe(name, stage.name, num_rows=rows, num_units=num_units, run_us=run_us)
        engine = Engine(
            {name: MODEL},
            Ledger(PoolLayout(large_page_bytes=1 << 20, layouts=MODEL.layouts), 64),
            DeadlineScheduler({name: MODEL.stages}, cost, max_rows=64, num_lanes=1),
            ChargingExecutor(clock, self.slowness),  # type: ignore[arg-type]
            cost,
            clock,
            step_budget_us=20_000,
            num_step_records=1,
        )
        admission = Admission(
            cost,
            model=name,
            stages=MODEL.stages,
            max_rows=64,
            num_lanes=1,
            max_age_ms=MAX_AGE_S * 1e3,
        )
        triage = Triage(
            MODEL.spec,
            admission=admission if self.is_admitted_by_need else None,
            ladder=self.ladder,
        )
        tuner = Tuner(PipelineConfig(), cost, model=name, stages=MODEL.stages, num_lanes=1)
        return Dispatcher(engine, MODEL.spec, clock, Metrics(), tuner, triage)


def _observation(robot: int, tick: int) -> Observation:
    images = {}
    for view in MODEL.spec.views:
        image = np.zeros((view.height, view.width, 3), np.uint8)
        image.reshape(-1)[:8] = np.frombuffer((robot << 32 | tick).to_bytes(8, "little"), np.uint8)
        images[view.key] = image
    return Observation(
        session_id=SessionId(f"arm-{robot}"),
        robot_id=RobotId(f"arm-{robot}"),
        seq=tick,
        images=images,
        state=np.zeros(MODEL.spec.state_dim, np.float32),
        prompt=TINY_PROMPTS[robot % len(TINY_PROMPTS)],
        control_hz=1 / TICK_S,
        deadline_ms=MAX_AGE_S * 1e3,
        executed_until=tick,
    )


def test_a_fleet_that_fits_is_served_at_full_quality() -> None:
    fleet = Fleet(num_robots=12, ladder=LADDER).run()
    assert fleet.num_misses == 0
    assert fleet.rung == "5 flow steps"
    assert not fleet.codes
    assert max(fleet.wait_ratios) < 0.15


def test_a_fleet_that_does_not_fit_goes_down_the_ladder_instead_of_missing() -> None:
    full, laddered = Fleet(num_robots=48).run(), Fleet(num_robots=48, ladder=LADDER).run()
    assert full.miss_rate > 0.2
    assert laddered.miss_rate < 0.01
    assert laddered.rung in ("2 flow steps", "1 flow step")


def test_what_does_not_help_the_batch_waits_outside() -> None:
    """A little too many robots: rows that the batch gains nothing from would only make the others late."""
    by_need = Fleet(num_robots=40).run()
    at_once = Fleet(num_robots=40, is_admitted_by_need=False).run()
    assert by_need.miss_rate < 0.6 * at_once.miss_rate


def test_a_slow_machine_serves_some_in_time_instead_of_all_late() -> None:
    fleet = Fleet(num_robots=16, slowness=5.0).run()
    at_once = Fleet(num_robots=16, slowness=5.0, is_admitted_by_need=False).run()
    assert at_once.miss_rate > 0.9
    assert fleet.miss_rate < 0.8


@pytest.mark.parametrize("num_robots", [44, 60])
def test_an_overloaded_server_starves_nobody(num_robots: int) -> None:
    fleet = Fleet(num_robots=num_robots).run()
    per_robot = [fleet.misses_of[robot] for robot in range(num_robots)]
    assert max(per_robot) < fleet.num_ticks / num_robots, "somebody never got a chunk in time"
    assert fleet.codes.get("internal", 0) == 0
