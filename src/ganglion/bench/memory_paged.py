"""The mix of `bench memory` on the real ledger, arena, executor and engine, step by step. Called by `bench.memory`.

Time is simulated and the schedule fixed, so that a run is the same whether its pages are shared or not: each step
perceives all observations that came, then takes one flow step of every chunk under way, one row a piece.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ganglion.bench.memory_mix import PERIOD_STEPS, Member
from ganglion.clock import SimulatedClock
from ganglion.engine.executor import Executor
from ganglion.engine.lane import Lanes
from ganglion.engine.step import Engine
from ganglion.engine.work import PieceOrder, WorkView
from ganglion.errors import GanglionError
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.prefix import page_keys
from ganglion.memory.table import PageTable, VersionedTable
from ganglion.models.base import Model, StageBatch
from ganglion.plan.cost import MeasuredCost
from ganglion.spec import Stage
from ganglion.types import Float32Array, Observation, PageId, RequestId, SessionId, SpanKind

NUM_AMPLE_LARGE_PAGES = 1024
STEP_BUDGET_BYTES = 262_144  # that defragmentation may move between two steps
NUM_SPARE = 32  # large pages that it tries to keep free: all that a step's observations take
Answer = tuple[SessionId, int]  # session, number of the observation
Observations = Mapping[Answer, Observation]


class InPool:
    """A model beside others in one pool: its layouts carry its name."""

    def __init__(self, inner: Model, name: str) -> None:
        self._inner, self.spec = inner, inner.spec
        self.layouts = tuple(
            replace(layout, name=f"{name}.{layout.name}") for layout in inner.layouts
        )
        self.stages = tuple(
            replace(stage, layout=f"{name}.{stage.layout}") for stage in inner.stages
        )

    def key(self, stage: Stage, observation: Observation) -> bytes:
        return self._inner.key(stage, observation)

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        return self._inner.run(stage, batch)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._inner.emit(pages, observations)


class Unshared:
    """A model whose pages no two sessions share: what it makes is keyed by session too."""

    def __init__(self, inner: Model) -> None:
        self._inner, self.spec = inner, inner.spec
        self.layouts, self.stages = inner.layouts, inner.stages

    def key(self, stage: Stage, observation: Observation) -> bytes:
        session_id = observation.session_id.encode()
        return (
            len(session_id).to_bytes(4, "little") + session_id + self._inner.key(stage, observation)
        )

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        return self._inner.run(stage, batch)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._inner.emit(pages, observations)


class Dry:
    """A model that computes nothing and reads nothing: its pages come and go as the model's own."""

    def __init__(self, inner: Model) -> None:
        self._inner, self.spec, self.layouts = inner, inner.spec, inner.layouts
        self.stages = tuple(replace(stage, reads=()) for stage in inner.stages)
        self._layout_of = {layout.name: layout for layout in inner.layouts}

    def key(self, stage: Stage, observation: Observation) -> bytes:
        return self._inner.key(stage, observation)

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        layout = self._layout_of[stage.layout]
        dtype: torch.dtype = getattr(torch, layout.dtype)
        return torch.zeros(len(batch.rows), stage.num_pages, *layout.shape, dtype=dtype)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        shape = (len(observations), self.spec.horizon, self.spec.action_dim)
        return np.zeros(shape, dtype=np.float32)


class Lockstep:
    """A Scheduler without a budget: every perception that came, then one flow step of every chunk under way."""

    def __init__(self, stages: Mapping[str, tuple[Stage, ...]]) -> None:
        self._stages = stages

    def plan(self, view: Sequence[WorkView], budget_us: int) -> tuple[PieceOrder, ...]:
        assert budget_us > 0, budget_us
        orders: list[PieceOrder] = []
        for wave in range(max(len(stages) for stages in self._stages.values())):
            for work in sorted(view, key=lambda work: work.request_id):
                stages = self._stages[work.model]
                if wave < len(stages) and work.cursors[wave] < stages[wave].num_units:
                    orders.append(_order(work, stages[wave], wave))
        return tuple(orders)


