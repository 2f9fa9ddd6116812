"""Scheduler: which rows advance by how many units in the next step. Pure ints: sees cursors and deadlines only.

Called by `engine.step`. Earliest deadline first, and among about equal deadlines the robot that waited longest; rows of
one stage batch together, from different robots and at different cursors. Within a step, stages whose inputs an earlier
wave of the same step computes follow at once, so an idle server answers in one step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ganglion.engine.work import PieceOrder, WorkView
from ganglion.plan.cost import CostModel
from ganglion.spec import Stage
from ganglion.types import RequestId, SpanKind

WIDE_ROWS = 8  # requests under way: from here on throughput goes before the latency of one


@runtime_checkable
class Scheduler(Protocol):
    """Turns waiting work into the pieces of one step."""

    def plan(self, view: Sequence[WorkView], budget_us: int) -> tuple[PieceOrder, ...]:
        """Pieces in wave order whose expected time fits `budget_us`; at least one when there is work."""
        ...


TIE_US = 10_000  # deadlines in the same 10 ms count as equal: less than a control tick is noise


@dataclass(frozen=True, slots=True)
class _Progress:
    """One request while a plan is made: [0, cursors[i]) of stage i's ends[i] units are computed or planned."""

    cursors: list[int]
    ends: tuple[int, ...]

    def is_done(self, at: int) -> bool:
        return self.cursors[at] == self.ends[at]


