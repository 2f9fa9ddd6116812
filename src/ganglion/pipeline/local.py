"""LocalService: the Service in this process. Wires memory, engine and sessions; one thread runs them all.

Called by the edge (through `Service`), by `cli` and by `bench`. Its public methods are thread-safe and never wait for
a step.
"""

import itertools
import logging
import threading
from types import TracebackType
from typing import Self

import numpy as np

from ganglion.clock import Clock, RealClock
from ganglion.config import EngineConfig, MemoryConfig, PipelineConfig
from ganglion.engine.executor import Executor
from ganglion.engine.lane import Lanes
from ganglion.engine.loop import EngineLoop
from ganglion.engine.memories import MemoryPolicy
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.errors import (
    CancelledError,
    FieldError,
    GanglionError,
    InternalError,
    OverloadedError,
    SessionConflictError,
)
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.base import Model, Remembering
from ganglion.pipeline.admission import Admission
from ganglion.pipeline.dispatch import Cancel, Dispatcher, Message, Refresh
from ganglion.pipeline.gate import gate_config
from ganglion.pipeline.ladder import Ladder
from ganglion.pipeline.session import Submission
from ganglion.pipeline.triage import Triage
from ganglion.pipeline.tune import Tuner
from ganglion.plan.cost import MeasuredCost
from ganglion.service import OnDone
from ganglion.spec import PolicySpec
from ganglion.types import (
    CloseSession,
    Command,
    Observation,
    OverridePrompt,
    RequestId,
    RobotId,
    ServiceStats,
    SessionId,
)

logger = logging.getLogger(__name__)

PICTURE_PERIOD_S = 0.05
CALIBRATION_ROWS = (1, 1, 2, 4, 8, 16, 1)
CALIBRATION_LIMIT_S = 2.0


