"""Co-simulation: closed loops in the world's own time, the engine's real work charged at its measured cost.

The engine, the sessions and the action queue are those that serve; only time is simulated: a piece takes what the same
piece took when it was measured on this machine, and rendering takes nothing. So success does not hang on what else the
machine does, and a policy can be charged the time of one that computes the same function in more work. Called by the
benches. Knows no sockets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby

import numpy as np

from ganglion.clock import SimulatedClock
from ganglion.config import MemoryConfig, PipelineConfig
from ganglion.engine.executor import Executor, PieceResult
from ganglion.engine.lane import Lanes
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.engine.work import Piece, StepPlan
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.base import Model
from ganglion.pipeline.dispatch import Dispatcher
from ganglion.pipeline.session import Submission
from ganglion.pipeline.tune import Tuner
from ganglion.plan.cost import MeasuredCost, interpolate
from ganglion.robots.catalog import Arm
from ganglion.robots.queue import ActionQueue, Chunk, QueueConfig
from ganglion.service import Outcome
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Execution,
    Observation,
    RequestId,
    RobotId,
    SessionId,
)

STEP_BUDGET_US = 20_000
ROBOT = "arm"
NANOSECOND_S = 1e-9  # the simulated clock counts whole ones


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Microseconds of one unit of a stage by number of rows, and of what an engine step takes besides its pieces.

    `contention`: so many times as long a piece takes while another core computes, too.
    """

    unit_us: Mapping[str, Mapping[int, float]]
    step_us: float
    contention: float = 1.0

    def piece_us(self, stage: str, *, num_rows: int, num_units: int) -> float:
        """Between measured row counts linear, beyond them in proportion."""
        return interpolate(self.unit_us[stage], num_rows) * num_units


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """How a robot is served: the pipeline's switches, the robot's execution mode, its control rate."""

    pipeline: PipelineConfig
    execution: Execution
    rate_hz: float
    max_ticks: int = 500
    num_lanes: int = 1


@dataclass(slots=True, kw_only=True)
class FlightResult:
    """One episode: when it was solved, and the decisions and ages (ms) of the observations behind its actions."""

    success_tick: int | None = None
    num_ticks: int = 0
    num_decisions: int = 0
    num_errors: int = 0
    ages_ms: list[float] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)


class ChargedExecutor(Executor):
    """Runs every piece, and moves the simulated clock by what the table says that it takes."""

    def __init__(
        self, models: Mapping[str, Model], arena: Arena, clock: SimulatedClock, table: CostTable
    ) -> None:
        super().__init__(models, arena, Lanes(((),)), clock)
        self._simulated, self._table = clock, table

    def run(self, plan: StepPlan) -> tuple[PieceResult, ...]:
        """All pieces run on the one thread there is; what is charged goes by their lanes."""
        alone = tuple(replace(piece, order=replace(piece.order, lane=0)) for piece in plan.pieces)
        done = super().run(replace(plan, pieces=alone))
        charged: list[PieceResult] = []
        for _, wave in groupby(
            zip(plan.pieces, done, strict=True), key=lambda item: item[0].order.wave
        ):
            charged += self._charge(list(wave))
        self._simulated.advance(self._table.step_us * 1e-6)
        return tuple(charged)

    def _charge(self, wave: Sequence[tuple[Piece, PieceResult]]) -> list[PieceResult]:
        """A wave lasts as long as its busiest lane."""
        lanes = {piece.order.lane for piece, _ in wave}
        factor = self._table.contention if len(lanes) > 1 else 1.0
        start_s = self._simulated.now_s()
        lane_us = dict.fromkeys(lanes, 0.0)
        charged: list[PieceResult] = []
        for piece, result in wave:
            order = piece.order
            run_us = factor * self._table.piece_us(
                order.stage.name, num_rows=len(order.rows), num_units=order.num_units
            )
            charged.append(
                PieceResult(
                    start_s=start_s + lane_us[order.lane] * 1e-6,
                    run_us=run_us,
                    failed_rows=result.failed_rows,
                )
            )
            lane_us[order.lane] += run_us
        self._simulated.advance(max(lane_us.values()) * 1e-6)
        return charged