def _order(work: WorkView, stage: Stage, wave: int) -> PieceOrder:
    num_left = stage.num_units - work.cursors[wave]
    return PieceOrder(
        model=work.model,
        stage=stage,
        rows=(work.request_id,),
        first_units=(work.cursors[wave],),
        num_units=1 if stage.is_divisible else num_left,
        wave=wave,
        lane=0,
        cost_us=1,
    )


class _History:
    """The features of a session's last observations: one more versioned table."""

    def __init__(self, ledger: Ledger, length: int) -> None:
        self._ledger, self._length = ledger, length
        self._table = VersionedTable(ledger)

    def remember(self, layout: str, pages: Sequence[tuple[PageId, ...]], owner: str) -> None:
        """`pages`: of each view, one reference each that this takes over."""
        newest = tuple(page for of_view in pages for page in of_view)
        num_older = (self._length - 1) * len(newest)
        lease = self._table.acquire()
        older = lease.tables[0].pages[-num_older:] if lease is not None and num_older else ()
        self._ledger.retain(layout, older, owner=owner)
        kept = (*older, *newest)
        self._table.publish(PageTable(layout=layout, pages=kept, num_slots=len(kept)))
        if lease is not None:
            self._table.release(lease)

    def close(self) -> None:
        self._table.close()


