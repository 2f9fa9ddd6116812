"""FakeService: a Service with scripted latency and outcomes, a thread and no model.

Used by tests of the edge, of clients and of the dashboard, and by `bench wire` as the policy that costs nothing.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from ganglion.clock import Clock, RealClock
from ganglion.errors import (
    CancelledError,
    FieldError,
    GanglionError,
    OverloadedError,
    SessionConflictError,
    SupersededError,
)
from ganglion.service import OnDone, Outcome
from ganglion.spec import PolicySpec, ViewSpec
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Command,
    Float32Array,
    Observation,
    OverridePrompt,
    RequestId,
    RobotId,
    ServiceStats,
    SessionId,
    SessionStats,
    Timing,
)

RETRY_AFTER_S = 0.1
MAX_REMEMBERED = 1_024  # observations and commands kept for a test to look at


def fake_spec(*, size: int = 64, horizon: int = 50, max_prefix: int = 0) -> PolicySpec:
    """A policy of two square views of `size` pixels, four state numbers and four action dimensions.

    `horizon` is at most 1,000. Prefixes of `max_prefix` rows are taken, and not continued.
    """
    return PolicySpec(
        name="fake",
        family="plain",
        version="fake-1",
        views=(
            ViewSpec(key="observation.images.corner", height=size, width=size),
            ViewSpec(key="observation.images.gripper", height=size, width=size),
        ),
        state_key="observation.state",
        state_dim=4,
        action_dim=4,
        horizon=horizon,
        num_flow_steps=0,
        control_hz=20.0,
        action_low=(-1.0,) * 4,
        action_high=(1.0,) * 4,
        max_prefix=max_prefix,
    )


@dataclass(slots=True, eq=False)
class _Waiting:
    request_id: RequestId
    observation: Observation
    on_done: OnDone
    submitted_s: float


@dataclass(slots=True, eq=False)
class _Session:
    robot_id: RobotId
    prompt: str = ""
    override: str | None = None
    num_chunks: int = 0
    num_superseded: int = 0
    num_errors: int = 0
    last_infer_ms: float = 0.0
    newest_seq: int = -1
    context_version: int = 0


class FakeService:
    """Answers every observation after `infer_s` with `fake_actions`, or with the next scripted outcome.

    `with FakeService() as service: ...`; requests are served one at a time by one thread.
    """

    def __init__(
        self,
        spec: PolicySpec | None = None,
        *,
        infer_s: float = 0.0,
        max_sessions: int = 256,
        is_ready: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self._spec = spec or fake_spec()
        self._infer_s, self._max_sessions = infer_s, max_sessions
        self._clock = clock or RealClock()
        column = np.arange(1_000 + self._spec.horizon) / 2_000
        rows = np.repeat(column[:, None], self._spec.action_dim, axis=1)
        self._ramp: Float32Array = rows.astype(np.float32)
        self._ramp.flags.writeable = False
        self._changed = threading.Condition()
        self._waiting: OrderedDict[RequestId, _Waiting] = OrderedDict()
        self._dropped: deque[tuple[_Waiting, Outcome]] = deque()
        self._running: _Waiting | None = None
        self._sessions: dict[SessionId, _Session] = {}
        self._script: deque[Outcome] = deque()
        self._is_ready, self._is_blocked, self._is_stopping = is_ready, False, False
        self._num_requests = self._num_results = self._num_errors = self._num_cancelled = 0
        self._thread = threading.Thread(target=self._run, name="fake-service", daemon=True)
        self.received: deque[Observation] = deque(maxlen=MAX_REMEMBERED)
        self.commands: deque[Command] = deque(maxlen=MAX_REMEMBERED)

    # --- script ------------------------------------------------------------------------------------------------

    def answer_next(self, outcomes: Iterable[Outcome]) -> None:
        """The next requests end in these outcomes instead of a chunk of `fake_actions`."""
        with self._changed:
            self._script.extend(outcomes)

    def block(self) -> None:
        """Act like a model in a step that does not end, until `unblock`."""
        with self._changed:
            self._is_blocked = True

    def unblock(self) -> None:
        """End what `block` began."""
        with self._changed:
            self._is_blocked = False
            self._changed.notify_all()

    def set_ready(self) -> None:
        """Finish loading."""
        with self._changed:
            self._is_ready = True

    def fake_actions(self, seq: int) -> Float32Array:
        """Row i of the chunk for observation `seq`: (i + seq % 1000) / 2000, the same in every dimension."""
        start = seq % 1_000
        return self._ramp[start : start + self._spec.horizon]

    # --- Service -----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicySpec:
        """The fake policy's spec."""
        return self._spec

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        """Queue one observation; newest wins within a session."""
        with self._changed:
            session = self._open(observation)
            self._num_requests += 1
            request_id = RequestId(self._num_requests)
            waiting = _Waiting(request_id, observation, on_done, self._clock.now_s())
            if observation.seq <= session.newest_seq:
                late = SupersededError(seq=observation.seq, newest_seq=session.newest_seq)
                self._dropped.append((waiting, late))
                session.num_superseded += 1
                self._changed.notify_all()
                return request_id
            session.newest_seq = observation.seq
            for old in [
                w
                for w in self._waiting.values()
                if w.observation.session_id == observation.session_id
            ]:
                newer = SupersededError(seq=old.observation.seq, newest_seq=observation.seq)
                self._drop(old, newer)
                session.num_superseded += 1
            self.received.append(observation)
            self._waiting[request_id] = waiting
            self._changed.notify_all()
            return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request; one that is running ends as cancelled too."""
        with self._changed:
            if (waiting := self._waiting.get(request_id)) is not None:
                self._drop(waiting, CancelledError(f"request {request_id} was cancelled"))
            elif self._running is not None and self._running.request_id == request_id:
                self._dropped.append((self._running, CancelledError("cancelled while running")))
                self._running = None
            self._changed.notify_all()

    def control(self, command: Command) -> None:
        """Reset, close or re-instruct a session."""
        with self._changed:
            self.commands.append(command)
            session = self._sessions.get(command.session_id)
            if session is None:
                raise FieldError("session_id", expected="an open session", got=command.session_id)
            if isinstance(command, OverridePrompt):
                session.override = command.prompt
                return
            if command.robot_id != session.robot_id:
                raise SessionConflictError(
                    command.session_id, owner=session.robot_id, asked_by=command.robot_id
                )
            for waiting in [
                w for w in self._waiting.values() if w.observation.session_id == command.session_id
            ]:
                self._drop(waiting, CancelledError("the session was reset or closed"))
            session.context_version += 1
            session.newest_seq = -1
            if isinstance(command, CloseSession):
                del self._sessions[command.session_id]
            self._changed.notify_all()

    def stats(self) -> ServiceStats:
        """The picture of now; no pool and no steps."""
        with self._changed:
            sessions = tuple(self._session_stats(*item) for item in self._sessions.items())
            return ServiceStats(
                now_s=self._clock.now_s(),
                is_ready=self._is_ready,
                stage="serving" if self._is_ready else "loading weights",
                sessions=sessions,
                pool=None,
                steps=(),
                num_requests=self._num_requests,
                num_results=self._num_results,
                num_errors=self._num_errors,
                num_cancelled=self._num_cancelled,
            )

    # --- life --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()

    # --- under the lock ----------------------------------------------------------------------------------------

    def _open(self, observation: Observation) -> _Session:
        session = self._sessions.get(observation.session_id)
        if session is None:
            if len(self._sessions) >= self._max_sessions:
                raise OverloadedError(
                    "sessions", limit=self._max_sessions, retry_after_s=RETRY_AFTER_S
                )
            session = self._sessions[observation.session_id] = _Session(observation.robot_id)
        elif session.robot_id != observation.robot_id:
            raise SessionConflictError(
                observation.session_id, owner=session.robot_id, asked_by=observation.robot_id
            )
        session.prompt = observation.prompt
        return session

    def _drop(self, waiting: _Waiting, error: GanglionError) -> None:
        del self._waiting[waiting.request_id]
        self._dropped.append((waiting, error))

    def _session_stats(self, session_id: SessionId, session: _Session) -> SessionStats:
        return SessionStats(
            session_id=session_id,
            robot_id=session.robot_id,
            prompt=session.override if session.override is not None else session.prompt,
            is_prompt_overridden=session.override is not None,
            num_chunks=session.num_chunks,
            num_superseded=session.num_superseded,
            num_deadline_misses=0,
            num_errors=session.num_errors,
            chunk_hz=0.0,
            last_infer_ms=session.last_infer_ms,
            last_seq=session.newest_seq,
            context_version=session.context_version,
            num_pages={},
        )

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (
                    self._dropped or self._is_stopping or (self._waiting and not self._is_blocked)
                ):
                    self._changed.wait()
                if self._is_stopping:
                    for waiting in list(self._waiting.values()):
                        self._drop(waiting, CancelledError("the service is stopping"))
                if not self._dropped and self._is_stopping:
                    return
                finished = self._dropped.popleft() if self._dropped else self._serve_next()
                if finished is not None:
                    self._count(*finished)
            if finished is not None:
                waiting, outcome = finished
                waiting.on_done(outcome)

    def _serve_next(self) -> tuple[_Waiting, Outcome] | None:
        """Serve the oldest request; None when it was cancelled meanwhile. Waits without the lock."""
        _, waiting = self._waiting.popitem(last=False)
        self._running = waiting
        start_s = self._clock.now_s()
        until_s = start_s + self._infer_s
        while (left_s := until_s - self._clock.now_s()) > 0 and self._running is waiting:
            self._changed.wait(left_s)
        if self._running is not waiting:
            return None
        self._running = None
        if self._script:
            return waiting, self._script.popleft()
        return waiting, self._chunk(waiting, start_s)

    def _chunk(self, waiting: _Waiting, start_s: float) -> ActionChunk:
        observation, now_s = waiting.observation, self._clock.now_s()
        session = self._sessions.get(observation.session_id)
        override = session.override if session is not None else None
        infer_ms = (now_s - waiting.submitted_s) * 1e3
        deadline_ms = observation.deadline_ms
        return ActionChunk(
            session_id=observation.session_id,
            obs_seq=observation.seq,
            obs_time_ns=observation.obs_time_ns,
            context_seq=observation.seq,
            actions=self.fake_actions(observation.seq),
            prompt=observation.prompt if override is None else override,
            is_prompt_overridden=override is not None,
            model_version=self._spec.version,
            context_version=session.context_version if session is not None else 0,
            batch_size=1,
            is_deadline_met=deadline_ms is None or infer_ms <= deadline_ms,
            timing=Timing(
                queue_ms=(start_s - waiting.submitted_s) * 1e3,
                perceive_ms=0.0,
                generate_ms=(now_s - start_s) * 1e3,
                wait_ms=0.0,
                infer_ms=infer_ms,
            ),
        )

    def _count(self, waiting: _Waiting, outcome: Outcome) -> None:
        session = self._sessions.get(waiting.observation.session_id)
        if isinstance(outcome, ActionChunk):
            self._num_results += 1
            if session is not None:
                session.num_chunks += 1
                session.last_infer_ms = outcome.timing.infer_ms
        elif isinstance(outcome, CancelledError):
            self._num_cancelled += 1
        else:
            self._num_errors += 1
            if session is not None:
                session.num_errors += 1