class Cosim:
    """One robot and its server, episode after episode."""

    def __init__(
        self, model: Model, table: CostTable, flight: Flight, *, arena_large_pages: int = 64
    ) -> None:
        self._flight = flight
        self._clock = SimulatedClock()
        layout = PoolLayout(large_page_bytes=MemoryConfig().large_page_bytes, layouts=model.layouts)
        name, cost = model.spec.name, MeasuredCost()
        for stage, rows in table.unit_us.items():
            for num_rows, unit_us in rows.items():
                cost.observe(name, stage, num_rows=num_rows, num_units=1, run_us=unit_us)
        self._engine = Engine(
            {name: model},
            Ledger(layout, arena_large_pages),
            DeadlineScheduler({name: model.stages}, cost, max_rows=64, num_lanes=flight.num_lanes),
            ChargedExecutor({name: model}, Arena(layout, arena_large_pages), self._clock, table),
            cost,
            self._clock,
            step_budget_us=STEP_BUDGET_US,
            num_step_records=1,
            is_context_public=flight.pipeline.context == "public",
            warm_start_share=flight.pipeline.warm_start,
        )
        tuner = Tuner(
            flight.pipeline, cost, model=name, stages=model.stages, num_lanes=flight.num_lanes
        )
        self._dispatcher = Dispatcher(self._engine, model.spec, self._clock, Metrics(), tuner)
        self._model, self._seqs, self._episodes = model, count(), count()
        self._inbox: list[Outcome] = []

    def fly(self, arm: Arm, seed: int) -> FlightResult:
        """One episode to success or its last tick. The arm's clock starts with its first chunk."""
        arm.world.reset(seed)
        session_id = SessionId(f"{ROBOT}-{next(self._episodes)}")
        queue = ActionQueue(arm.embodiment, QueueConfig(max_age_s=10.0, safe_stop_s=10.0))
        result = FlightResult()
        period_s = 1 / self._flight.rate_hz
        obs_s: dict[int, tuple[int, float]] = {}  # seq -> tick, time
        delays: list[int] = []  # ticks from observation to chunk, the last few

        def observe(tick: int, taken_s: float) -> None:
            seq = next(self._seqs)
            obs_s[seq] = (tick, taken_s)
            self._submit(arm, session_id, seq, tick, max(delays[-4:], default=0), seed)

        def take() -> None:
            for outcome in self._inbox:
                if not isinstance(outcome, ActionChunk):
                    result.num_errors += outcome.code not in ("superseded", "cancelled")
                    continue
                tick, taken_s = obs_s[outcome.context_seq]
                _, own_s = obs_s[outcome.obs_seq]
                now_s = self._clock.now_s()
                delays.append(-(-round((now_s - own_s) * 1e9) // round(period_s * 1e9)))
                result.num_decisions += 1
                result.done_s.append(now_s)
                queue.offer(
                    Chunk(
                        actions=outcome.actions,
                        obs_tick=tick,
                        obs_s=taken_s,
                        version=outcome.model_version,
                    ),
                    now_s=now_s,
                )
            self._inbox.clear()

        observe(0, self._clock.now_s())
        while not result.num_decisions:
            self._step()
            take()
        start_s, tick = self._clock.now_s(), 0
        command = None
        while tick < self._flight.max_ticks:
            due_s = start_s + tick * period_s
            if due_s > self._clock.now_s() + NANOSECOND_S and self._dispatcher.has_work:
                self._step()
            else:
                self._clock.sleep_until(due_s)
            while (
                tick < self._flight.max_ticks
                and start_s + tick * period_s <= self._clock.now_s() + NANOSECOND_S
            ):
                if command is not None:
                    arm.world.apply(command.action)
                    if arm.world.success:
                        result.success_tick, result.num_ticks = tick, tick
                        self._leave(session_id)
                        return result
                tick_s = start_s + tick * period_s
                command = queue.step(tick, now_s=tick_s)
                if command.age_s is not None:
                    result.ages_ms.append(command.age_s * 1e3)
                tick += 1
            take()
            is_new = not obs_s or next(reversed(obs_s.values()))[0] < tick - 1
            if is_new and self._dispatcher.is_wanted(session_id):
                observe(tick - 1, start_s + (tick - 1) * period_s)
        result.num_ticks = tick
        self._leave(session_id)
        return result

    def _step(self) -> None:
        self._dispatcher.step()

    def _submit(
        self, arm: Arm, session_id: SessionId, seq: int, tick: int, delay_ticks: int, seed: int
    ) -> None:
        views = arm.world.observe()
        now_s = self._clock.now_s()
        self._dispatcher.handle(
            Submission(
                request_id=RequestId(seq),
                observation=Observation(
                    session_id=session_id,
                    robot_id=RobotId(ROBOT),
                    seq=seq,
                    images={
                        view.key: np.asarray(views[view.key], np.uint8)
                        for view in self._model.spec.views
                    },
                    state=np.asarray(views[self._model.spec.state_key], np.float32),
                    prompt=arm.world.prompt,
                    control_hz=self._flight.rate_hz,
                    seed=seed * 1000 + tick,
                    execution=self._flight.execution,
                    executed_until=tick,
                    inference_delay_hint=min(delay_ticks, self._model.spec.horizon),
                ),
                on_done=self._inbox.append,
                submitted_s=now_s,
                deadline_s=now_s + 1.0,
                is_deadline_strict=False,
            )
        )

    def _leave(self, session_id: SessionId) -> None:
        self._dispatcher.handle(CloseSession(session_id=session_id, robot_id=RobotId(ROBOT)))
        self._inbox.clear()
