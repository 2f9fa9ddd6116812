"""Executor: obeys a step's plan with tensors. Called by `engine.step` on the loop's thread; chooses nothing.

Gathers the pages that a piece reads, runs the model's stage, scatters what it wrote. A piece that raises spoils only
its own rows.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ganglion.clock import Clock
from ganglion.engine.lane import Lanes, Task
from ganglion.engine.work import Piece, StepPlan
from ganglion.errors import GanglionError, InternalError
from ganglion.memory.arena import Arena
from ganglion.memory.carried import EncodeOrder
from ganglion.memory.codec.carry import encode_carried, gather_carried
from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.orders import Moves
from ganglion.models.base import Attentive, Model, Remembering, StageBatch
from ganglion.spec import Stage
from ganglion.types import Float32Array, Observation, PageId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceResult:
    """How one piece went: when it started (Clock seconds), how long it ran, which of its rows failed."""

    start_s: float
    run_us: float
    failed_rows: Mapping[int, GanglionError]


class Executor:
    """Runs pieces of several models over one arena, spread over lanes as the plan says."""

    def __init__(
        self, models: Mapping[str, Model], arena: Arena, lanes: Lanes, clock: Clock
    ) -> None:
        self._models, self._arena, self._lanes, self._clock = models, arena, lanes, clock
        self._codec = Int8Codec()

    def run(self, plan: StepPlan) -> tuple[PieceResult, ...]:
        """Run every piece, wave by wave; results in the order of `plan.pieces`."""
        results: dict[int, PieceResult] = {}
        with torch.inference_mode():
            numbered = enumerate(plan.pieces)
            for _, wave in groupby(numbered, key=lambda item: item[1].order.wave):
                tasks: list[tuple[int, Task]] = [
                    (piece.order.lane, partial(self._run_into, results, at, piece))
                    for at, piece in wave
                ]
                self._lanes.run(tasks)
        return tuple(results[at] for at in range(len(plan.pieces)))

    def move(self, moves: Moves) -> None:
        """Copy pages to their new places, give the memory of retired large pages back; no piece runs meanwhile."""
        with torch.inference_mode():
            self._arena.copy(moves.copies)
            self._arena.release(moves.released)

    def emit(
        self,
        model: str,
        stage: Stage,
        pages: Sequence[Sequence[PageId]],
        observations: tuple[Observation, ...],
    ) -> Float32Array:
        """Actions [row, horizon, action_dim] of finished rows."""
        with torch.inference_mode():
            return self._models[model].emit(self._arena.gather(stage.layout, pages), observations)

    def attended(
        self,
        model: Attentive,
        observation: Observation,
        pages: Mapping[Stage, Sequence[PageId]],
        actions: Float32Array,
    ) -> Mapping[str, npt.NDArray[np.bool_]]:
        """View key -> bool [row, column] of the tokens that a chunk rested on."""
        with torch.inference_mode():
            reads = {
                stage.name: self._arena.gather(stage.layout, [ids]) for stage, ids in pages.items()
            }
            return model.attended(observation, reads, actions)

    def relevance(
        self, model: Remembering, pages: Mapping[Stage, Sequence[PageId]]
    ) -> Mapping[str, list[float]]:
        """Stage -> the share of attention that each carried page received, of one observation."""
        with torch.inference_mode():
            reads = {
                stage.name: self._arena.gather(stage.layout, [ids]) for stage, ids in pages.items()
            }
            return {stage: rows[0] for stage, rows in model.relevance(reads).items()}

    def encode(self, orders: Sequence[EncodeOrder]) -> None:
        """Encode carried pages, before anything else reads or writes pages."""
        with torch.inference_mode():
            encode_carried(self._arena, self._codec, orders)

    def _run_into(self, results: dict[int, PieceResult], at: int, piece: Piece) -> None:
        start_s = self._clock.now_s()
        failed: dict[int, GanglionError] = {}
        rows = range(len(piece.writes))
        error = self._try_rows(piece, rows)
        if error is not None:
            # One bad observation must not spoil its batch mates: find it by running every row alone.
            errors = (
                (row, error if len(rows) == 1 else self._try_rows(piece, (row,))) for row in rows
            )
            failed = {row: error for row, error in errors if error is not None}
        run_us = (self._clock.now_s() - start_s) * 1e6
        results[at] = PieceResult(start_s=start_s, run_us=run_us, failed_rows=failed)

    def _try_rows(self, piece: Piece, rows: Sequence[int]) -> GanglionError | None:
        try:
            self._run_rows(piece, rows)
        except GanglionError as error:
            return error
        except Exception:
            logger.exception("stage %s failed on %d rows", piece.order.stage.name, len(rows))
            return InternalError("the model failed on this observation")
        return None

    def _run_rows(self, piece: Piece, rows: Sequence[int]) -> None:
        order = piece.order
        reads = {
            stage.name: self._arena.gather(stage.layout, [pages[row] for row in rows])
            for stage, pages in piece.reads
        }
        for carry, layout, kept in piece.carried:
            reads[carry.name] = gather_carried(
                self._arena, self._codec, layout, [kept[row] for row in rows], depth=carry.depth
            )
        batch = StageBatch(
            rows=tuple(piece.rows[row] for row in rows),
            reads=reads,
            num_units=order.num_units,
            bases=self._bases(piece, rows),
        )
        out = self._models[order.model].run(order.stage, batch)
        self._arena.scatter(order.stage.layout, [piece.writes[row] for row in rows], out)

    def _bases(self, piece: Piece, rows: Sequence[int]) -> dict[int, Tensor]:
        """Place in the batch -> the pages that it renews, where there are any."""
        bases = {at: piece.bases[row] for at, row in enumerate(rows) if piece.bases[row]}
        if not bases:
            return {}
        pages = self._arena.gather(piece.order.stage.layout, list(bases.values()))
        return dict(zip(bases, pages, strict=True))
