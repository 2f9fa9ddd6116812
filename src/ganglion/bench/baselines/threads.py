"""Bare threads as a Service: workers that run the bare model on one request each, without engine, pages or deadlines.

One worker is the plain server that serves one request after the other; as many as there are requests are concurrency
that nobody controls (B2), as a framework's thread pool gives it. A session has one waiting request: newest wins, since
a queue that grows would be no baseline. Called by the benches. Knows no sockets.
"""

import itertools
import logging
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from ganglion.bench.baselines.bare import BareModel
from ganglion.clock import Clock, RealClock
from ganglion.errors import CancelledError, GanglionError, InternalError, SupersededError
from ganglion.models.base import Model
from ganglion.pipeline.act import ActionGuard
from ganglion.service import OnDone, Outcome
from ganglion.spec import PolicySpec
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Command,
    Float32Array,
    Observation,
    OverridePrompt,
    RequestId,
    ServiceStats,
    SessionId,
    Timing,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    request_id: RequestId
    observation: Observation
    on_done: OnDone
    submitted_s: float


class ThreadsService:
    """`num_workers` threads, each with `threads_each` threads of torch."""

    def __init__(
        self,
        model: Model,
        *,
        num_workers: int = 1,
        threads_each: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self._model, self._bare = model, BareModel(model)
        self._guard = ActionGuard(model.spec)
        self._threads_each, self._clock = threads_each, clock or RealClock()
        self._condition = threading.Condition()
        self._waiting: dict[SessionId, _Waiting] = {}
        self._order: deque[SessionId] = deque()  # first come, first served
        self._ids = itertools.count(1)
        self._is_open = False
        self._num_requests = self._num_results = self._num_errors = self._num_cancelled = 0
        self._workers = [
            threading.Thread(target=self._work, name=f"worker-{at}", daemon=True)
            for at in range(num_workers)
        ]

    def __enter__(self) -> Self:
        self._is_open = True
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._condition:
            self._is_open = False
            left = list(self._waiting.values())
            self._waiting.clear()
            self._order.clear()
            self._condition.notify_all()
        for waiting in left:
            waiting.on_done(CancelledError("the server is stopping"))
        for worker in self._workers:
            worker.join()

    # --- Service -----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicySpec:
        return self._model.spec

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        request_id = RequestId(next(self._ids))
        waiting = _Waiting(request_id, observation, on_done, self._clock.now_s())
        session_id = observation.session_id
        with self._condition:
            self._num_requests += 1
            displaced = self._waiting.get(session_id)
            if displaced is None:
                self._order.append(session_id)
            else:
                self._num_cancelled += 1
            self._waiting[session_id] = waiting
            self._condition.notify()
        if displaced is not None:
            error = SupersededError(seq=displaced.observation.seq, newest_seq=observation.seq)
            displaced.on_done(error)
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        with self._condition:
            found = next((w for w in self._waiting.values() if w.request_id == request_id), None)
            if found is not None:
                self._forget(found.observation.session_id)
        if found is not None:
            found.on_done(CancelledError("request was cancelled"))

    def control(self, command: Command) -> None:
        if isinstance(command, OverridePrompt):
            raise InternalError("the baseline knows no operators")
        with self._condition:
            found = self._waiting.get(command.session_id)
            if found is not None:
                self._forget(command.session_id)
        if found is not None:
            is_gone = isinstance(command, CloseSession)
            found.on_done(CancelledError(f"session was {'closed' if is_gone else 'reset'}"))

    def stats(self) -> ServiceStats:
        with self._condition:
            return ServiceStats(
                now_s=self._clock.now_s(),
                is_ready=self._is_open,
                stage="serving" if self._is_open else "stopped",
                sessions=(),
                pool=None,
                steps=(),
                num_requests=self._num_requests,
                num_results=self._num_results,
                num_errors=self._num_errors,
                num_cancelled=self._num_cancelled,
            )

    # --- workers -----------------------------------------------------------------------------------------------

    def _forget(self, session_id: SessionId) -> None:
        del self._waiting[session_id]
        self._order.remove(session_id)
        self._num_cancelled += 1

    def _work(self) -> None:
        torch.set_num_threads(self._threads_each)  # of this thread alone
        while (waiting := self._next()) is not None:
            outcome = self._outcome(waiting)
            with self._condition:
                is_good = isinstance(outcome, ActionChunk)
                self._num_results += is_good
                self._num_errors += not is_good
            waiting.on_done(outcome)

    def _next(self) -> _Waiting | None:
        with self._condition:
            self._condition.wait_for(lambda: self._order or not self._is_open)
            if not self._order:
                return None
            return self._waiting.pop(self._order.popleft())

    def _outcome(self, waiting: _Waiting) -> Outcome:
        start_s = self._clock.now_s()
        try:
            actions = self._guard.check(self._bare.infer([waiting.observation])[0])
        except GanglionError as error:
            return error
        except Exception:
            logger.exception("the bare model failed")
            return InternalError("the model failed on this observation")
        return self._chunk(waiting, actions, start_s, self._clock.now_s())

    def _chunk(
        self, waiting: _Waiting, actions: Float32Array, start_s: float, end_s: float
    ) -> ActionChunk:
        observation = waiting.observation
        infer_ms = (end_s - waiting.submitted_s) * 1e3
        deadline_ms = observation.deadline_ms
        return ActionChunk(
            session_id=observation.session_id,
            obs_seq=observation.seq,
            obs_time_ns=observation.obs_time_ns,
            context_seq=observation.seq,
            actions=actions,
            prompt=observation.prompt,
            is_prompt_overridden=False,
            model_version=self.spec.version,
            context_version=0,
            batch_size=1,
            is_deadline_met=deadline_ms is None or infer_ms <= deadline_ms,
            timing=Timing(
                queue_ms=(start_s - waiting.submitted_s) * 1e3,
                perceive_ms=0.0,
                generate_ms=(end_s - start_s) * 1e3,
                wait_ms=0.0,
                infer_ms=infer_ms,
            ),
        )
