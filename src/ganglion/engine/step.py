"""The engine step: plan -> run -> commit. Owns requests, contexts and the ledger; called on the loop's thread only.

The synchronous core: no locks, no sockets, no waiting. Knows pages by id and tensors not at all.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ganglion.clock import Clock
from ganglion.engine.assembly import Assembly
from ganglion.engine.context import PublicContext, ticks_between
from ganglion.engine.executor import Executor, PieceResult
from ganglion.engine.memories import Memories, MemoryPolicy
from ganglion.engine.outlook import Outlook, outlooks
from ganglion.engine.record import step_record
from ganglion.engine.scheduler import Scheduler
from ganglion.engine.work import PieceOrder, StepPlan, Work, work_views
from ganglion.errors import CancelledError, GanglionError, InternalError
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.memory.table import PageTable
from ganglion.models.base import Attentive, Model, Remembering
from ganglion.plan.cost import CostModel
from ganglion.types import (
    Float32Array,
    Observation,
    RequestId,
    SessionId,
    SpanKind,
    StepRecord,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A request that left the engine: actions [horizon, action_dim], or the error that ended it."""

    work: Work
    outcome: Float32Array | GanglionError


class Engine:
    """Continuous batching over spans: each step advances whatever is most urgent, whoever asked for it.

    Invariants, per span: [0, cursor) computed; `pages` empty or one reference each held by the work, until the
    session's context takes them over.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        ledger: Ledger,
        scheduler: Scheduler,
        executor: Executor,
        cost: CostModel,
        clock: Clock,
        *,
        step_budget_us: int,
        num_step_records: int,
        defrag_budget_bytes: int = 0,
        num_spare_large_pages: int = 1,
        is_context_public: bool = True,
        warm_start_share: float = 0.0,
        memory_policy: MemoryPolicy | None = None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """`make_room`: others on the same pool give pages back, when robots need more than are free; False: none is left."""
        self._make_room = make_room
        self._memories = Memories(ledger, memory_policy or MemoryPolicy())
        self._models, self._ledger = models, ledger
        self._remembering = {
            name: model for name, model in models.items() if isinstance(model, Remembering)
        }
        self._scheduler, self._executor, self._cost = scheduler, executor, cost
        self._clock, self._step_budget_us = clock, step_budget_us
        self._is_context_public, self._warm_start_share = is_context_public, warm_start_share
        self._defrag_budget_bytes, self._num_spare = defrag_budget_bytes, num_spare_large_pages
        ledger.attach(self)
        self._works: dict[RequestId, Work] = {}
        self._contexts: dict[SessionId, PublicContext] = {}
        self._assembly = Assembly(models, ledger, self._works, self._contexts, self._memories)
        self._finished: list[Finished] = []
        self._num_steps = 0
        self.records: deque[StepRecord] = deque(maxlen=num_step_records)

    @property
    def has_work(self) -> bool:
        """Is a request waiting or in flight?"""
        return bool(self._works)

    @property
    def num_under_way(self) -> int:
        """Requests waiting or in flight."""
        return len(self._works)

    @property
    def ledger(self) -> Ledger:
        """The ledger, for statistics."""
        return self._ledger

    def context_version(self, session_id: SessionId) -> int:
        """Newest committed version of the session's public context; 0 before the first."""
        context = self._contexts.get(session_id)
        return context.version if context else 0

    def num_pages(self, session_id: SessionId) -> dict[str, int]:
        """Pages that the session's context holds, by layout."""
        context = self._contexts.get(session_id)
        return context.num_pages() if context else {}

    def submit(
        self,
        request_id: RequestId,
        model: str,
        observation: Observation,
        *,
        deadline_s: float,
        num_flow_steps: int | None = None,
        wait_ratio: float = 0.0,
    ) -> Work:
        """Admit one observation. Shared stages whose pages are known already start out done.

        `deadline_s` and the robot's `wait_ratio` order the work. `num_flow_steps`: fewer units of the last stage than it
        has; only where that is divisible.
        """
        work = Work(
            request_id=request_id,
            model=model,
            observation=observation,
            spans={},
            deadline_us=round(deadline_s * 1e6),
            submitted_s=self._clock.now_s(),
            wait_ratio=wait_ratio,
        )
        for stage in self._models[model].stages:
            work.spans[stage.name] = self._assembly.open_span(model, stage, observation)
        if num_flow_steps is not None and work.last_span.stage.is_divisible:
            most = work.last_span.stage.num_units
            assert 0 < num_flow_steps <= most, f"{num_flow_steps} of {most} flow steps"
            work.last_span.num_asked = num_flow_steps
        self._works[request_id] = work
        if observation.renewal is not None and observation.renewal.is_repeat:
            self._publish_if_perceived(work)
        self._begin_warm(work)
        return work

    def execute(self, work: Work, actions: Float32Array) -> None:
        """The chunk of `work` passed the guard and goes to its robot: later chunks may continue it."""
        context = self._contexts.get(work.observation.session_id)
        if context is not None:
            context.execute(work.seen, actions)

    def attended(
        self, session_id: SessionId, model: str, *, prompt: str, actions: Float32Array
    ) -> Mapping[str, npt.NDArray[np.bool_]]:
        """Which tokens the chunk `actions` of the session rested on: view key -> bool [row, column].

        Empty when the model cannot say, or what was perceived last came with another instruction.
        """
        context, asked = self._contexts.get(session_id), self._models[model]
        if context is None or not context.version or not isinstance(asked, Attentive):
            return {}
        percept = context.acquire()
        try:
            if percept.observation.prompt != prompt:
                return {}
            stages = [stage for stage in self._models[model].stages if stage.name in percept.stages]
            pages = {stage: percept.pages(stage.name) for stage in stages}
            return self._executor.attended(asked, percept.observation, pages, actions)
        finally:
            context.release(percept)

    def reorder(self, request_id: RequestId, *, deadline_s: float, wait_ratio: float) -> None:
        """Its robot got another chunk, or will run dry at another time than was known when it came."""
        work = self._works.get(request_id)
        if work is not None:
            work.deadline_us, work.wait_ratio = round(deadline_s * 1e6), wait_ratio

    def outlooks(self) -> list[Outlook]:
        """What is left of every request under way."""
        return outlooks(self._works.values(), self._cost, may_see_newer=self._may_see_newer)

    def slack_us(self) -> int | None:
        """How long all requests under way may stand still and still meet their deadlines; None: there are none."""
        now_us = round(self._clock.now_s() * 1e6)
        left_us = {outlook.request_id: outlook.left_us for outlook in self.outlooks()}
        slacks = (w.deadline_us - now_us - left_us[w.request_id] for w in self._works.values())
        return min(slacks, default=None)

    def num_flow_steps(self, request_id: RequestId) -> int:
        """Flow steps that were run for a request in flight."""
        work = self._works.get(request_id)
        return 0 if work is None else work.num_flow_steps

    def has_perceived(self, request_id: RequestId) -> bool:
        """Is all that its chunk rests on computed? So it is of a request that left."""
        work = self._works.get(request_id)
        return work is None or work.percept is not None

    def cancel(self, request_id: RequestId, reason: GanglionError | None = None) -> None:
        """Drop a request; its pages are back at once, its outcome is `reason` (default CancelledError)."""
        work = self._works.get(request_id)
        if work is not None:
            self._finish(work, reason or CancelledError("request was cancelled"))

    def close_session(self, session_id: SessionId) -> None:
        """Cancel the session's requests and give its context's pages back."""
        for work in [w for w in self._works.values() if w.observation.session_id == session_id]:
            self.cancel(work.request_id)
        context = self._contexts.pop(session_id, None)
        if context is not None:
            context.close()
        self._memories.close(session_id)

    def step(self) -> StepRecord | None:
        """Advance the most urgent work by one budget; None when there is nothing to do."""
        moves = self._ledger.plan_moves(self._defrag_budget_bytes, num_spare=self._num_spare)
        if moves is not None:
            self._executor.move(moves)
        plan = self._plan()
        if plan is None:
            return None
        start_s = self._clock.now_s()
        results = self._executor.run(plan)
        return self._commit(plan, results, start_s)

    def relocate(self, moves: Moves) -> None:
        """The ledger moved pages: requests under way follow. Contexts follow by themselves."""
        self._assembly.relocate(moves)

    def drain_finished(self) -> list[Finished]:
        """Requests that left since the last call, in order."""
        finished, self._finished = self._finished, []
        return finished

    # --- plan ------------------------------------------------------------------------------------------------

    def _plan(self) -> StepPlan | None:
        if not self._works:
            return None
        for work in self._works.values():
            if work.percept is not None:
                self._look_again(work)
        view = work_views(self._works.values())
        orders = self._scheduler.plan(view, self._step_budget_us)
        pieces, starved = self._assembly.pieces(orders)
        while starved and self._make_room():
            pieces, starved = self._assembly.pieces(orders)
        if starved and not pieces:  # nothing would ever free a page: the least urgent gives way
            last = max(starved, key=lambda request_id: self._works[request_id].deadline_us)
            self._finish(self._works[last], starved[last])
        self._num_steps += 1
        return StepPlan(
            step=self._num_steps,
            budget_us=self._step_budget_us,
            num_waiting=len(self._works),
            pieces=tuple(pieces),
        )

    def _look_again(self, work: Work) -> None:
        """Before each flow step: the newest version of the context, and where a new chunk may begin."""
        context = self._contexts[work.observation.session_id]
        percept = work.percept
        assert percept is not None, "called once its perception is complete"
        if self._may_see_newer(work) and context.is_newer(work.seen.seq):
            newest = context.acquire()
            shift = ticks_between(percept.observation, newest.observation)
            if shift >= 0:
                work.percept = newest
                work.shift += shift if work.has_begun else 0
                newest = percept
            context.release(newest)
        self._begin_warm(work)

    def _begin_warm(self, work: Work) -> None:
        """A chunk that has not begun yet skips flow steps, if most of it is known from what its robot executes."""
        context = self._contexts.get(work.observation.session_id)
        if not self._warm_start_share or work.has_begun or context is None:
            return
        spec, span = self._models[work.model].spec, work.last_span
        plan = context.plan(work.seen, own=work.observation, max_prefix=spec.max_prefix)
        is_warm = plan is not None and 2 * len(plan.actions) >= spec.horizon
        span.cursor = round(self._warm_start_share * span.num_units) if is_warm else 0

    def _may_see_newer(self, work: Work) -> bool:
        late_steps = self._models[work.model].spec.late_context_steps
        return self._is_context_public and work.last_span.cursor < late_steps

    # --- commit ----------------------------------------------------------------------------------------------

    def _commit(self, plan: StepPlan, results: Sequence[PieceResult], start_s: float) -> StepRecord:
        works = dict(self._works)
        for piece, result in zip(plan.pieces, results, strict=True):
            order = piece.order
            if not result.failed_rows:
                self._cost.observe(
                    order.model,
                    order.stage.name,
                    num_rows=len(order.rows),
                    num_units=order.num_units,
                    run_us=result.run_us,
                )
            for row, request_id in enumerate(order.rows):
                work = self._works.get(request_id)
                if work is None:
                    continue
                error = result.failed_rows.get(row)
                if error is not None:
                    self._finish(work, error)
                else:
                    self._advance(work, order, result)
        self._emit([work for work in self._works.values() if work.is_done])
        record = step_record(plan, results, works, start_s=start_s, end_s=self._clock.now_s())
        self.records.append(record)
        return record

    def _advance(self, work: Work, order: PieceOrder, result: PieceResult) -> None:
        if work.started_s is None:
            work.started_s = result.start_s
        if order.stage.kind is SpanKind.DENOISE:
            work.generate_us += result.run_us
            work.num_flow_steps += order.num_units
            work.shift = 0
        else:
            work.perceive_us += result.run_us
        work.batch_size = max(work.batch_size, len(order.rows))
        span = work.spans[order.stage.name]
        span.cursor += order.num_units
        if span.is_done:
            self._ledger.commit(order.stage.layout, span.pages, span.keys or None)
            if span.keys:  # a batch mate may have made the same
                span.pages = self._ledger.merge(
                    order.stage.layout, span.pages, span.keys, owner=work.observation.session_id
                )
            self._assembly.release_base(span)
        self._publish_if_perceived(work)

    def _publish_if_perceived(self, work: Work) -> None:
        if work.percept is None and all(
            span.is_done for span in work.spans.values() if span is not work.last_span
        ):
            self._publish(work)

    def _publish(self, work: Work) -> None:
        """The work's perception is complete: it becomes the next version of its session's public context.

        Unless a later observation's was faster: then the work reads that one.
        """
        context = self._contexts.setdefault(
            work.observation.session_id, PublicContext(self._ledger)
        )
        spans = [span for span in work.spans.values() if span is not work.last_span]
        if self._may_see_newer(work) and context.is_newer(work.observation.seq):
            for span in spans:
                self._ledger.release(span.stage.layout, span.pages)
        else:
            self._remember(work)
            context.publish(
                work.observation,
                {
                    span.stage.name: PageTable(
                        layout=span.stage.layout, pages=span.pages, num_slots=span.stage.num_slots
                    )
                    for span in spans
                },
            )
        work.percept = context.acquire()

    def _remember(self, work: Work) -> None:
        """What its session carries on; before the context takes the pages over."""
        model = self._remembering.get(work.model)
        if model is None:
            return
        read = [work.spans[name] for name in work.last_span.stage.reads]
        masses = self._executor.relevance(model, {span.stage: span.pages for span in read})
        stages = {name: span.stage for name, span in work.spans.items()}
        self._executor.encode(self._memories.keep(work, model.carries, stages, masses))

    def _emit(self, works: Sequence[Work]) -> None:
        by_model: dict[str, list[Work]] = {}
        for work in works:
            by_model.setdefault(work.model, []).append(work)
        for model, rows in by_model.items():
            pages = [work.last_span.pages for work in rows]
            observations = tuple(work.seen for work in rows)
            stage = rows[0].last_span.stage
            try:
                actions = self._executor.emit(model, stage, pages, observations)
            except Exception:
                logger.exception("emit of %s failed", model)
                for work in rows:
                    self._finish(work, InternalError("the model failed on this observation"))
                continue
            for work, action in zip(rows, actions, strict=True):
                self._finish(work, action)

    def _finish(self, work: Work, outcome: Float32Array | GanglionError) -> None:
        del self._works[work.request_id]
        self._assembly.release(work)
        if work.percept is not None:
            self._contexts[work.observation.session_id].release(work.percept)
        self._finished.append(Finished(work=work, outcome=outcome))
