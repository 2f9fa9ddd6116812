"""Sessions: a robot's contract, its newest observation, and what came of the earlier ones. Pure state.

Owned by `pipeline.local` on the loop's thread. Some observations of a session are in the engine, each at another flow
step, and one waits: newest wins.
"""

from collections import deque
from dataclasses import dataclass, field, replace

from ganglion.errors import FieldError, SupersededError
from ganglion.service import OnDone
from ganglion.types import Execution, Observation, RequestId, RobotId, SessionId

RATE_WINDOW_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """An observation on its way through the service."""

    request_id: RequestId
    observation: Observation
    on_done: OnDone
    submitted_s: float
    deadline_s: float
    is_deadline_strict: bool  # the robot named it; past it, unstarted work is dropped


@dataclass(slots=True, kw_only=True)
class Session:
    """One robot, agent or camera. The operator's instruction, when there is one, replaces the robot's own."""

    session_id: SessionId
    robot_id: RobotId
    prompt_override: str | None = None
    in_flight: dict[RequestId, Submission] = field(default_factory=dict)  # oldest first
    waiting: Submission | None = None
    newest_seq: int = -1
    newest_tick: int = -1  # largest `executed_until` so far
    prompt: str = ""
    execution: Execution = Execution.NAIVE
    num_chunks: int = 0
    num_superseded: int = 0
    num_deadline_misses: int = 0
    num_errors: int = 0
    last_infer_ms: float = 0.0
    _done_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def offer(self, submission: Submission) -> Submission | None:
        """Take an observation in; returns the one that it displaces from the waiting slot.

        Observations of a session only go forward: raises SupersededError when its number is not newer than what was
        seen, FieldError when its control tick is an older one.
        """
        seq, tick = submission.observation.seq, submission.observation.executed_until
        if seq <= self.newest_seq:
            self.num_superseded += 1
            raise SupersededError(seq=seq, newest_seq=self.newest_seq)
        if tick is not None:
            if tick < self.newest_tick:
                raise FieldError(
                    "executed_until",
                    expected=f"at least {self.newest_tick}, which observation {self.newest_seq} said",
                    got=f"{tick} from observation {seq}",
                    next_step='send "endpoint": "reset" when a new episode counts anew',
                )
            self.newest_tick = tick
        self.newest_seq = seq
        displaced, self.waiting = self.waiting, submission
        self.num_superseded += displaced is not None
        return displaced

    def take(self) -> Submission | None:
        """Move the waiting observation, if there is one, into flight, under the operator's instruction."""
        if self.waiting is None:
            return None
        submission, self.waiting = self.waiting, None
        if self.prompt_override is not None:
            submission = replace(
                submission, observation=replace(submission.observation, prompt=self.prompt_override)
            )
        self.prompt = submission.observation.prompt
        self.execution = submission.observation.execution
        self.in_flight[submission.request_id] = submission
        return submission

    def drain(self) -> list[Submission]:
        """Take everything out and begin to count anew (reset, close)."""
        self.newest_seq = self.newest_tick = -1
        taken = [*self.in_flight.values(), *([self.waiting] if self.waiting else ())]
        self.in_flight.clear()
        self.waiting = None
        return taken

    def count_chunk(self, now_s: float, infer_ms: float) -> None:
        """A chunk left for the robot."""
        self.num_chunks += 1
        self.last_infer_ms = infer_ms
        self._done_s.append(now_s)

    def chunk_hz(self, now_s: float) -> float:
        """Chunks per second over the last RATE_WINDOW_S seconds."""
        recent = [done_s for done_s in self._done_s if now_s - done_s <= RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        return (len(recent) - 1) / (recent[-1] - recent[0])
