"""Quality ladder: how a server that would miss gives each robot less work, and when it gives that back.

`Ladder` is what `ganglion bench ladder` measured: rungs from the best quality down, each with its success and its
cost. `LadderRouter` moves along it: called by `pipeline.dispatch` with what each chunk used of its time, on the loop's
thread. Down at once and before a miss, up one rung after a quiet while. Pure but for reading the file. Knows
neither engine nor sessions.
"""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganglion.errors import ConfigError
from ganglion.spec import PolicySpec

LEAST_SUCCESS_SHARE = 0.95  # of the best rung's; what loses more is not offered
DOWN_PRESSURE = 0.7  # of the time there was for an answer: past it the next hiccup is a miss
UP_PRESSURE = 0.6  # forecast for the rung above
DOWN_WINDOW_S, DOWN_SHARE, LEAST_SAMPLES = 0.6, 0.2, 3
DWELL_S = 0.4  # after a move, until its effect is measured
QUIET_S, MAX_QUIET_S = 3.0, 48.0
RELAPSE_S = 8.0  # down again so soon after going up: the next quiet while must be twice as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One quality: flow steps of a chunk, chunks of one robot under way at once (0: as the tuner likes).

    `success_rate` and `chunk_ms` (of one chunk in a full batch) as measured offline.
    """

    num_flow_steps: int
    max_degree: int = 0
    success_rate: float = 1.0
    chunk_ms: float = 0.0

    @property
    def name(self) -> str:
        """For people: "3 flow steps"."""
        steps = f"{self.num_flow_steps} flow step" + ("" if self.num_flow_steps == 1 else "s")
        return steps if not self.max_degree else f"{steps}, degree <= {self.max_degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Rungs, the best first; each further one takes less time."""

    rungs: tuple[Rung, ...]

    def __post_init__(self) -> None:
        assert self.rungs, "a ladder without rungs"

    @classmethod
    def of(cls, spec: PolicySpec) -> "Ladder":
        """One rung, the checkpoint's own: what nobody measured is not offered."""
        return cls(rungs=(Rung(num_flow_steps=max(1, spec.num_flow_steps)),))


def read_ladder(path: Path, spec: PolicySpec) -> Ladder:
    """The ladder that `ganglion bench ladder` wrote for the policy of `spec`.

    Rungs below LEAST_SUCCESS_SHARE of the best rung's success are left out. Raises ConfigError for a file that is
    none, or one that was measured with another policy.
    """
    try:
        detail = json.loads(path.read_text())["detail"]
        model_version = detail["model_version"]
        rungs = tuple(_rung(raw) for raw in detail["rungs"])
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", next_step="run `ganglion bench ladder`, or name no ladder"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a result of bench ladder: {error!r}",
            next_step="run `ganglion bench ladder`",
        ) from error
    if model_version != spec.version:
        raise ConfigError(
            f"{path}: measured with version {model_version!r}, served is {spec.version!r}",
            next_step="run `ganglion bench ladder` with this policy",
        )
    usable = tuple(rung for rung in rungs if 0 < rung.num_flow_steps <= spec.num_flow_steps)
    if not usable:
        return Ladder.of(spec)
    best = max(rung.success_rate for rung in usable)
    kept = (rung for rung in usable if rung.success_rate >= LEAST_SUCCESS_SHARE * best)
    return Ladder(rungs=tuple(sorted(kept, key=lambda rung: -rung.num_flow_steps)))


def _rung(raw: Any) -> Rung:
    return Rung(
        num_flow_steps=int(raw["num_flow_steps"]),
        max_degree=int(raw["max_degree"]),
        success_rate=float(raw["success_rate"]),
        chunk_ms=float(raw["chunk_ms"]),
    )


class LadderRouter:
    """Which rung now. Pressure 1.0: a chunk came just when its robot ran dry."""

    def __init__(self, ladder: Ladder) -> None:
        self._rungs = ladder.rungs
        self._at = 0
        self._samples: deque[tuple[float, float]] = deque(maxlen=4096)  # (when, pressure)
        self._moved_s = self._quiet_since_s = float("-inf")
        self._rose_s = float("-inf")
        self._quiet_s = QUIET_S
        self.num_moves = 0

    @property
    def rung(self) -> Rung:
        """The one that new requests get."""
        return self._rungs[self._at]

    @property
    def has_choice(self) -> bool:
        """Is there more than one rung?"""
        return len(self._rungs) > 1

    def observe(self, pressure: float, now_s: float) -> None:
        """A chunk was sent, or a request given up, after this share of the time that there was for it."""
        self._samples.append((now_s, pressure))

    def decide(self, now_s: float) -> Rung:
        """Move if it is time to; the rung from now on."""
        if not self.has_choice or now_s - self._moved_s < DWELL_S:
            return self.rung
        recent = self._pressures(max(now_s - DOWN_WINDOW_S, self._moved_s))
        if len(recent) >= LEAST_SAMPLES and _high(recent, DOWN_SHARE) > DOWN_PRESSURE:
            self._quiet_since_s = now_s
            if self._at + 1 < len(self._rungs):
                if now_s - self._rose_s < RELAPSE_S:
                    self._quiet_s = min(MAX_QUIET_S, 2 * self._quiet_s)
                self._move(self._at + 1, now_s)
        elif self._at and now_s - max(self._quiet_since_s, self._moved_s) >= self._quiet_s:
            calm = self._pressures(now_s - self._quiet_s)
            if not calm or _high(calm, 0.05) * self._growth() < UP_PRESSURE:
                self._move(self._at - 1, now_s)
                self._rose_s = now_s
            else:
                self._quiet_since_s = now_s
        elif now_s - self._rose_s > 4 * MAX_QUIET_S:
            self._quiet_s = QUIET_S
        return self.rung

    def _move(self, at: int, now_s: float) -> None:
        self._at, self._moved_s = at, now_s
        self._quiet_since_s = now_s
        self._samples.clear()
        self.num_moves += 1

    def _growth(self) -> float:
        """How many times the work of this rung the one above is."""
        here, above = self._rungs[self._at], self._rungs[self._at - 1]
        if here.chunk_ms > 0 and above.chunk_ms > 0:
            return above.chunk_ms / here.chunk_ms
        return above.num_flow_steps / here.num_flow_steps

    def _pressures(self, since_s: float) -> list[float]:
        return [pressure for at_s, pressure in self._samples if at_s >= since_s]


def _high(values: list[float], share: float) -> float:
    """The value that only `share` of them exceed."""
    return sorted(values)[max(0, len(values) - 1 - int(share * len(values)))]
