"""Work: a request as an ordered list of spans with cursors, and the plan that advances them. Pure.

Owned by the engine on the loop's thread. `Span` and `Work` change there only; views, orders, pieces and plans are
frozen. Knows nothing of tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ganglion.engine.context import Percept
from ganglion.memory.carried import Kept
from ganglion.memory.prefix import PageKey
from ganglion.spec import Carry, Stage
from ganglion.types import Observation, PageId, RequestId, Row, SessionId


@dataclass(slots=True, kw_only=True)
class Span:
    """One stage of one request. [0, cursor) of its units are computed; `pages` hold one reference each."""

    stage: Stage
    keys: tuple[PageKey, ...] = ()  # one per page when the stage is shared
    cursor: int = 0
    pages: tuple[PageId, ...] = ()
    base: tuple[PageId, ...] = ()  # what its observation renews, referenced until it is done
    num_asked: int | None = None  # units of this request, where they differ from the stage's

    @property
    def num_units(self) -> int:
        """Units in all: a request may take fewer flow steps than its stage has."""
        return self.stage.num_units if self.num_asked is None else self.num_asked

    @property
    def num_left(self) -> int:
        """Units that are still to be computed."""
        return self.num_units - self.cursor

    @property
    def is_done(self) -> bool:
        """Are all its units computed?"""
        return self.cursor == self.num_units


@dataclass(slots=True, kw_only=True)
class Work:
    """One request: spans in the model's stage order, its deadline, and where its time went."""

    request_id: RequestId
    model: str
    observation: Observation
    spans: dict[str, Span]
    deadline_us: int  # Clock time; orders the work
    submitted_s: float
    wait_ratio: float = 0.0  # of its robot; goes before others of about the same deadline
    started_s: float | None = None
    perceive_us: float = 0.0
    generate_us: float = 0.0
    batch_size: int = 1  # rows of the widest piece that carried it
    percept: Percept | None = None  # the version of its session's public context that it reads
    shift: int = 0  # control ticks that the percept moved on since its chunk was last touched
    num_flow_steps: int = 0  # that were run for it; fewer than its cursor after a warm start
    recalled: dict[str, tuple[Kept, ...]] = field(
        default_factory=dict
    )  # stage -> carried pages that it read

    @property
    def context_version(self) -> int:
        """Version of the public context that it reads; 0 before its perception is complete."""
        return self.percept.version if self.percept else 0

    @property
    def seen(self) -> Observation:
        """The newest observation that goes into it."""
        return self.percept.observation if self.percept else self.observation

    @property
    def has_begun(self) -> bool:
        """Do its chunk's pages hold something?"""
        return self.num_flow_steps > 0

    def pages(self, stage: str) -> tuple[PageId, ...]:
        """Of its own span, or once its perception is complete of the version that it reads."""
        if self.percept is None or stage not in self.percept.stages:
            return self.spans[stage].pages
        return self.percept.pages(stage)

    @property
    def last_span(self) -> Span:
        """The span whose pages become actions."""
        return next(reversed(self.spans.values()))

    @property
    def is_done(self) -> bool:
        """Is the last span computed?"""
        return self.last_span.is_done


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkView:
    """What the scheduler sees of a request: cursors by stage name."""

    request_id: RequestId
    model: str
    deadline_us: int
    cursors: tuple[int, ...]  # in the model's stage order
    num_units: tuple[int, ...] | None = None  # where each cursor ends; None: where its stage does
    wait_ratio: float = 0.0
    is_joining: bool = (
        False  # older chunks of its robot are under way: what it perceives is theirs too
    )


def work_views(works: Iterable[Work]) -> list[WorkView]:
    """What the scheduler sees of them, oldest first."""
    views: list[WorkView] = []
    sessions: set[SessionId] = set()
    for work in works:
        session_id = work.observation.session_id
        views.append(
            WorkView(
                request_id=work.request_id,
                model=work.model,
                deadline_us=work.deadline_us,
                cursors=tuple(span.cursor for span in work.spans.values()),
                num_units=tuple(span.num_units for span in work.spans.values()),
                wait_ratio=work.wait_ratio,
                is_joining=session_id in sessions,
            )
        )
        sessions.add(session_id)
    return views


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceOrder:
    """A box of work: rows x units of one stage. Pieces of one wave do not depend on each other."""

    model: str
    stage: Stage
    rows: tuple[RequestId, ...]
    first_units: tuple[int, ...]
    num_units: int
    wave: int
    lane: int
    cost_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """An order with its pages: what the executor reads and writes, by layout-local page ids."""

    order: PieceOrder
    rows: tuple[Row, ...]
    reads: tuple[tuple[Stage, tuple[tuple[PageId, ...], ...]], ...]  # stage read -> pages per row
    writes: tuple[tuple[PageId, ...], ...]  # pages per row
    bases: tuple[tuple[PageId, ...], ...]  # pages per row, () where it renews nothing
    # what is carried, its layout, the pages per row
    carried: tuple[tuple[Carry, str, tuple[tuple[Kept, ...], ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One engine step: pieces in wave order. The executor obeys it and chooses nothing."""

    step: int
    budget_us: int
    num_waiting: int
    pieces: tuple[Piece, ...] = field(default=())