@dataclass(slots=True, kw_only=True)
class PagedRun:
    """What a run gave and took. `work`: stage -> rows that were run; `used_pages`: by layout, when most bytes were in use."""

    actions: dict[Answer, Float32Array] = field(default_factory=dict)
    num_steps: int = 0
    work: dict[str, int] = field(default_factory=dict)
    used_pages: dict[str, int] = field(default_factory=dict)
    used_bytes: int = 0

    @property
    def effort(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        """Two runs of equal effort waited for nothing and computed nothing twice that the other did not."""
        return self.num_steps, tuple(sorted(self.work.items()))


class PagedServer:
    """Two models and all sessions in one arena of `num_large_pages`."""

    def __init__(
        self, models: Mapping[str, Model], num_large_pages: int, *, large_page_bytes: int
    ) -> None:
        self._run = PagedRun()
        self._models = {name: _Watched(model, self._watch) for name, model in models.items()}
        layouts = tuple(layout for model in models.values() for layout in model.layouts)
        pool = PoolLayout(large_page_bytes=large_page_bytes, layouts=layouts)
        self._page_bytes = {layout.name: layout.page_bytes for layout in layouts}
        self._ledger = Ledger(pool, num_large_pages)
        clock, cost = SimulatedClock(), MeasuredCost()
        self._engine = Engine(
            self._models,
            self._ledger,
            Lockstep({name: model.stages for name, model in models.items()}),
            Executor(self._models, Arena(pool, num_large_pages), Lanes(((),)), clock),
            cost,
            clock,
            step_budget_us=1,
            defrag_budget_bytes=STEP_BUDGET_BYTES,
            num_spare_large_pages=NUM_SPARE,
            num_step_records=1,
        )
        self._histories: dict[SessionId, _History] = {}

    def serve(
        self, members: Sequence[Member], observations: Observations, num_periods: int
    ) -> PagedRun:
        """Every member's observations, one a period, and all their chunks. Raises what ended a request."""
        run = self._run
        while run.num_steps < num_periods * PERIOD_STEPS or self._engine.has_work:
            period, phase = divmod(run.num_steps, PERIOD_STEPS)
            due = [member for member in members if member.phase == phase and period < num_periods]
            for member in due:
                self._submit(member, observations[member.session_id, period])
            self._engine.step()
            for member in due:
                self._remember(member, observations[member.session_id, period])
            run.num_steps += 1
            for finished in self._engine.drain_finished():
                if isinstance(finished.outcome, GanglionError):
                    raise finished.outcome
                seen = finished.work.observation
                run.actions[seen.session_id, seen.seq] = finished.outcome
        self._ledger.check_integrity()
        return run

    def close(self, members: Sequence[Member]) -> int:
        """All sessions leave; returns the pages that are still held, of which there must be none."""
        for member in members:
            self._engine.close_session(member.session_id)
            self._histories[member.session_id].close()
        return sum(self._ledger.stats(max_live_pages=0).num_used_pages.values())

    def _submit(self, member: Member, observation: Observation) -> None:
        request_id = RequestId(len(self._run.actions) + self._engine.num_under_way)
        self._engine.submit(request_id, member.model, observation, deadline_s=1.0)

    def _remember(self, member: Member, observation: Observation) -> None:
        """Hold what was just perceived: it is found by its content."""
        model = self._models[member.model]
        stages = [stage for stage in model.stages if stage.kind is SpanKind.ENCODE]
        history = self._histories.setdefault(
            member.session_id, _History(self._ledger, member.history)
        )
        pages = []
        for stage in stages:
            scope = f"{member.model}/{stage.name}"
            keys = page_keys(scope, model.key(stage, observation), stage.num_pages)
            pages.append(self._ledger.match(stage.layout, keys, owner=member.session_id))
            if len(pages[-1]) < stage.num_pages:
                raise GanglionError(f"{member.session_id} waited for pages: {scope} is not there")
        history.remember(stages[0].layout, pages, member.session_id)

    def _watch(self, stage: Stage, num_rows: int) -> None:
        """In the middle of a step, when all that it needs is reserved."""
        run = self._run
        name = f"{stage.layout.partition('.')[0]}/{stage.name}"
        run.work[name] = run.work.get(name, 0) + num_rows
        used = self._ledger.stats(max_live_pages=0).num_used_pages
        used_bytes = sum(self._page_bytes[name] * num_pages for name, num_pages in used.items())
        if used_bytes > run.used_bytes:
            run.used_bytes, run.used_pages = used_bytes, dict(used)


class _Watched:
    """A model that says when it runs."""

    def __init__(self, inner: Model, on_run: Callable[[Stage, int], None]) -> None:
        self._inner, self._on_run, self.spec = inner, on_run, inner.spec
        self.layouts, self.stages = inner.layouts, inner.stages

    def key(self, stage: Stage, observation: Observation) -> bytes:
        return self._inner.key(stage, observation)

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        self._on_run(stage, len(batch.rows))
        return self._inner.run(stage, batch)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._inner.emit(pages, observations)


def smallest_pool(
    models: Mapping[str, Model],
    members: Sequence[Member],
    observations: Observations,
    num_periods: int,
    *,
    large_page_bytes: int,
) -> int:
    """Large pages of the smallest arena in which the run waits for no page and computes nothing twice."""
    layouts = tuple(layout for model in models.values() for layout in model.layouts)
    dry = {name: Dry(model) for name, model in models.items()}

    def attempt(num_large_pages: int) -> PagedRun | None:
        server = PagedServer(dry, num_large_pages, large_page_bytes=large_page_bytes)
        try:
            return server.serve(members, observations, num_periods)
        except GanglionError:
            return None

    pool = PoolLayout(large_page_bytes=large_page_bytes, layouts=layouts)
    ample = attempt(NUM_AMPLE_LARGE_PAGES)
    assert ample is not None, f"the mix does not fit {NUM_AMPLE_LARGE_PAGES} large pages"
    lowest = sum(
        -(-num_pages // pool.pages_per_large(name)) for name, num_pages in ample.used_pages.items()
    )
    for num_large_pages in range(lowest, NUM_AMPLE_LARGE_PAGES):
        run = attempt(num_large_pages)
        if run is not None and run.effort == ample.effort:
            return num_large_pages
    raise GanglionError("no pool is large enough for the mix")
