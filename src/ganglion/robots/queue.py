"""Action queue: decides what an arm does at each control tick, also when the server is late, wrong or gone.

Called by `robots.loop`: chunks go in through `offer`, one command a tick comes out of `step`. Pure: knows neither sockets
nor worlds nor what time it is; it is told. Not a safety function: a robot needs a stop of its own.

    IDLE       no chunk yet; the arm holds                       -> RUN at the first good chunk
    RUN        executes the newest chunk, each slot at its tick  -> HOLD when it runs dry or three chunks in a row are bad
    HOLD       no slot for this tick; the arm holds              -> RUN at the next good chunk
    SAFE_STOP  no fresh chunk for `safe_stop_s`; latched         -> IDLE by `resume`, and by nothing else

Row i of a chunk is the action slot of one tick, of that tick only (t + i for the observation of tick t, unless the chunk was
made for a later start): a slot whose tick went by is never run later. A chunk only ever replaces chunks of older observations,
or of the same observation and an earlier request; until its first tick the plan before it runs on.
"""

from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice, zip_longest

import numpy as np

from ganglion.types import Float32Array

MISS_AGE_S = 0.25  # a tick whose action rests on an older observation is a miss
SAFE_STOP_S = 0.5
MAX_AGE_S = 1.0
MAX_REFUSED_IN_A_ROW = 3


class Mode(StrEnum):
    """What the arm is doing. The table is in the module's docstring."""

    IDLE = "idle"
    RUN = "run"
    HOLD = "hold"
    SAFE_STOP = "safe_stop"


class ActionKind(StrEnum):
    """What an action means; it decides what standing still is."""

    POSITION = "position"  # hold = the measured position
    VELOCITY = "velocity"  # hold = zero
    DELTA = "delta"  # hold = zero


class Verdict(StrEnum):
    """What became of a chunk."""

    ACCEPTED = "accepted"
    OUTDATED = (
        "outdated"  # a chunk of the same or a newer observation, or a new start, came before it
    )
    LATE = "late"  # too old an observation, or no slot left whose tick is still to come
    REFUSED = "refused"  # not finite, out of bounds or of another shape: the whole chunk
    STOPPED = "stopped"  # arrived during SAFE_STOP


@dataclass(frozen=True, slots=True, kw_only=True)
class Embodiment:
    """What the arm's actions are. `kept_dims` keep their last commanded value while holding (a closed gripper).

    `motion`: how the policy's state follows the actions of a VELOCITY or DELTA arm; the state of a POSITION arm follows
    by itself, as it is what was commanded. None: not known.
    """

    kind: ActionKind
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    kept_dims: tuple[int, ...] = ()
    motion: "StateMotion | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMotion:
    """One tick changes number i of the state by `per_action[i]` times number i of the action, within `low..high`."""

    per_action: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """Limits in time, all by the robot's own clock."""

    max_age_s: float = MAX_AGE_S  # chunks of older observations are dropped on arrival
    miss_age_s: float = MISS_AGE_S
    safe_stop_s: float = SAFE_STOP_S  # without a fresh chunk
    max_refused_in_a_row: int = MAX_REFUSED_IN_A_ROW
    old_share: float = 0.0  # of the plan so far, in the rows of a new chunk that overlap it


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Actions and the newest observation that they rest on. Row i of `actions` is for tick `start_tick + i`.

    `request`: number of the request that it answers; of two chunks of one observation the later request's wins.
    """

    actions: Float32Array
    obs_tick: int
    obs_s: float  # when the observation was taken
    version: str  # of the policy; another one empties the queue
    request: int = 0
    first_tick: int | None = None  # of row 0, where it is not the observation's

    @property
    def start_tick(self) -> int:
        return self.obs_tick if self.first_tick is None else self.first_tick

    @property
    def end_tick(self) -> int:
        """One after that of the last row."""
        return self.start_tick + len(self.actions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to apply at one tick. `obs_tick` and `age_s` say what it rests on; None while holding."""

    action: Float32Array
    mode: Mode
    is_miss: bool
    obs_tick: int | None
    age_s: float | None


@dataclass(slots=True, kw_only=True)
class QueueCounts:
    """Cumulative since the queue was made."""

    ticks: int = 0
    misses: int = 0  # ticks without an action whose observation is at most `miss_age_s` old
    holds: int = 0  # ticks at which the arm held
    accepted: int = 0
    outdated: int = 0
    late: int = 0
    refused: int = 0
    safe_stops: int = 0


