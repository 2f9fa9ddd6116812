"""PolicyPart: the engine and the sessions of one policy, on a pool that others may share. On the loop's thread.

Made and called by `pipeline.local`. Knows neither threads nor language models.
"""

import itertools
from collections.abc import Callable

import numpy as np

from ganglion.clock import Clock
from ganglion.config import EngineConfig, MemoryConfig, PipelineConfig
from ganglion.engine.executor import Executor
from ganglion.engine.lane import Lanes
from ganglion.engine.memories import MemoryPolicy
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.errors import GanglionError
from ganglion.layout import PageLayout
from ganglion.memory.arena import Arena
from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.base import Model, Remembering
from ganglion.pipeline.admission import Admission
from ganglion.pipeline.dispatch import Dispatcher
from ganglion.pipeline.gate import gate_config
from ganglion.pipeline.ladder import Ladder
from ganglion.pipeline.triage import Triage
from ganglion.pipeline.tune import Tuner
from ganglion.plan.cost import MeasuredCost
from ganglion.spec import PolicySpec
from ganglion.types import Observation, RequestId, RobotId, SessionId

CALIBRATION_ROWS = (1, 1, 2, 4, 8, 16, 1)
CALIBRATION_LIMIT_S = 2.0


def policy_layouts(model: Model, memory: MemoryConfig) -> tuple[PageLayout, ...]:
    """What the policy's pages are; with a bound on whole memories also what the others are encoded in."""
    layouts = tuple(model.layouts)
    if memory.history_whole and isinstance(model, Remembering):
        carried = {carry.stage for carry in model.carries if carry.depth > memory.history_whole}
        names = {stage.layout for stage in model.stages if stage.name in carried}
        encoded = [Int8Codec().encoded(layout) for layout in layouts if layout.name in names]
        layouts = (*layouts, *encoded)
    return layouts


class PolicyPart:
    """One policy: `dispatcher` takes the messages, `calibrate` runs before the first."""

    def __init__(
        self,
        model: Model,
        *,
        ledger: Ledger,
        arena: Arena,
        lanes: Lanes,
        engine: EngineConfig,
        memory: MemoryConfig,
        pipeline: PipelineConfig,
        ladder: Ladder | None,
        clock: Clock,
        metrics: Metrics,
        make_room: Callable[[], bool],
    ) -> None:
        self._spec, self._clock, self._max_rows = model.spec, clock, engine.max_rows
        name = model.spec.name
        cost = MeasuredCost()
        self.engine = Engine(
            {name: model},
            ledger,
            DeadlineScheduler(
                {name: model.stages}, cost, max_rows=engine.max_rows, num_lanes=len(lanes)
            ),
            Executor({name: model}, arena, lanes, clock),
            cost,
            clock,
            step_budget_us=engine.step_budget_us,
            num_step_records=engine.num_step_records,
            defrag_budget_bytes=memory.defrag_step_bytes,
            is_context_public=pipeline.context == "public",
            warm_start_share=pipeline.warm_start,
            memory_policy=MemoryPolicy(num_whole=memory.history_whole or None),
            make_room=make_room,
        )
        tuner = Tuner(pipeline, cost, model=name, stages=model.stages, num_lanes=len(lanes))
        admission = Admission(
            cost,
            model=name,
            stages=model.stages,
            max_rows=engine.max_rows,
            num_lanes=len(lanes),
            max_age_ms=pipeline.max_age_ms,
        )
        triage = Triage(model.spec, admission=admission, ladder=ladder)
        self.dispatcher = Dispatcher(
            self.engine, model.spec, clock, metrics, tuner, triage, gate=gate_config(pipeline)
        )

    @property
    def spec(self) -> PolicySpec:
        """The policy."""
        return self._spec

    def calibrate(self) -> None:
        """Run made-up observations through the real path: warms kernels up and fills the cost table."""
        rng = np.random.default_rng(0)
        end_s = self._clock.now_s() + CALIBRATION_LIMIT_S
        session_id = SessionId("calibration")
        numbers = itertools.count()
        for num_rows in CALIBRATION_ROWS:
            if num_rows > self._max_rows:
                continue
            for row in range(num_rows):
                self.engine.submit(
                    RequestId(-1 - row),
                    self._spec.name,
                    self._made_up_observation(rng, session_id, next(numbers)),
                    deadline_s=0.0,
                )
            while self.engine.has_work:
                self.engine.step()
            for finished in self.engine.drain_finished():
                if isinstance(finished.outcome, GanglionError):
                    raise finished.outcome
            if self._clock.now_s() > end_s:
                break
        self.engine.close_session(session_id)
        self.engine.records.clear()

    def _made_up_observation(
        self, rng: np.random.Generator, session_id: SessionId, seq: int
    ) -> Observation:
        return Observation(
            session_id=session_id,
            robot_id=RobotId("calibration"),
            seq=seq,
            images={
                view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
                for view in self._spec.views
            },
            state=np.zeros(self._spec.state_dim, dtype=np.float32),
            prompt=f"calibration {seq}",
            seed=seq,
        )