class LocalService:
    """One model on one arena behind the Service protocol. `with LocalService(model, ...) as service: ...`"""

    def __init__(
        self,
        model: Model,
        *,
        engine: EngineConfig,
        memory: MemoryConfig,
        pipeline: PipelineConfig | None = None,
        ladder: Ladder | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._model, self._config = model, engine
        pipeline = pipeline or PipelineConfig()
        self._clock = clock or RealClock()
        self._lanes = Lanes(engine.lanes or ((),))
        name = model.spec.name
        layouts = model.layouts
        if memory.history_whole and isinstance(model, Remembering):
            carried = {carry.stage for carry in model.carries if carry.depth > memory.history_whole}
            names = {stage.layout for stage in model.stages if stage.name in carried}
            encoded = [Int8Codec().encoded(layout) for layout in layouts if layout.name in names]
            layouts = (*layouts, *encoded)
        layout = PoolLayout(large_page_bytes=memory.large_page_bytes, layouts=layouts)
        num_large_pages = memory.arena_bytes // memory.large_page_bytes
        cost = MeasuredCost()
        self._engine = Engine(
            {name: model},
            Ledger(layout, num_large_pages),
            DeadlineScheduler(
                {name: model.stages}, cost, max_rows=engine.max_rows, num_lanes=len(self._lanes)
            ),
            Executor({name: model}, Arena(layout, num_large_pages), self._lanes, self._clock),
            cost,
            self._clock,
            step_budget_us=engine.step_budget_us,
            num_step_records=engine.num_step_records,
            defrag_budget_bytes=memory.defrag_step_bytes,
            is_context_public=pipeline.context == "public",
            warm_start_share=pipeline.warm_start,
            memory_policy=MemoryPolicy(num_whole=memory.history_whole or None),
        )
        tuner = Tuner(pipeline, cost, model=name, stages=model.stages, num_lanes=len(self._lanes))
        admission = Admission(
            cost,
            model=name,
            stages=model.stages,
            max_rows=engine.max_rows,
            num_lanes=len(self._lanes),
            max_age_ms=pipeline.max_age_ms,
        )
        triage = Triage(model.spec, admission=admission, ladder=ladder)
        self._dispatcher = Dispatcher(
            self._engine,
            model.spec,
            self._clock,
            metrics or Metrics(),
            tuner,
            triage,
            gate=gate_config(pipeline),
        )
        self._loop: EngineLoop[Message] = EngineLoop(
            open_=self._open,
            handle=self._handle,
            step=self._step,
            on_defect=self._on_defect,
            close=self._close,
        )
        self._request_ids = itertools.count(1)
        self._owners_lock = threading.Lock()
        self._owners: dict[SessionId, RobotId] = {}
        self._is_ready = False
        self._stage = "starting"
        self._opened = threading.Event()
        self._picture = self._dispatcher.picture(is_ready=False, stage=self._stage)

    # --- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread and wait until it has calibrated itself.

        Raises InternalError when the model cannot run its own shapes.
        """
        self._loop.start()
        self._opened.wait()
        if not self._is_ready:
            self.close()
            raise InternalError(
                f"the policy {self._model.spec.name!r} failed in calibration",
                next_step="see the traceback in the log above",
            )

    def close(self) -> None:
        """Cancel what is open, stop the thread, give the memory back."""
        self._loop.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- Service -----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicySpec:
        return self._model.spec

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        self._claim(observation.session_id, observation.robot_id)
        request_id = RequestId(next(self._request_ids))
        now_s = self._clock.now_s()
        deadline_ms = observation.deadline_ms
        self._loop.post(
            Submission(
                request_id=request_id,
                observation=observation,
                on_done=on_done,
                submitted_s=now_s,
                deadline_s=now_s + (deadline_ms or self._config.deadline_ms) * 1e-3,
                is_deadline_strict=deadline_ms is not None,
            )
        )
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        self._loop.post(Cancel(request_id))

    def control(self, command: Command) -> None:
        with self._owners_lock:
            owner = self._owners.get(command.session_id)
        if owner is None:
            raise FieldError("session_id", expected="an open session", got=repr(command.session_id))
        if not isinstance(command, OverridePrompt) and owner != command.robot_id:
            raise SessionConflictError(command.session_id, owner=owner, asked_by=command.robot_id)
        if isinstance(command, CloseSession):
            with self._owners_lock:
                self._owners.pop(command.session_id, None)
        self._loop.post(command)

    def stats(self) -> ServiceStats:
        if self._is_picture_old():
            self._loop.post(Refresh())
        return self._picture

    def _is_picture_old(self) -> bool:
        return self._clock.now_s() - self._picture.now_s > PICTURE_PERIOD_S

    def _claim(self, session_id: SessionId, robot_id: RobotId) -> None:
        with self._owners_lock:
            owner = self._owners.get(session_id)
            if owner is None:
                if len(self._owners) >= self._config.max_sessions:
                    raise OverloadedError(
                        "the table of sessions", limit=self._config.max_sessions, retry_after_s=1.0
                    )
                self._owners[session_id] = robot_id
            elif owner != robot_id:
                raise SessionConflictError(session_id, owner=owner, asked_by=robot_id)

    # --- on the loop's thread ------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._lanes.open()
            self._stage = "calibrating"
            self._calibrate()
            self._is_ready, self._stage = True, "serving"
        finally:
            if not self._is_ready:
                self._stage = "failed"
            self._refresh()
            self._opened.set()

    def _handle(self, message: Message) -> None:
        self._dispatcher.handle(message)
        if isinstance(message, Refresh) and self._is_picture_old():
            self._refresh()

    def _step(self) -> bool:
        return self._dispatcher.step()

    def _on_defect(self, error: Exception) -> None:
        self._dispatcher.fail_all(
            error if isinstance(error, GanglionError) else InternalError("the engine failed")
        )

    def _close(self) -> None:
        self._is_ready, self._stage = False, "stopped"
        self._dispatcher.fail_all(
            CancelledError("the server is stopping", next_step="reconnect when it is back")
        )
        self._refresh()
        self._lanes.close()

    def _refresh(self) -> None:
        self._picture = self._dispatcher.picture(is_ready=self._is_ready, stage=self._stage)

    def _calibrate(self) -> None:
        """Run made-up observations through the real path: warms kernels up and fills the cost table."""
        rng = np.random.default_rng(0)
        end_s = self._clock.now_s() + CALIBRATION_LIMIT_S
        session_id = SessionId("calibration")
        numbers = itertools.count()
        for num_rows in CALIBRATION_ROWS:
            if num_rows > self._config.max_rows:
                continue
            for row in range(num_rows):
                self._engine.submit(
                    RequestId(-1 - row),
                    self.spec.name,
                    self._made_up_observation(rng, session_id, next(numbers)),
                    deadline_s=0.0,
                )
            while self._engine.has_work:
                self._engine.step()
            for finished in self._engine.drain_finished():
                if isinstance(finished.outcome, GanglionError):
                    raise finished.outcome
            if self._clock.now_s() > end_s:
                break
        self._engine.close_session(session_id)
        self._engine.records.clear()

    def _made_up_observation(
        self, rng: np.random.Generator, session_id: SessionId, seq: int
    ) -> Observation:
        return Observation(
            session_id=session_id,
            robot_id=RobotId("calibration"),
            seq=seq,
            images={
                view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
                for view in self.spec.views
            },
            state=np.zeros(self.spec.state_dim, dtype=np.float32),
            prompt=f"calibration {seq}",
            seed=seq,
        )
