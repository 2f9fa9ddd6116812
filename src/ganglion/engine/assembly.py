"""Assembly: the pages of spans, and the pieces of a step with them. Called by `engine.step` on the loop's thread.

Matches what is known, reserves what is not, says what each row reads and writes. Ids and ints only; decides neither who
advances nor when.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from ganglion.engine.context import PublicContext
from ganglion.engine.memories import Memories
from ganglion.engine.work import Piece, PieceOrder, Span, Work
from ganglion.errors import OutOfPagesError
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.memory.prefix import PageKey, page_keys
from ganglion.models.base import Model, Remembering
from ganglion.spec import Carry, Stage
from ganglion.types import Observation, PageId, RequestId, Row, SessionId, SpanKind

Starved = dict[RequestId, OutOfPagesError]


class Assembly:
    """Reads the engine's requests and contexts, which change under it; its own state is none."""

    def __init__(
        self,
        models: Mapping[str, Model],
        ledger: Ledger,
        works: Mapping[RequestId, Work],
        contexts: dict[SessionId, PublicContext],
        memories: Memories,
    ) -> None:
        self._memories = memories
        # once: asking a protocol is slow, and pieces are made at every step
        self._carries: dict[str, tuple[Carry, ...]] = {
            name: model.carries if isinstance(model, Remembering) else ()
            for name, model in models.items()
        }
        self._models, self._ledger = models, ledger
        self._works, self._contexts = works, contexts

    def open_span(self, model: str, stage: Stage, observation: Observation) -> Span:
        """A span of a new request: done where its pages are known."""
        if not stage.is_shared:
            pages = self._repeated(stage, observation)
            return Span(stage=stage, cursor=stage.num_units if pages else 0, pages=pages)
        content = self._models[model].key(stage, observation)
        keys = page_keys(f"{model}/{stage.name}", content, stage.num_pages)
        pages = self._ledger.match(stage.layout, keys)
        if len(pages) == stage.num_pages:
            return Span(stage=stage, keys=keys, cursor=stage.num_units, pages=pages)
        if pages:
            self._ledger.release(stage.layout, pages)
        return Span(stage=stage, keys=keys, base=self._base(model, stage, observation, keys))

    def pieces(self, orders: Sequence[PieceOrder]) -> tuple[list[Piece], Starved]:
        """Give every row the pages that it writes; a row that the pool cannot serve now sits the rest of the step out."""
        pieces: list[Piece] = []
        starved: Starved = {}
        for order in orders:
            for request_id in order.rows:
                if request_id not in starved:
                    error = self._reserve(self._works[request_id], order.stage)
                    if error is not None:
                        starved[request_id] = error
            piece = self._piece(order, starved.keys())
            if piece is not None:
                pieces.append(piece)
        return pieces, starved

    def release_base(self, span: Span) -> None:
        """The old pages that it was renewed from are not needed any more."""
        if span.base:
            self._ledger.release(span.stage.layout, span.base)
            span.base = ()

    def release(self, work: Work) -> None:
        """All pages that its spans hold themselves."""
        for span in work.spans.values():
            self.release_base(span)
            is_in_context = work.percept is not None and span is not work.last_span
            if span.pages and not is_in_context:
                self._ledger.release(span.stage.layout, span.pages)

    def relocate(self, moves: Moves) -> None:
        """The ledger moved pages: the spans follow."""
        for work in self._works.values():
            for span in work.spans.values():
                span.pages = moves.now_at(span.stage.layout, span.pages)
                span.base = moves.now_at(span.stage.layout, span.base)

    def _repeated(self, stage: Stage, observation: Observation) -> tuple[PageId, ...]:
        """The pages of the newest version, where the observation shows the same; else none."""
        renewal, context = observation.renewal, self._contexts.get(observation.session_id)
        if renewal is None or not renewal.is_repeat or not stage.is_repeatable or context is None:
            return ()
        return context.repeated(stage.name, stage.layout, observation)

    def _base(
        self, model: str, stage: Stage, observation: Observation, keys: tuple[PageKey, ...]
    ) -> tuple[PageId, ...]:
        """Pages of the content that the observation renews, if they are all there."""
        if observation.renewal is None:
            return ()
        old = replace(observation, images={**observation.images, **observation.renewal.images})
        content = self._models[model].key(stage, old)
        old_keys = page_keys(f"{model}/{stage.name}", content, stage.num_pages)
        if old_keys == keys:
            return ()
        pages = self._ledger.match(stage.layout, old_keys)
        if pages and len(pages) < stage.num_pages:
            self._ledger.release(stage.layout, pages)
            return ()
        return pages

    def _reserve(self, work: Work, stage: Stage) -> OutOfPagesError | None:
        span = work.spans[stage.name]
        if span.pages:
            return None
        if span.keys:  # somebody else may have made it since this request came
            pages = self._ledger.match(stage.layout, span.keys)
            if len(pages) == stage.num_pages:
                span.pages, span.cursor = pages, stage.num_units
                self.release_base(span)
                return None
            self._ledger.release(stage.layout, pages)
        try:
            span.pages = self._ledger.reserve(
                stage.layout, stage.num_pages, owner=work.observation.session_id
            )
        except OutOfPagesError as error:
            return error
        return None

    def _piece(self, order: PieceOrder, starved: Set[RequestId]) -> Piece | None:
        kept = [
            at
            for at, request_id in enumerate(order.rows)
            if request_id not in starved
            and not self._works[request_id].spans[order.stage.name].is_done
        ]
        if not kept:
            return None
        works = [self._works[order.rows[at]] for at in kept]
        stages = [works[0].spans[name].stage for name in order.stage.reads]
        if order.stage.is_divisible:
            stages.append(order.stage)
        return Piece(
            order=replace(
                order,
                rows=tuple(order.rows[at] for at in kept),
                first_units=tuple(order.first_units[at] for at in kept),
            ),
            rows=tuple(
                self._row(work, order.stage, order.first_units[at])
                for work, at in zip(works, kept, strict=True)
            ),
            reads=tuple(
                (stage, tuple(work.pages(stage.name) for work in works)) for stage in stages
            ),
            writes=tuple(work.spans[order.stage.name].pages for work in works),
            bases=tuple(work.spans[order.stage.name].base for work in works),
            carried=tuple(
                (
                    carry,
                    works[0].spans[carry.stage].stage.layout,
                    tuple(self._memories.earlier(work, carry) for work in works),
                )
                for carry in self._carries[order.model]
                if carry.reader == order.stage.name
            ),
        )

    def _row(self, work: Work, stage: Stage, first_unit: int) -> Row:
        if stage.kind is not SpanKind.DENOISE:
            return Row(observation=work.observation, first_unit=first_unit)
        # a session's first chunk may have been promised a prefix, too: after a reconnect in mid-motion
        context = self._contexts.setdefault(
            work.observation.session_id, PublicContext(self._ledger)
        )
        spec = self._models[work.model].spec
        is_first = first_unit == work.last_span.cursor  # of this step's pieces of the row
        plan = context.plan(work.seen, own=work.observation, max_prefix=spec.max_prefix)
        return Row(
            observation=work.seen,
            first_unit=first_unit,
            is_new=is_first and not work.has_begun,
            shift=work.shift if is_first else 0,
            plan=plan,
            num_units=work.last_span.num_asked,
        )
