"""Outlook: how long requests under way will still take, by the cost model. Pure; called by `engine.step`.

Lets the pipeline give up what cannot be in time. Knows neither deadlines nor sessions.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ganglion.engine.work import Work
from ganglion.plan.cost import CostModel
from ganglion.types import Observation, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is left of a request, and all of one that started now beside the same others, microseconds."""

    request_id: RequestId
    seen: Observation
    may_see_newer: bool  # will it read a later observation's percept, if one comes?
    left_us: int
    full_us: int


def outlooks(
    works: Collection[Work], cost: CostModel, *, may_see_newer: Callable[[Work], bool]
) -> list[Outlook]:
    """Of each of `works`, in one batch with all whose stage is open too."""
    num_open: dict[tuple[str, str], int] = {}
    for work in works:
        for name, span in work.spans.items():
            key = (work.model, name)
            num_open[key] = num_open.get(key, 0) + (not span.is_done)
    unit_us = {
        (model, name): cost.estimate_us(model, name, num_rows=max(1, rows), num_units=1)
        for (model, name), rows in num_open.items()
    }
    return [
        Outlook(
            request_id=work.request_id,
            seen=work.seen,
            may_see_newer=may_see_newer(work),
            left_us=sum(s.num_left * unit_us[work.model, name] for name, s in work.spans.items()),
            full_us=sum(s.num_units * unit_us[work.model, name] for name, s in work.spans.items()),
        )
        for work in works
    ]
