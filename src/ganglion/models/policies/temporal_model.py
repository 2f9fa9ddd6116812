"""TemporalModel: a TemporalPolicy as a Model: what it remembers is pages of the session. Called by the engine's executor.

| stage | reads | carried from earlier observations | writes |
|---|---|---|---|
| view.*, text, observation | as in `flow_model` | | as in `flow_model` |
| memory | observation, the state | | the memory page of this observation |
| recurrent | memory | recurrent: the newest | the recurrent state, float32 |
| recall | text, observation, recurrent | memory: the T that were kept, oldest first | KV of the memory tokens |
| denoise | text, observation, recall, its own latent | | the latent x_tau |

Carried pages arrive under `Carry.name`; a page of zeros stands for one that is not there (yet, or any more), so a
session's first observation, a reset and a dropped page need no case of their own. Pages of the history that were
encoded arrive decoded: which they are is the affair of whoever keeps them (`memory.retention.history`).
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ganglion.errors import CheckpointError
from ganglion.layout import PageKind, PageLayout
from ganglion.models.base import StageBatch
from ganglion.models.policies.flow import FlowPolicy
from ganglion.models.policies.flow_model import KV_SLOTS, FlowModel
from ganglion.models.policies.temporal import TemporalPolicy, memory_page_shape
from ganglion.models.policies.transforms import Processor
from ganglion.spec import Carry, PolicySpec, Stage
from ganglion.types import Float32Array, Observation, SpanKind


class TemporalModel:
    """Stages over pages for one checkpoint."""

    def __init__(self, policy: TemporalPolicy, processor: Processor, spec: PolicySpec) -> None:
        """Raises CheckpointError when the memory's tokens do not fill whole pages of keys and values."""
        config, flow = policy.config, policy.flow.config
        num_tokens = config.num_memory_tokens()
        if num_tokens % KV_SLOTS:
            raise CheckpointError(
                f"memory.num_past: {config.num_past} + 1 memory tokens do not fill pages of {KV_SLOTS}",
                next_step=f"train with num_past {KV_SLOTS - 1}, {2 * KV_SLOTS - 1}, ...",
            )
        self._policy, self._processor, self.spec = policy, processor, spec
        with torch.inference_mode():
            self._probe = policy.probe()
        self._perceiving = FlowModel(policy.flow, processor, spec)
        self._generating = FlowModel(_with_more_text(policy.flow, num_tokens), processor, spec)
        kv, *_ = self._perceiving.layouts
        shape = memory_page_shape(flow)
        memory = PageLayout(
            name="memory", kind=PageKind.FEATURE, shape=shape, dtype=kv.dtype, slots=1
        )
        recurrent = PageLayout(
            name="recurrent",
            kind=PageKind.STATE,
            shape=(config.hidden_dim,),
            dtype="float32",
            slots=1,
        )
        self.layouts = (*self._perceiving.layouts, memory, recurrent)
        *perceive, denoise = self._perceiving.stages
        self.stages = (
            *perceive,
            _stage("memory", memory, 1, 1, reads=("observation",)),
            _stage("recurrent", recurrent, 1, 1, reads=("memory",)),
            _stage("recall", kv, num_tokens, num_tokens, ("text", "observation", "recurrent")),
            replace(denoise, reads=("text", "observation", "recall")),
        )
        self._newest = Carry(reader="recurrent", stage="recurrent", depth=1)
        self._history = Carry(reader="recall", stage="memory", depth=config.num_past)
        self.carries = (self._newest, self._history)

    def key(self, stage: Stage, observation: Observation) -> bytes:
        return self._perceiving.key(stage, observation)

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        match stage.name:
            case "memory":
                return self._remember(batch)
            case "recurrent":
                return self._advance(batch)
            case "recall":
                return self._recall(batch)
            case "denoise":
                return self._generating.run(stage, _with_recalled(batch))
            case _:
                return self._perceiving.run(stage, batch)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._perceiving.emit(pages, observations)

    def relevance(self, reads: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
        """Stage memory -> of each row: the shares of the expert's attention that its carried memory pages receive, oldest first.

        `reads`: pages of text, observation and recall, of one observation a row. Places without a page receive what
        their stand-in receives; a history is told of its own pages only (`memory.carried.CarriedPages.note`).
        """
        context = self._context(reads["text"], reads["observation"])
        context_kv = torch.cat([context, _sequence(reads["recall"])], dim=3)
        shares: list[list[float]] = (
            self._policy.relevance(context_kv, self._probe)[:, :-1].clamp(0, 1).tolist()
        )
        return {"memory": shares}

    def _remember(self, batch: StageBatch) -> Tensor:
        observation_kv = self._observation(batch.reads["observation"])
        state = self._processor.state(np.stack([o.state for o in batch.observations]))
        return self._policy.remember(observation_kv, state, _seqs(batch))[:, None]

    def _advance(self, batch: StageBatch) -> Tensor:
        earlier = batch.reads[self._newest.name][:, 0]
        return self._policy.advance(earlier, batch.reads["memory"][:, 0])[:, None]

    def _recall(self, batch: StageBatch) -> Tensor:
        context_kv = self._context(batch.reads["text"], batch.reads["observation"])
        past, hidden = batch.reads[self._history.name], batch.reads["recurrent"][:, 0]
        memory_kv = self._policy.recall(past, hidden, _seqs(batch), context_kv)
        by_token = memory_kv.permute(0, 3, 1, 2, 4, 5)
        return by_token.reshape(len(by_token), -1, KV_SLOTS, *by_token.shape[2:])

    def _context(
        self,
        text: Float[Tensor, "b page slot layer 2 head dim"],
        observation: Float[Tensor, "b page slot layer 2 head dim"],
    ) -> Float[Tensor, "b layer 2 token head dim"]:
        return torch.cat([_sequence(text), self._observation(observation)], dim=3)

    def _observation(
        self, pages: Float[Tensor, "b page slot layer 2 head dim"]
    ) -> Float[Tensor, "b layer 2 obs head dim"]:
        """Without the empty slots behind the last token."""
        return _sequence(pages)[:, :, :, : self._policy.flow.config.num_observation_tokens]


def _with_more_text(policy: FlowPolicy, num_tokens: int) -> FlowPolicy:
    """The same network, told that its context holds `num_tokens` more in front: what the expert attends to is unordered."""
    shallow = copy.copy(policy)
    num_text_tokens = policy.config.num_text_tokens + num_tokens
    shallow.config = replace(policy.config, num_text_tokens=num_text_tokens)
    return shallow


def _with_recalled(batch: StageBatch) -> StageBatch:
    """The memory's pages beside the instruction's. They are full, so pages end to end stay a sequence."""
    context = torch.cat([batch.reads["text"], batch.reads["recall"]], dim=1)
    return replace(batch, reads={**batch.reads, "text": context})


def _seqs(batch: StageBatch) -> Int[Tensor, " b"]:
    return torch.tensor([observation.seq for observation in batch.observations])


def _sequence(
    pages: Float[Tensor, "b page slot layer 2 head dim"],
) -> Float[Tensor, "b layer 2 token head dim"]:
    """A view, no copy: pages end to end are the sequence."""
    return pages.flatten(1, 2).permute(0, 2, 3, 1, 4, 5)


def _stage(
    name: str, layout: PageLayout, num_units: int, num_slots: int, reads: tuple[str, ...]
) -> Stage:
    return Stage(
        name=name,
        kind=SpanKind.PREFILL,
        num_units=num_units,
        reads=reads,
        layout=layout.name,
        num_pages=layout.num_pages(num_slots),
        num_slots=num_slots,
        is_shared=False,
        is_divisible=False,
    )
