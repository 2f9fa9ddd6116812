"""Clock: time as an argument. Real for serving, simulated for tests; both monotonic, both in seconds and nanoseconds.

Passed into every part that waits or stamps. Knows nothing of who waits.
"""

import time
from typing import Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """A monotonic clock that can also wait. Its zero is arbitrary; never compare two machines' values."""

    def now_ns(self) -> int:
        """Monotonic time, nanoseconds."""
        ...

    def now_s(self) -> float:
        """Monotonic time, seconds."""
        ...

    def sleep_until(self, deadline_s: float) -> None:
        """Return when `now_s() >= deadline_s`; at once when that lies in the past."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def now_s(self) -> float:
        return time.monotonic_ns() * 1e-9

    def sleep_until(self, deadline_s: float) -> None:
        while (left_s := deadline_s - self.now_s()) > 0:
            time.sleep(left_s)


class SimulatedClock:
    """A clock that moves only when told to; `sleep_until` jumps there at once."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_ns = round(start_s * 1e9)

    def now_ns(self) -> int:
        return self._now_ns

    def now_s(self) -> float:
        return self._now_ns * 1e-9

    def sleep_until(self, deadline_s: float) -> None:
        self._now_ns = max(self._now_ns, round(deadline_s * 1e9))

    def advance(self, delta_s: float) -> None:
        """Move forward by `delta_s` seconds. Raises ValueError when negative: time never runs back."""
        if delta_s < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-delta_s} s")
        self._now_ns += round(delta_s * 1e9)
