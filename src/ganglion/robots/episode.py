"""Episodes: what a robot is asked to do and what came of it, as plain data that travels as JSON lines.

Made by `robots.loop`, carried by `robots.runner` and `robots.fleet`, read by the CLI and the benches.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodePlan:
    """One episode: a world of the catalog, a seed, and an instruction in place of the task's own."""

    world: str
    seed: int
    prompt: str | None = None

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "EpisodePlan":
        return cls(**body)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True, kw_only=True)
class EpisodeResult:
    """One episode that ended. Counts are of this episode; a miss is defined in `robots.queue`.

    `ages_ms`: of the observation behind each executed action, when it was applied. `stages_ms`: samples by stage:
    render, round_trip (observation sent -> chunk received), server and its parts, lateness (of ticks).
    """

    robot_id: str
    world: str
    task: str
    seed: int
    prompt: str
    execution: str = ""  # how its chunks were executed: a name of `types.Execution`
    is_success: bool = False
    success_tick: int | None = None
    num_ticks: int = 0
    num_misses: int = 0
    num_holds: int = 0
    num_overruns: int = 0  # ticks that the robot's own process was too late for; they are misses
    num_chunks: int = 0
    num_refused: int = 0
    num_late: int = 0
    num_safe_stops: int = 0
    num_reconnects: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # by code
    wait_ms: float = 0.0  # for the first chunk, before the first tick
    run_s: float = 0.0  # first tick to last
    ages_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "EpisodeResult":
        return cls(**body)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def add_sample(self, stage: str, value_ms: float) -> None:
        """One more sample of a stage."""
        self.stages_ms.setdefault(stage, []).append(round(value_ms, 3))

    def add_error(self, code: str) -> None:
        """One more error answer."""
        self.errors[code] = self.errors.get(code, 0) + 1
