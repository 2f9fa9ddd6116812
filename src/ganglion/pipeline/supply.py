"""Supply: when a robot runs dry of valid actions, and how long it has waited for chunks. Pure; one a session.

Owned by `pipeline.dispatch` on the loop's thread. A request's deadline is the time at which its robot's queue runs dry
(earliest deadline first by buffer exhaustion time: ROSA, arXiv 2607.01088); time spent dry, as a share of the time
spent executing, is the wait ratio (Kairos, arXiv 2605.11381). Knows observations and chunks by number and time only.
"""

from collections import OrderedDict
from dataclasses import dataclass

from ganglion.types import Execution, Observation

HALF_LIFE_S = 10.0  # of what the wait ratio remembers
MAX_REMEMBERED = 64  # observations; more of one robot are never under way
LEAST_ROOM = 0.2  # of the largest age; a robot that asks when it is almost dry gets all of the age to be answered in


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """The newest chunk: the observation that it rests on, and its rows."""

    seq: int
    tick: int | None
    received_s: float
    num_rows: int


class Supply:
    """What one robot still has to execute. All times are the server's, seconds."""

    def __init__(self) -> None:
        self._received_s: OrderedDict[int, float] = OrderedDict()
        self._newest: Observation | None = None
        self._sent: _Sent | None = None
        self._asked_s: float | None = None  # the first observation that no chunk answers yet
        self._counted_s: float | None = None  # waiting and executing are added up until here
        self._waited_s = self._executed_s = 0.0

    def receive(self, observation: Observation, now_s: float) -> None:
        """An observation came."""
        self._received_s[observation.seq] = now_s
        if len(self._received_s) > MAX_REMEMBERED:
            self._received_s.popitem(last=False)
        self._newest = observation
        if self._asked_s is None:
            self._asked_s = now_s

    def send(self, seen: Observation, *, num_rows: int, now_s: float) -> None:
        """A chunk that rests on `seen` goes to the robot."""
        self._count(now_s)
        received_s = self._received_s.get(seen.seq, now_s)
        if self._sent is None or seen.seq >= self._sent.seq:
            self._sent = _Sent(
                seq=seen.seq, tick=seen.executed_until, received_s=received_s, num_rows=num_rows
            )
        later = [at_s for seq, at_s in self._received_s.items() if seq > self._sent.seq]
        self._asked_s = min(later, default=None)

    def forget(self) -> None:
        """A new episode: what was sent is executed no more. The wait ratio stays."""
        self._received_s.clear()
        self._newest = self._sent = self._asked_s = self._counted_s = None

    @property
    def newest_sent_seq(self) -> int | None:
        """Number of the observation behind the newest chunk; None before the first."""
        return None if self._sent is None else self._sent.seq

    def is_overtaken(self, seq: int) -> bool:
        """Did a chunk that rests on a later observation go to the robot already?"""
        return self._sent is not None and self._sent.seq > seq

    def dry_s(self) -> float | None:
        """When the robot has no action left that it may execute; None when that is unknown.

        Its rows run out, or the observation behind them becomes older than the robot wants it (`deadline_ms`).
        """
        if self._sent is None or self._newest is None:
            return None
        ends = (self._rows_end_s(self._sent, self._newest), self._expires_s(self._sent))
        return min((end for end in ends if end is not None), default=None)

    def deadline_s(self, own_s: float) -> float:
        """Of a request of this robot: when it runs dry, or since when it waits for its first chunk.

        `own_s`, what the request itself says, counts where neither is known.
        """
        dry_s = self.dry_s()
        if dry_s is None and self._sent is None:
            dry_s = self._asked_s  # not the newest observation's: each new one would put it back
        return own_s if dry_s is None else dry_s

    def expires_s(self, seen: Observation) -> float | None:
        """When an action that rests on `seen` is too old for the robot; None when it did not say how old it may be."""
        received_s = self._received_s.get(seen.seq)
        if received_s is None or seen.deadline_ms is None:
            return None
        return received_s + seen.deadline_ms * 1e-3

    def pressure(self, seen: Observation, now_s: float) -> float | None:
        """Share of the time that there was for an answer which a chunk sent now has used; above 1 it is late.

        Counted from the first observation that no chunk answers yet: one that was displaced by a newer one waited too.
        None for a robot that did not say how old an observation may be.
        """
        if self._asked_s is None or seen.deadline_ms is None:
            return None
        age_s = seen.deadline_ms * 1e-3
        room_s = self.deadline_s(self._asked_s + age_s) - self._asked_s
        return (now_s - self._asked_s) / (room_s if room_s > LEAST_ROOM * age_s else age_s)

    def wait_ratio(self, now_s: float) -> float:
        """Time it waited for generation over time it executed, of about the last ten seconds."""
        self._count(now_s)
        tick_s = 1.0 / (self._newest.control_hz or 20.0) if self._newest else 0.05
        return self._waited_s / max(tick_s, self._executed_s)

    def _count(self, now_s: float) -> None:
        """Add up until now: dry and waiting for an answer, or executing. Dry and not asking is neither."""
        start_s = self._counted_s
        self._counted_s = now_s
        if start_s is None:
            start_s = now_s if self._asked_s is None else self._asked_s
        dry_s = self.dry_s()
        # a robot of unknown rate counts as executing once it has a chunk
        until_s = now_s if dry_s is None and self._sent is not None else dry_s
        executed_s = 0.0 if until_s is None else max(0.0, min(until_s, now_s) - start_s)
        waited_s = 0.0
        if self._asked_s is not None:
            waited_s = max(0.0, now_s - max(start_s + executed_s, self._asked_s))
        kept = 0.5 ** (max(0.0, now_s - start_s) / HALF_LIFE_S)
        self._executed_s = kept * self._executed_s + executed_s
        self._waited_s = kept * self._waited_s + waited_s

    def _rows_end_s(self, sent: _Sent, newest: Observation) -> float | None:
        """By the robot's own count of ticks where it has one, else by the time that went by."""
        if newest.execution is Execution.SYNC:  # such a robot asks when it is dry
            return self._received_s.get(newest.seq)
        if newest.control_hz is None:
            return None
        num_left, since_s = sent.num_rows, sent.received_s
        received_s = self._received_s.get(newest.seq)
        if sent.tick is not None and newest.executed_until is not None and received_s is not None:
            num_left, since_s = sent.tick + sent.num_rows - newest.executed_until, received_s
        return since_s + max(0, num_left) / newest.control_hz

    def _expires_s(self, sent: _Sent) -> float | None:
        if self._newest is None or self._newest.deadline_ms is None:
            return None
        return sent.received_s + self._newest.deadline_ms * 1e-3
