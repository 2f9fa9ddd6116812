"""The Model seam: a policy as a small dataflow of stages over pages. Obeyed by the engine, written by each policy.

A model knows tensors and observations. It does not know page ids, requests, sessions or time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ganglion.layout import PageLayout
from ganglion.spec import Carry, PolicySpec, Stage
from ganglion.types import Float32Array, Observation, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBatch:
    """Rows of one stage, from any sessions and at any cursor.

    `reads`: stage name -> [row, page, *page shape]. `bases`: row -> pages [page, *page shape] of the content that its
    observation's renewal starts from, of this stage; rows may lack them, and then they are computed whole.
    """

    rows: tuple[Row, ...]
    reads: Mapping[str, Tensor]
    num_units: int
    bases: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def observations(self) -> tuple[Observation, ...]:
        """What each row has seen."""
        return tuple(row.observation for row in self.rows)


@runtime_checkable
class Remembering(Protocol):
    """A model whose stages read what earlier observations of the session wrote."""

    @property
    def carries(self) -> tuple[Carry, ...]:
        """Which stage reads what, and how far back."""
        ...

    def relevance(self, reads: Mapping[str, Tensor]) -> Mapping[str, list[list[float]]]:
        """Stage -> of each row: the share of attention (0 to 1) that each of its carried pages received, oldest first.

        `reads`: stage name -> [row, page, *page shape] of what the last stage reads.
        """
        ...


@runtime_checkable
class Attentive(Protocol):
    """A model that can say which parts of its views a chunk rested on."""

    def attended(
        self, observation: Observation, reads: Mapping[str, Tensor], actions: Float32Array
    ) -> Mapping[str, npt.NDArray[np.bool_]]:
        """View key -> bool [row, column] of its tokens, for one session.

        `reads`: stage name -> [1, page, *page shape] of what was perceived in `observation`. `actions`: the chunk that was
        made of it, [horizon, action_dim] in the robot's units.
        """
        ...


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