class DeadlineScheduler:
    """Earliest deadline first within a budget of microseconds (compare EDF in Liu and Layland, 1973; Clockwork).

    A request's deadline is the time at which its robot runs dry. Who has waited longer for chunks, as a share of the
    time spent executing them, goes first among equals (wait ratio: Kairos, arXiv 2605.11381).
    """

    def __init__(
        self,
        stages: Mapping[str, tuple[Stage, ...]],
        cost: CostModel,
        *,
        max_rows: int,
        num_lanes: int,
    ) -> None:
        self._stages, self._cost = stages, cost
        self._max_rows, self._num_lanes = max_rows, num_lanes
        self._index = {
            model: {stage.name: at for at, stage in enumerate(graph)}
            for model, graph in stages.items()
        }

    def plan(self, view: Sequence[WorkView], budget_us: int) -> tuple[PieceOrder, ...]:
        ordered = sorted(view, key=_urgency)
        progress = {work.request_id: self._progress(work) for work in ordered}
        orders: list[PieceOrder] = []
        left_us, wave = budget_us, 0
        while left_us > 0:
            placed = self._plan_wave(ordered, progress, left_us, wave, is_first=not orders)
            if not placed:
                break
            for order in placed:
                at = self._index[order.model][order.stage.name]
                for request_id in order.rows:
                    progress[request_id].cursors[at] += order.num_units
            orders += placed
            left_us -= _wave_us(placed)
            wave += 1
        return tuple(orders)

    def _progress(self, work: WorkView) -> _Progress:
        ends = work.num_units or tuple(stage.num_units for stage in self._stages[work.model])
        return _Progress(list(work.cursors), ends)

    def _plan_wave(
        self,
        ordered: Sequence[WorkView],
        progress: Mapping[RequestId, _Progress],
        budget_us: int,
        wave: int,
        *,
        is_first: bool,
    ) -> list[PieceOrder]:
        placed: list[PieceOrder] = []
        lane_us = [0] * self._num_lanes
        groups, is_joined = self._ready(ordered, progress)
        for (model, at), ready in groups.items():
            stage, rows = self._stages[model][at], ready[: self._max_rows]
            is_generation = stage.kind is SpanKind.DENOISE
            if is_joined and is_generation and all(lane_us):
                break  # the next wave's batch has the rows too whose perception is placed here
            counts = self._spread(model, stage, len(rows), lane_us)
            # lanes with nothing to perceive generate meanwhile: a step at least, and no longer than that takes
            is_beside = is_joined and is_generation and any(lane_us)
            is_forced = is_beside or (is_first and not placed)
            if not is_forced and not self._fits(
                model, stage, rows, at, progress, counts, lane_us, budget_us
            ):
                continue
            until_us = max(lane_us) if is_beside else budget_us
            start = 0
            for lane, count in counts.items():
                share = rows[start : start + count]
                left_us = until_us - lane_us[lane]
                order = self._order(model, stage, share, at, progress, left_us, wave, lane)
                lane_us[lane] += order.cost_us
                placed.append(order)
                start += count
        return placed

    def _ready(
        self, ordered: Sequence[WorkView], progress: Mapping[RequestId, _Progress]
    ) -> tuple[dict[tuple[str, int], list[RequestId]], bool]:
        """Rows by stage, both in deadline order: a stage stands where its most urgent row stands.

        The second result: perception goes before generation, whose batch its rows then join. So it is where a robot's
        newer observation joins its chunks under way, which shall see it, and where so much waits that only wide
        batches keep up. Else robots do not wait for each other's perception.
        """
        groups: dict[tuple[str, int], list[RequestId]] = {}
        is_joined = len(ordered) >= WIDE_ROWS
        for work in ordered:
            stages, index = self._stages[work.model], self._index[work.model]
            row = progress[work.request_id]
            for at, stage in enumerate(stages):
                is_open = not row.is_done(at)
                if is_open and all(row.is_done(index[name]) for name in stage.reads):
                    groups.setdefault((work.model, at), []).append(work.request_id)
                    is_joined |= work.is_joining and stage.kind is not SpanKind.DENOISE
        if is_joined:
            last = sorted(
                groups, key=lambda at: self._stages[at[0]][at[1]].kind is SpanKind.DENOISE
            )
            groups = {at: groups[at] for at in last}
        return groups, is_joined

    def _spread(
        self, model: str, stage: Stage, num_rows: int, lane_us: Sequence[int]
    ) -> dict[int, int]:
        """Lane -> rows of the stage, so that the last lane is done as early as can be."""
        if len(lane_us) == 1:
            return {0: num_rows}
        num_units = 1 if stage.is_divisible else stage.num_units
        unit_us = [0] + [
            self._cost.estimate_us(model, stage.name, num_rows=rows, num_units=num_units)
            for rows in range(1, num_rows + 1)
        ]
        counts = [0] * len(lane_us)
        for _ in range(num_rows):
            done_us = [
                before_us + unit_us[count + 1]
                for before_us, count in zip(lane_us, counts, strict=True)
            ]
            counts[done_us.index(min(done_us))] += 1
        return {lane: count for lane, count in enumerate(counts) if count}

    def _fits(
        self,
        model: str,
        stage: Stage,
        rows: Sequence[RequestId],
        at: int,
        progress: Mapping[RequestId, _Progress],
        counts: Mapping[int, int],
        lane_us: Sequence[int],
        budget_us: int,
    ) -> bool:
        """Do all rows fit the budget, at least one unit of each?

        A budget cuts units, never rows: fewer rows would cost almost as much and leave the others waiting, so that an
        overloaded server would get slower still.
        """
        first = progress[rows[0]]
        num_units = 1 if stage.is_divisible else first.ends[at] - first.cursors[at]
        return all(
            lane_us[lane]
            + self._cost.estimate_us(model, stage.name, num_rows=count, num_units=num_units)
            <= budget_us
            for lane, count in counts.items()
        )

    def _order(
        self,
        model: str,
        stage: Stage,
        rows: Sequence[RequestId],
        at: int,
        progress: Mapping[RequestId, _Progress],
        budget_us: int,
        wave: int,
        lane: int,
    ) -> PieceOrder:
        states = [progress[request_id] for request_id in rows]
        num_units = min(state.ends[at] - state.cursors[at] for state in states)
        unit_us = max(1, self._cost.estimate_us(model, stage.name, num_rows=len(rows), num_units=1))
        if stage.is_divisible:
            num_units = min(num_units, max(1, budget_us // unit_us))
        return PieceOrder(
            model=model,
            stage=stage,
            rows=tuple(rows),
            first_units=tuple(state.cursors[at] for state in states),
            num_units=num_units,
            wave=wave,
            lane=lane,
            cost_us=unit_us * num_units,
        )


def _urgency(work: WorkView) -> tuple[int, float, int, RequestId]:
    return (work.deadline_us // TIE_US, -work.wait_ratio, work.deadline_us, work.request_id)


def _wave_us(orders: Sequence[PieceOrder]) -> int:
    """A wave lasts as long as its busiest lane."""
    lane_us: dict[int, int] = {}
    for order in orders:
        lane_us[order.lane] = lane_us.get(order.lane, 0) + order.cost_us
    return max(lane_us.values())
