"""Measured cost of pieces, microseconds. Fed by the engine after each step, asked by the scheduler. Pure.

One table per stage: rows (powers of two) -> microseconds per unit, an exponential average of what was measured, linear
in between. So the scheduler's budget is in the machine's own time, whatever the model (compare the measured batch
latency tables of Clockwork, OSDI 2020).
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class CostModel(Protocol):
    """How long a piece will take."""

    def estimate_us(self, model: str, stage: str, *, num_rows: int, num_units: int) -> int:
        """Expected run time of one piece, microseconds."""
        ...

    def observe(
        self, model: str, stage: str, *, num_rows: int, num_units: int, run_us: float
    ) -> None:
        """A piece of this shape took `run_us`."""
        ...


class MeasuredCost:
    """Exponential averages of measured pieces; `prior_us` per row and unit where nothing was measured yet."""

    def __init__(self, *, prior_us: float = 1000.0, smoothing: float = 0.2) -> None:
        self._prior_us, self._smoothing = prior_us, smoothing
        self._unit_us: dict[tuple[str, str], dict[int, float]] = {}

    def estimate_us(self, model: str, stage: str, *, num_rows: int, num_units: int) -> int:
        table = self._unit_us.get((model, stage))
        if not table:
            return round(self._prior_us * num_rows * num_units)
        return round(interpolate(table, num_rows) * num_units)

    def observe(
        self, model: str, stage: str, *, num_rows: int, num_units: int, run_us: float
    ) -> None:
        table = self._unit_us.setdefault((model, stage), {})
        bucket = 1 << (num_rows - 1).bit_length()
        unit_us = run_us / num_units * (bucket / num_rows if num_rows > 1 else 1.0)
        known = table.get(bucket)
        table[bucket] = unit_us if known is None else known + self._smoothing * (unit_us - known)


def interpolate(table: Mapping[int, float], num_rows: int) -> float:
    """Unit cost at `num_rows`: linear between measured row counts, proportional beyond them."""
    below = max((rows for rows in table if rows <= num_rows), default=None)
    above = min((rows for rows in table if rows >= num_rows), default=None)
    if below is None:
        assert above is not None, "an empty cost table is handled by the caller"
        return table[above]
    if above is None:
        return table[below] * num_rows / below
    if above == below:
        return table[below]
    share = (num_rows - below) / (above - below)
    return table[below] + share * (table[above] - table[below])
