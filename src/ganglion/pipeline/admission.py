"""Admission: how many requests are worth having under way at once. Called by `pipeline.dispatch`. Pure.

A wider batch brings more chunks per second up to a point that the cost model knows; past it, each further row only
makes all others later, while outside it an observation can still be replaced by a newer one. So the rest waits there,
and goes in by deadline (compare the admission of Clockwork, OSDI 2020). On a machine so slow that a wide batch would take
much of what an observation may be old, narrow ones serve some robots in time instead of all of them late.
"""

from collections.abc import Sequence

from ganglion.plan.cost import CostModel
from ganglion.spec import Stage
from ganglion.types import SpanKind

ENOUGH = 0.9  # of the highest rate
AGE_SHARE = (
    0.4  # of an observation's largest age that a batch may take: it also waits for the one before
)
LEAST_ROWS = 4  # where they are in time; so few batches of each width keep being measured


class Admission:
    """The narrowest batch that brings almost the highest rate of those that are soon done.

    `max_age_ms`: how old an observation may be when its first action is due.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        model: str,
        stages: Sequence[Stage],
        max_rows: int,
        num_lanes: int,
        max_age_ms: float,
    ) -> None:
        self._cost, self._model, self._stages = cost, model, tuple(stages)
        self._max_rows, self._num_lanes = max_rows, num_lanes
        self._max_us = AGE_SHARE * max_age_ms * 1e3

    def limit(self, num_flow_steps: int) -> int:
        """Requests under way, when each takes so many flow steps."""
        sizes = []
        num_rows = 1
        while num_rows <= self._max_rows * self._num_lanes:
            sizes.append(num_rows)
            num_rows *= 2
        times_us = {rows: max(1, self._us(rows, num_flow_steps)) for rows in sizes}
        in_time = [rows for rows in sizes if times_us[rows] <= self._max_us] or sizes[:1]
        enough = ENOUGH * max(rows / times_us[rows] for rows in in_time)
        narrowest = next(rows for rows in in_time if rows / times_us[rows] >= enough)
        return min(in_time[-1], max(LEAST_ROWS, narrowest))

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
