"""Tally: what a fleet of robots did, in one line, in a few lines, and as JSON. Called by demo and run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ganglion.robots.episode import EpisodeResult
from ganglion.robots.fleet import FleetResult, RobotStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counts of all robots, running episodes included; success and latency are of ended episodes."""

    num_ticks: int
    num_misses: int
    num_holds: int
    num_episodes: int
    num_successes: int
    latency_p50_ms: float | None
    failures: tuple[str, ...]

    @classmethod
    def of(cls, result: FleetResult) -> "Tally":
        """Add everything up."""

        def total(count: str) -> int:
            return sum(robot.counts.get(count, 0) for robot in result.robots)

        latencies = [
            value
            for episode in result.episodes
            for value in episode.stages_ms.get("round_trip", [])
        ]
        return cls(
            num_ticks=total("ticks"),
            num_misses=total("misses"),
            num_holds=total("holds"),
            num_episodes=len(result.episodes),
            num_successes=sum(episode.is_success for episode in result.episodes),
            latency_p50_ms=median(latencies) if latencies else None,
            failures=tuple(f"{robot.robot_id}: {robot.failure}" for robot in result.failures),
        )

    @property
    def miss_rate(self) -> float:
        """Share of ticks without a fresh action."""
        return self.num_misses / self.num_ticks if self.num_ticks else 0.0

    def line(self) -> str:
        """`1,240 ticks, 0.2 % missed, 7 of 8 episodes solved`."""
        latency = (
            "" if self.latency_p50_ms is None else f", latency p50 {self.latency_p50_ms:.0f} ms"
        )
        return (
            f"{self.num_ticks:,} ticks, {self.miss_rate:.1%} missed, "
            f"{self.num_successes} of {counted(self.num_episodes, 'episode')} solved{latency}"
        )

    def to_json(self) -> dict[str, Any]:
        """Names carry units."""
        return {
            "num_ticks": self.num_ticks,
            "num_misses": self.num_misses,
            "miss_rate": self.miss_rate,
            "num_holds": self.num_holds,
            "num_episodes": self.num_episodes,
            "num_successes": self.num_successes,
            "latency_p50_ms": self.latency_p50_ms,
            "failures": list(self.failures),
        }


def counted(count: int, noun: str) -> str:
    """`1 arm`, `4 arms`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def report_failures(tally: Tally) -> None:
    """Robots that ended before their time, each with why and the next step."""
    for failure in tally.failures:
        what, _, advice = failure.partition("; next: ")
        print(what + (f"\n  next: {advice}" if advice else ""), file=sys.stderr)


def episode_line(result: EpisodeResult) -> str:
    """`arm-1  drawer-open  "open the drawer"  solved after 61 ticks`."""
    outcome = (
        f"solved after {result.success_tick} ticks"
        if result.success_tick is not None
        else f"not solved in {result.num_ticks} ticks"
    )
    return f'{result.robot_id}  {result.task}  "{result.prompt}"  {outcome}'


def by_task(episodes: Sequence[EpisodeResult]) -> dict[str, dict[str, int]]:
    """Task -> episodes and successes."""
    found: dict[str, dict[str, int]] = {}
    for episode in episodes:
        counts = found.setdefault(episode.task, {"num_episodes": 0, "num_successes": 0})
        counts["num_episodes"] += 1
        counts["num_successes"] += episode.is_success
    return found


def modes(robots: Sequence[RobotStatus]) -> str:
    """`arm-1 run, arm-2 hold`, for the live line."""
    return ", ".join(
        f"{robot.robot_id} {robot.mode or 'starting' if robot.is_alive else 'ended'}"
        for robot in robots
    )
