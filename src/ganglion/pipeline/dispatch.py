"""Dispatcher: from messages to engine work and from finished work to outcomes. On the loop's thread only.

Owns the sessions. Called by `pipeline.local` through the engine loop. Each submission gets exactly one outcome.
"""

import logging
from dataclasses import dataclass

from ganglion.clock import Clock
from ganglion.engine.step import Engine, Finished
from ganglion.engine.work import Work
from ganglion.errors import (
    CancelledError,
    DeadlineMissedError,
    ErrorCode,
    FieldError,
    GanglionError,
    SupersededError,
    UnsafeActionError,
)
from ganglion.metrics import Metrics
from ganglion.pipeline.act import ActionGuard
from ganglion.pipeline.gate import GateConfig
from ganglion.pipeline.gating import Gating
from ganglion.pipeline.session import Session, Submission
from ganglion.pipeline.triage import Triage
from ganglion.pipeline.tune import Pace, Tuner
from ganglion.service import Outcome
from ganglion.spec import PolicySpec
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Command,
    DegreeStats,
    Float32Array,
    OverridePrompt,
    PaceStats,
    RequestId,
    ResetSession,
    ServiceStats,
    SessionId,
    SessionStats,
    Timing,
)

logger = logging.getLogger(__name__)

TUNING_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Cancel:
    """Message: drop one request."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Refresh:
    """Message: make a new picture for `stats`."""


Message = Submission | Cancel | Refresh | Command


class Dispatcher:
    """Sessions in front of one engine: newest observation wins, operators may re-instruct, robots own their sessions."""

    def __init__(
        self,
        engine: Engine,
        spec: PolicySpec,
        clock: Clock,
        metrics: Metrics,
        tuner: Tuner,
        triage: Triage | None = None,
        gate: GateConfig | None = None,
    ) -> None:
        self._tuner, self._pace = tuner, tuner.pace(1)
        self._triage = triage or Triage(spec)
        self._next_tuning_s = 0.0
        self._engine, self._spec, self._clock, self._metrics = engine, spec, clock, metrics
        self._guard = ActionGuard(spec)
        self._gating = Gating(gate, spec, engine, metrics)
        self._sessions: dict[SessionId, Session] = {}
        self._open: dict[RequestId, tuple[Session, Submission]] = {}
        self._num_requests = self._num_results = self._num_errors = self._num_cancelled = 0

    # --- messages --------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """Apply one message."""
        match message:
            case Submission():
                self._offer(message)
            case Cancel(request_id):
                self._cancel(request_id)
            case ResetSession() | CloseSession():
                self._drop(message.session_id, is_gone=isinstance(message, CloseSession))
            case OverridePrompt():
                self._override(message)
            case Refresh():
                pass

    def step(self) -> bool:
        """One engine step and its outcomes; is there more to do?

        Sessions are admitted here and not as their messages come in, so that newest wins among all that arrived.
        """
        now_s = self._clock.now_s()
        self._give_up(now_s)
        rung = self._triage.rung
        is_other_rung = self._triage.decide(now_s) != rung
        if now_s >= self._next_tuning_s or is_other_rung:
            self._next_tuning_s = now_s + TUNING_PERIOD_S
            self._triage.tune()
            self._pace = self._tuner.pace(
                len(self._sessions),
                num_flow_steps=self._triage.num_flow_steps,
                max_degree=self._triage.rung.max_degree,
            )
        num_rooms = self._triage.num_rooms(self._engine.num_under_way, degree=self._pace.degree)
        for session in self._triage.in_order(tuple(self._sessions.values()), now_s):
            if num_rooms == 0:
                break
            if self._admit(session, now_s) and num_rooms is not None:
                num_rooms -= 1
        record = self._engine.step()
        if record is not None:
            self._metrics.observe_step(record)
        self._settle_all()
        return self.has_work

    @property
    def has_work(self) -> bool:
        """Is an observation in the engine or waiting for it?"""
        return self._engine.has_work or any(s.waiting for s in self._sessions.values())

    @property
    def has_sessions(self) -> bool:
        """Is a robot connected?"""
        return bool(self._sessions)

    def slack_us(self) -> int | None:
        """How long robots' work may stand still without a missed deadline; None: they have none."""
        if not self.has_work:
            return None
        return self._engine.slack_us() or 0

    def is_wanted(self, session_id: SessionId) -> bool:
        """Would an observation of this session go into the engine at once?"""
        session = self._sessions.get(session_id)
        return session is None or (session.waiting is None and self._may_launch(session))

    def fail_all(self, error: GanglionError) -> None:
        """End every open request with `error` (a defect, or the server is stopping)."""
        for request_id in list(self._open):
            self._cancel(request_id, error)

    def _offer(self, submission: Submission) -> None:
        self._num_requests += 1
        self._metrics.requests.inc()
        observation = submission.observation
        session = self._sessions.get(observation.session_id)
        if session is None:
            session = Session(session_id=observation.session_id, robot_id=observation.robot_id)
            self._sessions[observation.session_id] = session
        self._open[submission.request_id] = (session, submission)
        try:
            displaced = session.offer(submission)
        except GanglionError as error:
            self._answer(submission.request_id, error)
            return
        if displaced is not None:
            self._answer(
                displaced.request_id,
                SupersededError(seq=displaced.observation.seq, newest_seq=session.newest_seq),
            )
        self._triage.receive(submission)

    def _admit(self, session: Session, now_s: float) -> bool:
        """Send the session's waiting observation into the engine, if it is time to launch one; did it go in?"""
        if self._may_launch(session) and (submission := session.take()) is not None:
            late_s = now_s - submission.deadline_s
            if submission.is_deadline_strict and late_s > 0:
                del session.in_flight[submission.request_id]
                session.num_deadline_misses += 1
                self._triage.miss(now_s)
                deadline_ms = (submission.deadline_s - submission.submitted_s) * 1e3
                self._answer(
                    submission.request_id,
                    DeadlineMissedError(late_ms=late_s * 1e3, deadline_ms=deadline_ms),
                )
                return False
            try:
                observation = self._gating.admit(submission.observation, now_s)
            except FieldError as error:  # an image that is not what the policy takes
                del session.in_flight[submission.request_id]
                self._answer(submission.request_id, error)
                return False
            urgency = self._triage.urgency(submission, now_s)
            self._engine.submit(
                submission.request_id,
                self._spec.name,
                observation,
                deadline_s=urgency.deadline_s,
                num_flow_steps=self._triage.num_flow_steps,
                wait_ratio=urgency.wait_ratio,
            )
            return True
        return False

    def _give_up(self, now_s: float) -> None:
        """Cancel, between two steps, what is superseded or hopeless."""
        waiting = {
            session.session_id: session.waiting
            for session in self._sessions.values()
            if session.waiting is not None
        }
        is_pipelined = any(len(session.in_flight) > 1 for session in self._sessions.values())
        if not self._engine.has_work or not (waiting or is_pipelined):
            return
        for request_id, reason in self._triage.given_up(self._engine.outlooks(), waiting, now_s):
            if isinstance(reason, DeadlineMissedError) and request_id in self._open:
                self._open[request_id][0].num_deadline_misses += 1
                self._triage.miss(now_s)
            self._cancel(request_id, reason)

    def _may_launch(self, session: Session) -> bool:
        """Launches are clocked by flow steps: each follows when the one before it has done its share of them.

        So with degree n at most n chunks of a session are under way, evenly apart (Auras, arXiv 2509.09560).
        """
        if not session.in_flight:
            return True
        if len(session.in_flight) >= self._pace.degree:
            return False
        newest = next(reversed(session.in_flight))
        if self._pace.steps_between == 0:
            return self._engine.has_perceived(newest)
        return self._engine.num_flow_steps(newest) >= self._pace.steps_between

    def _cancel(self, request_id: RequestId, reason: GanglionError | None = None) -> None:
        if request_id not in self._open:
            return
        session, _ = self._open[request_id]
        if request_id in session.in_flight:
            self._engine.cancel(request_id, reason)
            self._settle_all()
        else:
            session.waiting = None
            self._answer(request_id, reason or CancelledError("request was cancelled"))

    def _drop(self, session_id: SessionId, *, is_gone: bool) -> None:
        session = self._sessions.get(session_id)
        if session is not None:
            for submission in session.drain():
                self._engine.cancel(submission.request_id)
                if submission.request_id in self._open:
                    self._answer(submission.request_id, CancelledError("session was reset"))
            self._engine.close_session(session_id)
            self._gating.forget(session_id)
            self._settle_all()
            self._triage.forget(session_id, is_gone=is_gone)
        if is_gone:
            self._sessions.pop(session_id, None)

    def _override(self, command: OverridePrompt) -> None:
        session = self._sessions.get(command.session_id)
        if session is not None:
            session.prompt_override = command.prompt
            self._metrics.prompt_overrides.inc()
            logger.info("session %s: prompt override %r", command.session_id, command.prompt)

    # --- outcomes --------------------------------------------------------------------------------------------

    def _settle_all(self) -> None:
        for finished in self._engine.drain_finished():
            self._settle(finished)

    def _settle(self, finished: Finished) -> None:
        work = finished.work
        if work.request_id not in self._open:
            return
        session, submission = self._open[work.request_id]
        session.in_flight.pop(work.request_id, None)
        outcome: Outcome
        if isinstance(finished.outcome, GanglionError):
            outcome = finished.outcome
        else:
            outcome = self._chunk(session, submission, work, finished.outcome)
        self._answer(work.request_id, outcome)

    def _chunk(
        self, session: Session, submission: Submission, work: Work, actions: Float32Array
    ) -> Outcome:
        try:
            checked = self._guard.check(actions)
        except UnsafeActionError as error:
            return error
        self._engine.execute(work, checked)
        self._gating.execute(session.session_id, checked)
        now_s = self._clock.now_s()
        self._triage.send(work.seen, num_rows=len(checked), now_s=now_s)
        for request_id, other in session.in_flight.items():
            urgency = self._triage.urgency(other, now_s)
            self._engine.reorder(
                request_id, deadline_s=urgency.deadline_s, wait_ratio=urgency.wait_ratio
            )
        infer_ms = (now_s - submission.submitted_s) * 1e3
        queue_ms = ((work.started_s or now_s) - submission.submitted_s) * 1e3
        perceive_ms, generate_ms = work.perceive_us * 1e-3, work.generate_us * 1e-3
        is_deadline_met = now_s <= submission.deadline_s
        session.num_deadline_misses += not is_deadline_met
        session.count_chunk(now_s, infer_ms)
        return ActionChunk(
            session_id=session.session_id,
            obs_seq=work.observation.seq,
            obs_time_ns=work.observation.obs_time_ns,
            context_seq=work.seen.seq,
            actions=checked,
            prompt=work.observation.prompt,
            is_prompt_overridden=session.prompt_override is not None
            and work.observation.prompt == session.prompt_override,
            model_version=self._spec.version,
            context_version=work.context_version,
            batch_size=work.batch_size,
            is_deadline_met=is_deadline_met,
            timing=Timing(
                queue_ms=queue_ms,
                perceive_ms=perceive_ms,
                generate_ms=generate_ms,
                wait_ms=max(0.0, infer_ms - queue_ms - perceive_ms - generate_ms),
                infer_ms=infer_ms,
            ),
        )

    def _answer(self, request_id: RequestId, outcome: Outcome) -> None:
        session, submission = self._open.pop(request_id)
        if isinstance(outcome, ActionChunk):
            self._num_results += 1
        elif outcome.code in (ErrorCode.CANCELLED, ErrorCode.SUPERSEDED):
            self._num_cancelled += 1
        else:
            self._num_errors += 1
            session.num_errors += 1
        self._metrics.observe_outcome(outcome)
        submission.on_done(outcome)

    # --- statistics ------------------------------------------------------------------------------------------

    def picture(self, *, is_ready: bool, stage: str) -> ServiceStats:
        """Everything that an operator sees, as of now."""
        now_s = self._clock.now_s()
        return ServiceStats(
            now_s=now_s,
            is_ready=is_ready,
            stage=stage,
            sessions=tuple(self._session_stats(s, now_s) for s in self._sessions.values()),
            pool=self._engine.ledger.stats(),
            steps=tuple(self._engine.records),
            num_requests=self._num_requests,
            num_results=self._num_results,
            num_errors=self._num_errors,
            num_cancelled=self._num_cancelled,
            pace=_pace_stats(self._pace),
            rung=self._triage.rung_name,
        )

    def _session_stats(self, session: Session, now_s: float) -> SessionStats:
        return SessionStats(
            session_id=session.session_id,
            robot_id=session.robot_id,
            prompt=session.prompt if session.prompt_override is None else session.prompt_override,
            is_prompt_overridden=session.prompt_override is not None,
            num_chunks=session.num_chunks,
            num_superseded=session.num_superseded,
            num_deadline_misses=session.num_deadline_misses,
            num_errors=session.num_errors,
            chunk_hz=session.chunk_hz(now_s),
            last_infer_ms=session.last_infer_ms,
            last_seq=session.newest_seq,
            context_version=self._engine.context_version(session.session_id),
            num_pages=self._engine.num_pages(session.session_id),
            in_flight=tuple(session.in_flight),
            execution=session.execution,
            wait_ratio=self._triage.wait_ratio(session.session_id, now_s),
        )


def _pace_stats(pace: Pace) -> PaceStats:
    return PaceStats(
        degree=pace.degree,
        reason=pace.reason,
        max_age_ms=pace.max_age_ms,
        forecasts=tuple(
            DegreeStats(degree=each.degree, rate_hz=each.rate_hz, latency_ms=each.latency_ms)
            for each in pace.forecasts
        ),
    )
