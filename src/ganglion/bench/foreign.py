"""Foreign load: cores that other programs kept busy while something was measured. Called by benches. Reads Linux's /proc.

A busy neighbour makes work of several threads slower by far more than its share, so a figure says how busy it was.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ganglion.clock import Clock

_BUSY = (1, 2, 3, 6, 7, 8)  # user, nice, system, irq, softirq, steal of /proc/stat's first line
_OWN = (13, 14)  # utime, stime of /proc/PID/stat, counted from 0


class ForeignLoad:
    """Counts from when it is made; `ours`: processes, with their children, that are not foreign."""

    def __init__(self, clock: Clock, ours: Iterable[int], *, proc: Path = Path("/proc")) -> None:
        self._clock, self._ours, self._proc = clock, tuple(ours), proc
        self._start_s, self._start = clock.now_s(), self._foreign_ticks()

    def cores(self) -> float:
        """Cores kept busy by others since then; 0 where the kernel does not tell."""
        took_s = self._clock.now_s() - self._start_s
        ticks = self._foreign_ticks() - self._start
        return max(0.0, ticks / os.sysconf("SC_CLK_TCK") / took_s) if took_s > 0 else 0.0

    def _foreign_ticks(self) -> int:
        try:
            fields = (self._proc / "stat").read_text().split("\n", 1)[0].split()
            busy = sum(int(fields[at]) for at in _BUSY)
        except (OSError, ValueError, IndexError):
            return 0
        return busy - sum(self._ticks(pid) for pid in self._family())

    def _family(self) -> set[int]:
        """Our processes and their descendants, those that live."""
        found, fresh = set(self._ours), list(self._ours)
        while fresh:
            pid = fresh.pop()
            for children in (self._proc / str(pid) / "task").glob("*/children"):
                try:
                    born = {int(word) for word in children.read_text().split()} - found
                except (OSError, ValueError):
                    continue
                found |= born
                fresh += born
        return found

    def _ticks(self, pid: int) -> int:
        try:
            # the name stands in parentheses and may hold anything
            fields = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            return sum(int(fields[at - 2]) for at in _OWN)
        except (OSError, ValueError, IndexError):
            return 0
