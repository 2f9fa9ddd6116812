"""One model in the language engine: the rows that ask for it, its batch under way, what its layers cost. Pure state.

Owned by `engine.language`; batches are made for it by `engine.language_batch`.
"""

from dataclasses import dataclass, field

from ganglion.engine.adapters import Adapters
from ganglion.engine.language_forward import Forward, Stage
from ganglion.engine.language_images import LanguageImages
from ganglion.engine.language_pages import GroupShape, LanguagePages
from ganglion.engine.language_work import LanguageRow
from ganglion.engine.sampler import Sampler
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.models.language import LanguageModel, can_rewind
from ganglion.models.lora_load import AdapterSet
from ganglion.models.vision import encoder_of
from ganglion.plan.cost import CostModel

# Stages of the cost model. Rows are tokens, in `ENCODE` tiles of a picture; units are layers, there the tower's.
LAYERS, HEAD, ENCODE = "layers", "head", "encode"


@dataclass(slots=True, kw_only=True)
class LanguageHost:
    """`rows` are in the order in which their requests came, choices of one request side by side."""

    name: str
    model: LanguageModel
    pages: LanguagePages
    adapters: Adapters
    sampler: Sampler
    cost: CostModel
    rows: list[LanguageRow] = field(default_factory=list)
    suspects: list[LanguageRow] = field(default_factory=list)  # of a batch that failed: run alone
    forward: Forward | None = None
    stage: Stage | None = None
    images: LanguageImages | None = None  # None: the model sees nothing

    @property
    def admitted(self) -> list[LanguageRow]:
        """Rows that may hold pages."""
        return [row for row in self.rows if row.is_admitted]

    @property
    def staged(self) -> list[LanguageRow]:
        """Rows between two groups of layers."""
        return [] if self.stage is None else [part.row for part in self.stage.strand.parts]

    def is_ready(self, row: LanguageRow) -> bool:
        """Can its tokens be computed? Its adapter is read and its pictures are encoded first."""
        return self.adapters.is_ready(row) and (self.images is None or self.images.is_ready(row))

    def settle(self, row: LanguageRow) -> None:
        """Its tokens [0, num_computed) are in the pages."""
        self.pages.settle(row)
        if self.images is not None:
            self.images.settle(row)

    def relocate(self, row: LanguageRow, moves: Moves) -> None:
        """The ledger moved pages: the row follows."""
        self.pages.relocate(row, moves)
        if self.images is not None:
            self.images.relocate(row, moves)

    def release(self, row: LanguageRow) -> None:
        """Its pages are back, and it is in no batch any more."""
        if not row.is_admitted:
            return
        self.pages.release(row)
        if self.images is not None:
            self.images.release(row)
        row.is_admitted = False
        if not any(other.is_admitted for other in row.work.rows):
            self.adapters.release(row.work)
        if row in self.suspects:
            self.suspects.remove(row)
        if self.forward is not None and self.forward.lead is not None:
            self.forward.lead.drop(row)
        if self.stage is not None:
            self.stage.strand.drop(row)

    def abandon(self) -> list[LanguageRow]:
        """Forget the batch under way and what is between two groups of layers; returns the rows of both."""
        forward, stage = self.forward, self.stage
        self.forward = self.stage = None
        strands = [] if forward is None or forward.lead is None else [forward.lead]
        strands += [] if stage is None else [stage.strand]
        rows = [part.row for strand in strands for part in strand.parts]
        if not can_rewind(self.model):
            for row in rows:  # some layers' states went on already: from the start again
                self.pages.release(row)
        return rows

    def estimate_us(self, stage: str, num_tokens: int, num_layers: int = 1) -> int:
        """What so many tokens will take."""
        return self.cost.estimate_us(
            self.name, stage, num_rows=max(1, num_tokens), num_units=num_layers
        )

    def observe(self, stage: str, num_tokens: int, num_layers: int, run_us: float) -> None:
        """So many tokens took `run_us`."""
        self.cost.observe(
            self.name, stage, num_rows=num_tokens, num_units=num_layers, run_us=run_us
        )


def open_host(
    name: str,
    model: LanguageModel,
    ledger: Ledger,
    arena: Arena,
    cost: CostModel,
    *,
    adapters: AdapterSet | None = None,
) -> LanguageHost:
    """A host without rows. The pool must have the layouts of the model's groups and of its adapters."""
    shapes = [
        GroupShape(
            layout=group.layout,
            window=group.window,
            pages_per_large=arena.pages(group.layout.name).shape[1],
        )
        for group in model.groups
    ]
    encoder = encoder_of(model)
    return LanguageHost(
        name=name,
        model=model,
        pages=LanguagePages(name, shapes, ledger),
        adapters=Adapters(adapters, ledger, arena),
        sampler=Sampler(model.spec),
        cost=cost,
        images=None if encoder is None else LanguageImages(name, encoder, ledger, arena),
    )
