"""The Model seam: a policy as a small dataflow of stages over pages. Obeyed by the engine, written by each policy.

A model knows tensors and observations. It does not know page ids, requests, sessions or time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ganglion.layout import PageLayout
from ganglion.spec import PolicySpec
from ganglion.types import Float32Array, Observation, SpanKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One kind of span of this model: reads the pages of earlier stages, writes its own.

    A stage with `is_shared` is content-addressed: `Model.key` names what its pages hold, and robots with the same
    content share them. The last stage's pages are what `emit` turns into actions.
    """

    name: str
    kind: SpanKind
    num_units: int  # encode: images; prefill: tokens; denoise: flow steps
    reads: tuple[str, ...]  # names of earlier stages; a denoise stage also reads its own pages
    layout: str
    num_pages: int
    is_shared: bool
    is_divisible: bool  # may a piece advance only some of its units?


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBatch:
    """Rows of one stage, from any sessions and at any cursor.

    `reads`: stage name -> [row, page, *page shape]. `first_units`: where each row's cursor stands.
    """

    observations: tuple[Observation, ...]
    reads: Mapping[str, Tensor]
    first_units: tuple[int, ...]
    num_units: int


@runtime_checkable
class Model(Protocol):
    """What the engine asks of a policy."""

    @property
    def spec(self) -> PolicySpec:
        """Inputs, outputs, limits."""
        ...

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        """Page layouts that its stages use."""
        ...

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Topologically ordered."""
        ...

    def key(self, stage: Stage, observation: Observation) -> bytes:
        """Content of a shared stage: equal keys mean equal pages."""
        ...

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        """Advance every row by `batch.num_units`; returns the stage's pages, [row, page, *page shape]."""
        ...

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        """Turn the last stage's pages [row, page, *page shape] into actions [row, horizon, action_dim]."""
        ...
