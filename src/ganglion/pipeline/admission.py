"""Admission: how many requests are worth having under way at once. Called by `pipeline.dispatch`. Pure.

A wider batch brings more chunks per second up to a point that the cost model knows; past it, each further row only
makes all others later, while outside it an observation can still be replaced by a newer one. So the rest waits there,
and goes in by deadline (compare the admission of Clockwork, OSDI 2020).
"""

from collections.abc import Sequence

from ganglion.plan.cost import CostModel
from ganglion.spec import Stage
from ganglion.types import SpanKind

ENOUGH = 0.9  # of the highest rate
LEAST_ROWS = 4  # so few cost no robot its freshness, and their batches keep being measured


class Admission:
    """The narrowest batch that brings almost the highest rate."""

    def __init__(
        self,
        cost: CostModel,
        *,
        model: str,
        stages: Sequence[Stage],
        max_rows: int,
        num_lanes: int,
    ) -> None:
        self._cost, self._model, self._stages = cost, model, tuple(stages)
        self._max_rows, self._num_lanes = max_rows, num_lanes

    def limit(self, num_flow_steps: int) -> int:
        """Requests under way, when each takes so many flow steps."""
        sizes = []
        num_rows = 1
        while num_rows <= self._max_rows * self._num_lanes:
            sizes.append(num_rows)
            num_rows *= 2
        rates = {rows: rows / max(1, self._us(rows, num_flow_steps)) for rows in sizes}
        enough = ENOUGH * max(rates.values())
        return max(LEAST_ROWS, next(rows for rows, rate in rates.items() if rate >= enough))

    def full_us(self, num_rows: int, num_flow_steps: int) -> int:
        """One whole request in a batch of so many, microseconds."""
        return self._us(num_rows, num_flow_steps)

    def _us(self, num_rows: int, num_flow_steps: int) -> int:
        per_lane = -(-num_rows // self._num_lanes)
        total_us = 0
        for stage in self._stages:
            if stage.is_shared and stage.kind is SpanKind.PREFILL:
                continue  # an instruction is known to the server but for the first time
            num_units = num_flow_steps if stage.is_divisible else stage.num_units
            total_us += self._cost.estimate_us(
                self._model, stage.name, num_rows=per_lane, num_units=num_units
            )
        return total_us
