"""Triage: which robot's observation goes into the engine next, which request need not go on, how much work each gets.

Owned by `pipeline.dispatch`, on the loop's thread. Pure: sees supplies, waiting observations and what is left of each
request; decides by deadline and wait ratio, and moves along the quality ladder. Cancels nothing itself.

| request under way | is given up between two steps when |
|---|---|
| superseded | its robot got a chunk that rests on a later observation, and it will see none later itself |
| hopeless | it would be done only when what it rests on is too old, a newer observation waits and would be in time |
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ganglion.engine.outlook import Outlook
from ganglion.errors import DeadlineMissedError, GanglionError, SupersededError
from ganglion.pipeline.admission import Admission
from ganglion.pipeline.ladder import Ladder, LadderRouter, Rung
from ganglion.pipeline.session import Session, Submission
from ganglion.pipeline.supply import Supply
from ganglion.spec import PolicySpec
from ganglion.types import Observation, RequestId, SessionId

MISSED_PRESSURE = 1.5  # that a request which was given up counts with


@dataclass(frozen=True, slots=True, kw_only=True)
class Urgency:
    """What orders a request: when its robot runs dry (Clock seconds), and how long that robot has waited."""

    deadline_s: float
    wait_ratio: float


class Triage:
    """One for all sessions. Without `admission` everything goes in at once; without `ladder` there is one rung."""

    def __init__(
        self,
        spec: PolicySpec,
        *,
        admission: Admission | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        self._admission = admission
        self._most_flow_steps = max(1, spec.num_flow_steps)
        self._router = LadderRouter(ladder or Ladder.of(spec))
        self._supplies: dict[SessionId, Supply] = {}
        self._given_up: set[SessionId] = set()  # no chunk since a request of theirs was given up
        self._max_under_way: int | None = None

    @property
    def rung(self) -> Rung:
        """What new requests get."""
        return self._router.rung

    @property
    def num_flow_steps(self) -> int | None:
        """Of new requests; None: as many as the policy has."""
        num_flow_steps = self._router.rung.num_flow_steps
        return None if num_flow_steps == self._most_flow_steps else num_flow_steps

    @property
    def rung_name(self) -> str | None:
        """For people; None when the ladder has one rung only."""
        return self._router.rung.name if self._router.has_choice else None

    def wait_ratio(self, session_id: SessionId, now_s: float) -> float:
        """Of one robot; 0 for one that never asked."""
        supply = self._supplies.get(session_id)
        return supply.wait_ratio(now_s) if supply else 0.0

    # --- what happens ----------------------------------------------------------------------------------------

    def receive(self, submission: Submission) -> None:
        """An observation came in."""
        seen = submission.observation
        self._supply(seen.session_id).receive(seen, submission.submitted_s)

    def send(self, seen: Observation, *, num_rows: int, now_s: float) -> None:
        """A chunk that rests on `seen` goes to its robot."""
        supply = self._supply(seen.session_id)
        pressure = supply.pressure(seen, now_s)
        if pressure is not None:
            self._router.observe(pressure, now_s)
        supply.send(seen, num_rows=num_rows, now_s=now_s)
        self._given_up.discard(seen.session_id)

    def miss(self, now_s: float) -> None:
        """A request ended past its deadline, before a chunk was made."""
        self._router.observe(MISSED_PRESSURE, now_s)

    def forget(self, session_id: SessionId, *, is_gone: bool) -> None:
        """A new episode of the robot, or its end."""
        self._given_up.discard(session_id)
        if is_gone:
            self._supplies.pop(session_id, None)
        elif session_id in self._supplies:
            self._supplies[session_id].forget()

    def tune(self) -> None:
        """The costs have moved: how many requests under way are worth it now?"""
        if self._admission is not None:
            self._max_under_way = self._admission.limit(self.rung.num_flow_steps)

    # --- what to do ------------------------------------------------------------------------------------------

    def decide(self, now_s: float) -> Rung:
        """The rung from now on."""
        return self._router.decide(now_s)

    def urgency(self, submission: Submission, now_s: float) -> Urgency:
        """Of one request, by what its robot still has to execute."""
        supply = self._supply(submission.observation.session_id)
        return Urgency(
            deadline_s=supply.deadline_s(submission.deadline_s),
            wait_ratio=supply.wait_ratio(now_s),
        )

    def in_order(self, sessions: Sequence[Session], now_s: float) -> list[Session]:
        """Sessions whose observation waits, the most urgent first."""
        keyed = []
        for session in sessions:
            if session.waiting is not None:
                urgency = self.urgency(session.waiting, now_s)
                keyed.append((urgency.deadline_s, -urgency.wait_ratio, session))
        keyed.sort(key=lambda item: item[:2])
        return [session for _, _, session in keyed]

    def num_rooms(self, num_under_way: int, *, degree: int) -> int | None:
        """How many more may go in; None: no limit. One robot alone always gets its `degree` of chunks under way."""
        if self._max_under_way is None:
            return None
        return max(0, max(self._max_under_way, degree) - num_under_way)

    def given_up(
        self,
        outlooks: Sequence[Outlook],
        waiting: dict[SessionId, Submission],
        now_s: float,
    ) -> list[tuple[RequestId, GanglionError]]:
        """Requests under way that need not go on, and why. `waiting`: the newer observation of each session."""
        found: list[tuple[RequestId, GanglionError]] = []
        for outlook in outlooks:
            seen = outlook.seen
            supply = self._supplies.get(seen.session_id)
            if supply is None:
                continue
            if supply.is_overtaken(seen.seq) and not outlook.may_see_newer:
                assert supply.newest_sent_seq is not None, "overtaken by nothing"
                error = SupersededError(seq=seen.seq, newest_seq=supply.newest_sent_seq)
                found.append((outlook.request_id, error))
                continue
            newer = waiting.get(seen.session_id)
            expires_s = supply.expires_s(seen)
            if newer is None or expires_s is None or seen.session_id in self._given_up:
                continue
            late_s = now_s + outlook.left_us * 1e-6 - expires_s
            is_better = now_s + outlook.full_us * 1e-6 < newer.deadline_s
            if late_s > 0 and is_better and newer.observation.seq > seen.seq:
                self._given_up.add(seen.session_id)
                deadline_ms = seen.deadline_ms or 0.0
                found.append(
                    (
                        outlook.request_id,
                        DeadlineMissedError(late_ms=late_s * 1e3, deadline_ms=deadline_ms),
                    )
                )
        return found

    def _supply(self, session_id: SessionId) -> Supply:
        supply = self._supplies.get(session_id)
        if supply is None:
            supply = self._supplies[session_id] = Supply()
        return supply
