"""Sense, infer, act (B0): the robot asks when it has nothing left to do, waits, executes some rows, and asks again.

The robot's side of it; its server is one worker of `baselines.threads`. Stands for the loop that most policies ship with
(openpi's and LeRobot's synchronous clients). Generous to it: a chunk that comes before the tick in which it was asked for
has ended is in time for that tick. Pure: told what time it is. Called by `bench.replay`.
"""

from ganglion.types import Float32Array


class SenseActQueue:
    """Executes `num_rows` of each chunk, each at its tick."""

    def __init__(self, *, num_rows: int, max_age_s: float) -> None:
        self._num_rows, self._max_age_s = num_rows, max_age_s
        self._num_left = 0
        self._asked_s: float | None = None  # observation under way
        self._seen_s = 0.0  # the observation that is executed
        self._is_tick_open = False  # this tick has no action yet, but its time is not over
        self.num_late_ticks = (
            0  # whose action was not there when they began: misses for a strict reading
        )

    def tick(self, now_s: float) -> tuple[int, bool]:
        """Begin a tick: misses that are certain now, and whether to send an observation."""
        num_misses = int(self._is_tick_open)  # the last one ended without an action
        self._is_tick_open = False
        if self._num_left:
            self._num_left -= 1
            return num_misses + (now_s - self._seen_s > self._max_age_s), False
        self._is_tick_open = True
        self.num_late_ticks += 1
        is_new = self._asked_s is None
        if is_new:
            self._asked_s = now_s
        return num_misses, is_new

    def offer(self, actions: Float32Array, seen_s: float, now_s: float) -> int:
        """A chunk came: its first row is executed at once; misses that this makes."""
        self._asked_s, self._seen_s = None, seen_s
        self._num_left = min(self._num_rows, len(actions)) - 1
        self._is_tick_open = False
        return int(now_s - seen_s > self._max_age_s)

    def lose(self) -> None:
        """The request ended without a chunk: ask again at the next tick."""
        self._asked_s = None
