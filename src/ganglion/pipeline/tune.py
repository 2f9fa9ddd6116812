"""Tuner: how many chunks of one robot are under way at once, and how far apart. Called by `pipeline.dispatch`. Pure.

Sequentially a robot gets a chunk every L = t_p + K t_g(1). With n chunks under way one forward advances them all, so it
gets one every t_p + K t_g(n) / n, each of them L(n) old: degree buys rate with age (Auras, arXiv 2509.09560). What
the stages take is measured when the server starts, and ever after, by the engine's cost model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ganglion.config import PipelineConfig
from ganglion.plan.cost import CostModel
from ganglion.spec import Stage
from ganglion.types import SpanKind

GAIN_WORTH_IT = 1.03  # a chunk more under way must bring at least 3 % more chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What degree n brings each of some robots: chunks per second, and milliseconds from observation to chunk."""

    degree: int
    rate_hz: float
    latency_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The choice, and why. A launch follows when the newest chunk under way has done `steps_between` flow steps.

    0: when its perception is complete.
    """

    degree: int
    steps_between: int
    reason: str
    max_age_ms: float
    forecasts: tuple[Forecast, ...]


class Tuner:
    """Maximises the rate under a bound of age; or obeys a fixed degree."""

    def __init__(
        self,
        config: PipelineConfig,
        cost: CostModel,
        *,
        model: str,
        stages: Sequence[Stage],
        num_lanes: int,
    ) -> None:
        self._config, self._cost, self._model = config, cost, model
        self._perceive = tuple(stages[:-1])
        self._generate = stages[-1]
        self._num_lanes = num_lanes

    def pace(
        self, num_robots: int, *, num_flow_steps: int | None = None, max_degree: int = 0
    ) -> Pace:
        """The degree for so many robots, from what the stages take now.

        The quality ladder may ask for fewer flow steps than the policy has and, unless 0, bound the degree.
        """
        num_steps = self._num_steps_of(num_flow_steps)
        fixed = self._config.degree
        if not self._generate.is_divisible:
            return self._at(1, "this policy computes a chunk in one piece", (), num_steps)
        most = num_steps + (self._num_lanes > 1)
        limit = min(self._config.max_degree, most, max_degree or most)
        forecasts = tuple(
            self.forecast(n, num_robots, num_flow_steps=num_flow_steps) for n in range(1, limit + 1)
        )
        if fixed:
            reason = f"degree {fixed} by config"
            return self._at(min(fixed, most), reason, forecasts, num_steps)
        best = forecasts[0]
        for forecast in forecasts[1:]:
            is_fresh = forecast.latency_ms <= self._config.max_age_ms
            if is_fresh and forecast.rate_hz >= GAIN_WORTH_IT * best.rate_hz:
                best = forecast
        alone = f"{forecasts[0].rate_hz:.1f} chunks/s a robot at {forecasts[0].latency_ms:.0f} ms"
        reason = f"degree 1: {alone}; no other brings 3 % more"
        if best.degree > 1:
            reason = (
                f"degree {best.degree}: {best.rate_hz:.1f} chunks/s a robot at "
                f"{best.latency_ms:.0f} ms (degree 1: {alone}; "
                f"bound {self._config.max_age_ms:.0f} ms)"
            )
        return self._at(best.degree, reason, forecasts, num_steps)

    def forecast(
        self, degree: int, num_robots: int, *, num_flow_steps: int | None = None
    ) -> Forecast:
        """Steady state: each cycle perceives once for every robot and brings every chunk 1/n of its steps further.

        Where one chunk is perceived while the others are generated, a cycle takes as long as its perception, or as the
        lanes take for all its work.
        """
        num_robots = max(1, num_robots)
        num_steps = self._num_steps_of(num_flow_steps)
        between = self._steps_between(degree, num_steps)
        steps = max(1, between)
        depth = -(-num_steps // steps)
        generate_us = steps * self._step_us(depth * num_robots)
        perceive_us = self._perceive_us(num_robots)
        cycle_us = perceive_us + generate_us
        if between == 0:
            cycle_us = max(perceive_us, generate_us + perceive_us // self._num_lanes)
        latency_us = (depth + (between == 0)) * cycle_us
        return Forecast(degree=degree, rate_hz=1e6 / max(1, cycle_us), latency_ms=latency_us * 1e-3)

    def _steps_between(self, degree: int, num_steps: int) -> int:
        """Flow steps of the newest chunk before the next one is launched; 0: its perception is enough.

        With a chunk more under way than there are flow steps, one is perceived while the others are generated. On one
        lane that gains nothing.
        """
        if degree > num_steps and self._num_lanes > 1:
            return 0
        return -(-num_steps // degree)

    def _num_steps_of(self, num_flow_steps: int | None) -> int:
        """Flow steps that are run for a chunk: a warm start spares some."""
        num_steps = self._generate.num_units if num_flow_steps is None else num_flow_steps
        return max(1, num_steps - round(self._config.warm_start * num_steps))

    def _at(
        self, degree: int, reason: str, forecasts: tuple[Forecast, ...], num_steps: int
    ) -> Pace:
        return Pace(
            degree=degree,
            steps_between=self._steps_between(degree, num_steps),
            reason=reason,
            max_age_ms=self._config.max_age_ms,
            forecasts=forecasts,
        )

    def _perceive_us(self, num_rows: int) -> int:
        """Stages that another robot or request has done already cost nothing: instructions are the rule."""
        return sum(
            self._us(stage, num_rows) * stage.num_units
            for stage in self._perceive
            if not (stage.is_shared and stage.kind is SpanKind.PREFILL)
        )

    def _step_us(self, num_rows: int) -> int:
        return self._us(self._generate, num_rows)

    def _us(self, stage: Stage, num_rows: int) -> int:
        """Of one unit, its rows spread over the lanes."""
        rows = -(-num_rows // self._num_lanes)
        return self._cost.estimate_us(self._model, stage.name, num_rows=rows, num_units=1)
