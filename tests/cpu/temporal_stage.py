"""Drives a TemporalModel's stages by hand, as an engine with carried pages would; shared by the tests of temporal policies."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.carried import CarriedPages, CarryRule
from ganglion.memory.codec.carry import encode_carried, gather_carried
from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.ledger import Ledger
from ganglion.memory.retention.history import HistoryConfig
from ganglion.models.base import StageBatch
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.temporal import TemporalConfig, TemporalPolicy
from ganglion.models.policies.temporal_checkpoint import TemporalCheckpoint
from ganglion.models.policies.temporal_model import TemporalModel
from ganglion.models.tiny import TINY_PROMPTS, tiny_flow
from ganglion.types import Float32Array, Observation, RobotId, Row, SessionId, SpanKind

TINY_MEMORY = TemporalConfig(num_past=3, hidden_dim=16)


def tiny_temporal(base: FlowCheckpoint | None = None) -> TemporalCheckpoint:
    """A policy with memory whose actions depend on every input."""
    base = base or tiny_flow(seed=1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(2)
        policy = TemporalPolicy.from_flow(base.policy, TINY_MEMORY)
        for weight in (policy.memory.page_out.weight, policy.memory.hidden_in.weight):
            torch.nn.init.normal_(weight, std=0.5)
    return TemporalCheckpoint(
        policy=policy.eval().requires_grad_(requires_grad=False),
        processor=base.processor,
        spec=base.spec,
    )


def episode(name: str, length: int, *, seed: int = 0) -> list[Observation]:
    """What one robot sees, observation by observation."""
    rng, spec = np.random.default_rng(seed), tiny_flow().spec
    return [
        Observation(
            session_id=SessionId(name),
            robot_id=RobotId(name),
            seq=seq,
            images={
                view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
                for view in spec.views
            },
            state=rng.standard_normal(spec.state_dim).astype(np.float32),
            prompt=TINY_PROMPTS[0],
            seed=seq,
        )
        for seq in range(length)
    ]


class Tier:
    """A ledger and its bytes, for the pages of one model and their encoded forms."""

    def __init__(self, model: TemporalModel, *, num_large_pages: int = 32) -> None:
        self.codec = Int8Codec()
        self.layouts = {layout.name: layout for layout in model.layouts}
        encoded = self.codec.encoded(self.layouts["memory"])
        pool = PoolLayout(large_page_bytes=1 << 14, layouts=(*model.layouts, encoded))
        self.ledger = Ledger(pool, num_large_pages)
        self.arena = Arena(pool, num_large_pages)

    def move(self) -> int:
        """Move pages as between two steps; returns how many were copied."""
        moves = self.ledger.plan_moves(1 << 20, num_spare=32)
        self.arena.copy(() if moves is None else moves.copies)
        return 0 if moves is None else len(moves.copies)


class Session:
    """One session's carried pages and its requests, one after the other."""

    def __init__(
        self, model: TemporalModel, history: HistoryConfig, tier: Tier | None = None
    ) -> None:
        self._model, self.tier = model, tier or Tier(model)
        encoded = "memory@int8" if history.num_encoded else None
        newest = HistoryConfig(num_whole=1, num_encoded=0)
        self.carried = CarriedPages(
            self.tier.ledger,
            (
                CarryRule(stage="recurrent", layout="recurrent", history=newest),
                CarryRule(stage="memory", layout="memory", history=history, encoded_layout=encoded),
            ),
            owner="session",
        )

    @property
    def items(self) -> tuple[int, ...]:
        """Observations that are remembered."""
        return tuple(kept.seq for kept in self.carried.earlier("memory"))

    @torch.inference_mode()
    def act(self, seen: Observation) -> Float32Array:
        """Every stage once, in order, over pages of the arena; then what was written is carried on."""
        tier, held = self.tier, {}
        for stage in self._model.stages:
            reads = {
                name: tier.arena.gather(held[name][0].layout, [held[name][1]])
                for name in stage.reads
            }
            for carry in self._model.carries:
                if carry.reader == stage.name:
                    reads[carry.name] = gather_carried(
                        tier.arena,
                        tier.codec,
                        carry.stage,
                        [self.carried.earlier(carry.stage)],
                        depth=carry.depth,
                    )
            pages = tier.ledger.reserve(stage.layout, stage.num_pages, owner="session")
            if stage.kind is SpanKind.DENOISE:
                reads[stage.name] = tier.arena.gather(stage.layout, [pages])
            row = Row(observation=seen, first_unit=0, is_new=True)
            batch = StageBatch(rows=(row,), reads=reads, num_units=stage.num_units)
            out = self._model.run(stage, batch)
            tier.arena.scatter(stage.layout, [pages], out)
            tier.ledger.commit(stage.layout, pages, None)
            held[stage.name] = (stage, pages)
            if stage.name == "recall":
                self._note(seen, {**reads, "recall": out})
        for name in ("recurrent", "memory"):
            orders = self.carried.keep(name, held[name][1][0], seq=seen.seq)
            encode_carried(tier.arena, tier.codec, orders)
        actions = self._model.emit(tier.arena.gather(stage.layout, [pages]), (seen,))[0]
        for stage, pages in held.values():
            tier.ledger.release(stage.layout, pages)
        tier.ledger.check_integrity()
        return actions

    def _note(self, seen: Observation, reads: dict[str, Tensor]) -> None:
        kept = self.carried.earlier("memory")
        (masses,) = self._model.relevance(reads)["memory"]
        of_kept = masses[len(masses) - len(kept) :]
        by_seq = {item.seq: mass for item, mass in zip(kept, of_kept, strict=True)}
        self.carried.note("memory", by_seq, now=seen.seq)


def model_of(checkpoint: TemporalCheckpoint) -> TemporalModel:
    """The checkpoint's stages."""
    return TemporalModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)


def moved(seen: Observation, **changes: object) -> Observation:
    """The same observation with other values."""
    return dataclasses.replace(seen, **changes)  # type: ignore[arg-type]
