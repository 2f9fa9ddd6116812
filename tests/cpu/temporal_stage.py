"""Drives a TemporalModel's stages by hand, as an engine with carried pages would; shared by the tests of temporal policies."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.retention.history import History, HistoryConfig
from ganglion.models.base import StageBatch
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.temporal import TemporalConfig, TemporalPolicy
from ganglion.models.policies.temporal_checkpoint import TemporalCheckpoint
from ganglion.models.policies.temporal_model import TemporalModel, carried
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


class Session:
    """One session's carried pages: its recurrent state, and a history that keeps, encodes and drops."""

    def __init__(self, model: TemporalModel, history: HistoryConfig) -> None:
        self._model, self.history = model, History(history)
        self._codec = Int8Codec()
        self._layouts = {layout.name: layout for layout in model.layouts}
        self._depth = {(carry.reader, carry.stage): carry.depth for carry in model.carries}
        self._recurrent: list[Tensor] = []
        self._memory: dict[int, Tensor] = {}

    @property
    def num_encoded(self) -> int:
        return sum(page.dtype is torch.int8 for page in self._memory.values())

    def _carried(self, reader: str, stage: str, pages: list[Tensor]) -> Tensor:
        depth, layout = self._depth[reader, stage], self._layouts[stage]
        dtype = getattr(torch, layout.dtype)
        absent = [torch.zeros(layout.shape, dtype=dtype)] * (depth - len(pages))
        whole = [self._codec.decode(p, dtype) if p.dtype is torch.int8 else p for p in pages]
        return torch.stack([*absent, *whole])[None]

    @torch.inference_mode()
    def act(self, seen: Observation) -> Float32Array:
        """Every stage once, in order; then what was written is carried on."""
        kept = self.history.items
        pages: dict[str, Tensor] = {
            carried("recurrent"): self._carried("recurrent", "recurrent", self._recurrent),
            carried("memory"): self._carried("recall", "memory", [self._memory[i] for i in kept]),
        }
        for stage in self._model.stages:
            layout = self._layouts[stage.layout]
            reads = {name: pages[name] for name in pages if name in stage.reads or "@" in name}
            if stage.kind is SpanKind.DENOISE:
                reads[stage.name] = torch.zeros(1, stage.num_pages, *layout.shape)
            row = Row(observation=seen, first_unit=0, is_new=True)
            batch = StageBatch(rows=(row,), reads=reads, num_units=stage.num_units)
            out = self._model.run(stage, batch)
            assert out.shape == (1, stage.num_pages, *layout.shape), stage.name
            assert out.dtype is getattr(torch, layout.dtype), stage.name
            pages[stage.name] = out
        masses = self._model.relevance(pages["text"], pages["observation"], pages["recall"])[0]
        for item, mass in zip(kept, masses[len(masses) - len(kept) :].tolist(), strict=True):
            self.history.note(item, mass, seen.seq)
        self._recurrent = [pages["recurrent"][0, 0]]
        self._memory[seen.seq] = pages["memory"][0, 0]
        descent = self.history.add(seen.seq, seen.seq)
        for item in descent.encode:
            self._memory[item] = self._codec.encode(self._memory[item])
        for item in descent.drop:
            del self._memory[item]
        return self._model.emit(pages[self._model.stages[-1].name], (seen,))[0]


def model_of(checkpoint: TemporalCheckpoint) -> TemporalModel:
    """The checkpoint's stages."""
    return TemporalModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)


def moved(seen: Observation, **changes: object) -> Observation:
    """The same observation with other values."""
    return dataclasses.replace(seen, **changes)  # type: ignore[arg-type]
