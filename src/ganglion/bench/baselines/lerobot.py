"""LeRobot's asynchronous inference (B1), the robot's side, reimplemented from its `async_inference/robot_client.py`.

| rule | here |
|---|---|
| one action a tick from the front of the queue; none when it is empty | the same |
| an observation is sent when queue / chunk <= `chunk_size_threshold` (0.5) | the same |
| its timestep is that of the newest executed action; row i of the answer is for timestep + i | the same |
| rows of executed timesteps are dropped; where old and new overlap: 0.3 old + 0.7 new | the same |
| the server skips observations whose state moved less than 1.0 in robot units, unless the queue is empty | left out: Meta-World's state is in metres, so it would skip all |
| an observation every tick below the threshold | one at a time: the filter above is what thins them out |
| the server sleeps until 1/30 s has gone by | left out |

What is left out favours the baseline. The server's side, one queue of one observation, is one worker of
`baselines.threads`. Pure: told what time it is. Called by `bench.replay`.
"""

from dataclasses import dataclass

import numpy as np

from ganglion.types import Float32Array

THRESHOLD = 0.5
OLD_SHARE, NEW_SHARE = 0.3, 0.7  # "weighted_average", its default


@dataclass(frozen=True, slots=True)
class _TimedAction:
    action: Float32Array
    seen_s: float  # newest observation that went into it


class LeRobotQueue:
    """Timed actions by timestep; `chunk_rows` is LeRobot's `actions_per_chunk`."""

    def __init__(self, *, chunk_rows: int, max_age_s: float, threshold: float = THRESHOLD) -> None:
        self._chunk_rows, self._max_age_s, self._threshold = chunk_rows, max_age_s, threshold
        self._actions: dict[int, _TimedAction] = {}  # by timestep, rising
        self._newest = -1  # timestep of the newest executed action
        self._asked_timestep: int | None = None

    @property
    def num_left(self) -> int:
        """Actions in the queue."""
        return len(self._actions)

    def action(self, timestep: int) -> Float32Array | None:
        """What would be executed at `timestep`."""
        timed = self._actions.get(timestep)
        return None if timed is None else timed.action

    def tick(self, now_s: float) -> tuple[int, bool]:
        """Execute the front of the queue: misses, and whether to send an observation."""
        num_misses = 1
        if self._actions:
            timestep = next(iter(self._actions))
            timed = self._actions.pop(timestep)
            self._newest = timestep
            num_misses = int(now_s - timed.seen_s > self._max_age_s)
        is_short = len(self._actions) <= self._threshold * self._chunk_rows
        is_asking = is_short and self._asked_timestep is None
        if is_asking:
            self._asked_timestep = max(self._newest, 0)
        return num_misses, is_asking

    def offer(self, actions: Float32Array, seen_s: float, now_s: float) -> int:
        """A chunk came: merge it; misses that this makes, which is none."""
        assert self._asked_timestep is not None, "a chunk that nobody asked for"
        first, self._asked_timestep = self._asked_timestep, None
        merged: dict[int, _TimedAction] = {}
        for row, action in enumerate(actions[: self._chunk_rows]):
            timestep = first + row
            if timestep <= self._newest:
                continue
            old = self._actions.get(timestep)
            if old is not None:
                action = np.float32(OLD_SHARE) * old.action + np.float32(NEW_SHARE) * action
            merged[timestep] = _TimedAction(action, seen_s)
        self._actions = merged
        return 0

    def lose(self) -> None:
        """The request ended without a chunk: ask again."""
        self._asked_timestep = None