class ActionQueue:
    """One arm's queue of actions. One thread."""

    def __init__(self, embodiment: Embodiment, config: QueueConfig | None = None) -> None:
        self._body, self._config = embodiment, config or QueueConfig()
        self._low = np.asarray(embodiment.action_low, np.float32)
        self._high = np.asarray(embodiment.action_high, np.float32)
        self._dim = len(embodiment.action_low)
        self._kept = list(embodiment.kept_dims)
        self._mode = Mode.IDLE
        self._chunks: deque[Chunk] = deque()  # each runs until the next one's first tick
        self._last_action: Float32Array | None = None
        self._held: Float32Array | None = None  # the position that a POSITION arm holds
        self._next_tick = 0
        self._min_obs_tick = 0  # chunks of older observations are not wanted any more
        self._newest = (-1, -1)  # observation and request of the last chunk taken
        self._fresh_s = 0.0  # when the last good chunk came
        self._refused_in_a_row = 0
        self.counts = QueueCounts()

    @property
    def mode(self) -> Mode:
        """What the arm does now."""
        return self._mode

    @property
    def next_tick(self) -> int:
        """The tick that the next `step` is for, at the earliest."""
        return self._next_tick

    def slots(self) -> Float32Array:
        """Actions left, the next tick's first, up to the first tick that has none."""
        parts, tick = [np.empty((0, self._dim), np.float32)], self._next_tick
        for chunk, following in zip_longest(self._chunks, islice(self._chunks, 1, None)):
            if chunk.start_tick > tick:
                break
            end_tick = chunk.end_tick if following is None else following.start_tick
            part = chunk.actions[tick - chunk.start_tick : max(tick, end_tick) - chunk.start_tick]
            parts.append(part)
            tick += len(part)
        return np.concatenate(parts)

    def offer(self, chunk: Chunk, *, now_s: float) -> Verdict:
        """Take a chunk in, or say why not. A chunk is taken or refused as a whole, never repaired."""
        verdict = self._judge(chunk, now_s)
        counts = self.counts
        match verdict:
            case Verdict.ACCEPTED:
                counts.accepted += 1
                self._refused_in_a_row = 0
                self._take(chunk)
                self._fresh_s = now_s
                self._mode = Mode.RUN
            case Verdict.OUTDATED:
                counts.outdated += 1
            case Verdict.LATE:
                counts.late += 1
            case Verdict.REFUSED:
                counts.refused += 1
                self._refused_in_a_row += 1
                if self._refused_in_a_row >= self._config.max_refused_in_a_row:
                    self._chunks.clear()  # a policy gone wrong: do not live on what it said before
            case Verdict.STOPPED:
                pass
        return verdict

    def is_good(self, chunk: Chunk, *, now_s: float) -> bool:
        """Is it valid, wanted and fresh enough to be executed, whatever the mode? Changes nothing."""
        return (
            self._is_wanted(chunk)
            and self._is_valid(chunk.actions)
            and not self._is_late(chunk, now_s)
        )

    def step(self, tick: int, *, now_s: float, measured: Float32Array | None = None) -> Command:
        """The command of control tick `tick`; ticks strictly rise. `measured`: where a POSITION arm is now."""
        assert tick >= self._next_tick, f"tick {tick} after tick {self._next_tick - 1}"
        self._next_tick = tick + 1
        self.counts.ticks += 1
        self._update_mode(now_s)
        if self._mode is not Mode.RUN:
            return self._hold(measured)
        chunk = self._chunks[0]
        age_s = now_s - chunk.obs_s
        is_miss = age_s > self._config.miss_age_s
        self.counts.misses += is_miss
        action = self._last_action = chunk.actions[tick - chunk.start_tick]
        self._held = None
        return Command(
            action=action, mode=self._mode, is_miss=is_miss, obs_tick=chunk.obs_tick, age_s=age_s
        )

    def count_overrun(self, num_ticks: int) -> None:
        """Ticks that went by while the robot's own process was held up: nothing was commanded at them."""
        self.counts.ticks += num_ticks
        self.counts.misses += num_ticks

    def fence(self) -> None:
        """From here on, only chunks of observations of ticks still to come count (after a reconnect)."""
        self._min_obs_tick = max(self._min_obs_tick, self._next_tick)

    def flush(self) -> None:
        """Drop every slot, and every chunk that is still under way (another server, another policy)."""
        self._chunks.clear()
        self.fence()

    def restart(self) -> None:
        """A new episode: IDLE until its first chunk. Does not leave SAFE_STOP."""
        self.flush()
        self._last_action = self._held = None
        self._refused_in_a_row = 0
        if self._mode is not Mode.SAFE_STOP:
            self._mode = Mode.IDLE

    def resume(self) -> None:
        """Leave SAFE_STOP. For a person or a supervisor that knows why the arm stopped."""
        if self._mode is Mode.SAFE_STOP:
            self._mode = Mode.IDLE
            self.flush()

    def _take(self, chunk: Chunk) -> None:
        """The new end of the plan. Older chunks that would begin after it never will."""
        self._newest = (chunk.obs_tick, chunk.request)
        if self._config.old_share:
            chunk = replace(chunk, actions=self._averaged(chunk))
        while self._chunks and self._chunks[-1].start_tick >= chunk.start_tick:
            self._chunks.pop()
        self._chunks.append(chunk)
        self._drop_past(self._next_tick)

    def _averaged(self, chunk: Chunk) -> Float32Array:
        """The chunk's rows, those that overlap the plan so far mixed with it (LeRobot's weighted average)."""
        first_tick = max(self._next_tick, chunk.start_tick)
        row = first_tick - chunk.start_tick
        old = self.slots()[first_tick - self._next_tick :][: len(chunk.actions) - row]
        actions = chunk.actions.copy()
        overlap = actions[row : row + len(old)]
        overlap += np.float32(self._config.old_share) * (old - overlap)
        return actions

    def _drop_past(self, tick: int) -> None:
        while len(self._chunks) > 1 and self._chunks[1].start_tick <= tick:
            self._chunks.popleft()

    def _judge(self, chunk: Chunk, now_s: float) -> Verdict:
        if self._mode is Mode.SAFE_STOP:
            return Verdict.STOPPED
        if not self._is_wanted(chunk):
            return Verdict.OUTDATED
        if not self._is_valid(chunk.actions):
            return Verdict.REFUSED
        if self._chunks and chunk.version != self._chunks[-1].version:
            self._chunks.clear()  # the old policy's plan ends here, even if the new one's is late
        if self._is_late(chunk, now_s):
            return Verdict.LATE
        assert chunk.obs_tick <= self._next_tick, f"chunk of tick {chunk.obs_tick}, not yet seen"
        return Verdict.ACCEPTED

    def _is_wanted(self, chunk: Chunk) -> bool:
        is_newer = (chunk.obs_tick, chunk.request) > self._newest
        return is_newer and chunk.obs_tick >= self._min_obs_tick

    def _is_late(self, chunk: Chunk, now_s: float) -> bool:
        is_too_old = now_s - chunk.obs_s > self._config.max_age_s
        return is_too_old or chunk.end_tick <= self._next_tick

    def _is_valid(self, actions: Float32Array) -> bool:
        if actions.dtype != np.float32 or actions.ndim != 2 or actions.shape[1] != self._dim:
            return False
        # false for NaN
        return len(actions) > 0 and bool(((actions >= self._low) & (actions <= self._high)).all())

    def _update_mode(self, now_s: float) -> None:
        if self._mode not in (Mode.RUN, Mode.HOLD):
            return
        if now_s - self._fresh_s >= self._config.safe_stop_s:
            self._mode = Mode.SAFE_STOP
            self._chunks.clear()
            self.counts.safe_stops += 1
            return
        tick = self._next_tick - 1
        self._drop_past(tick)
        chunk = self._chunks[0] if self._chunks else None
        has_slot = chunk is not None and chunk.start_tick <= tick < chunk.end_tick
        self._mode = Mode.RUN if has_slot else Mode.HOLD

    def _hold(self, measured: Float32Array | None) -> Command:
        self.counts.misses += 1
        self.counts.holds += 1
        if self._body.kind is ActionKind.POSITION:
            if self._held is None:  # once: an arm that follows its own measurement drifts
                assert measured is not None, "an arm of position actions holds where it is"
                self._held = np.clip(np.asarray(measured, np.float32), self._low, self._high)
            action = self._held.copy()
        else:
            action = np.zeros(self._dim, np.float32)
        if self._last_action is not None:
            action[self._kept] = self._last_action[self._kept]
        return Command(action=action, mode=self._mode, is_miss=True, obs_tick=None, age_s=None)
