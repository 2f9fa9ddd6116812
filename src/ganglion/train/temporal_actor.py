"""Temporal actor: a policy with memory called in process, for evaluation and tests; the server has its own, paged way.

Owns the memory of each arm: its history's pages, whole or encoded, and its recurrent state. Knows no simulator and no server.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Flag

import numpy as np
import torch
from torch import Tensor

from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.retention.history import History, HistoryConfig
from ganglion.models.policies.temporal import memory_page_shape
from ganglion.models.policies.temporal_checkpoint import TemporalCheckpoint
from ganglion.types import Float32Array, UInt8Array


class Roads(Flag):
    """Which of its two memories the policy may use."""

    NONE = 0
    HISTORY = 1
    RECURRENT = 2
    BOTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One robot's observation."""

    images: UInt8Array  # [view, height, width, 3]
    state: Float32Array
    prompt: str
    noise_seed: int


@dataclass(slots=True)
class ArmMemory:
    """What one arm remembers of its episode."""

    history: History
    hidden: Tensor  # float32 [hidden]; zeros before the first observation
    pages: dict[int, Tensor] = field(
        default_factory=dict
    )  # by observation number; whole or encoded
    num_seen: int = 0


class TemporalActor:
    """Observations of any arms in, one chunk each out, in one batch; each arm's memory moves on."""

    def __init__(
        self,
        checkpoint: TemporalCheckpoint,
        *,
        num_flow_steps: int,
        roads: Roads = Roads.BOTH,
        history: HistoryConfig | None = None,
    ) -> None:
        """`history`: places, T at most (default: all of them whole)."""
        config = checkpoint.policy.config
        self._history = history or HistoryConfig(num_whole=config.num_past, num_encoded=0)
        if self._history.num_places > config.num_past:
            raise ValueError(
                f"a history of {self._history.num_places} places; the policy reads {config.num_past}"
            )
        self._policy, self._processor = checkpoint.policy, checkpoint.processor
        self._num_flow_steps, self._roads = num_flow_steps, roads
        self._codec = Int8Codec()
        with torch.inference_mode():
            self._probe = checkpoint.policy.probe()
        self._text_kv: dict[str, Tensor] = {}

    def new_memory(self) -> ArmMemory:
        """The memory of an episode that begins."""
        hidden = torch.zeros(self._policy.config.hidden_dim)
        return ArmMemory(history=History(self._history), hidden=hidden)

    @torch.inference_mode()
    def act(self, sights: Sequence[Sight], of_arms: Sequence[ArmMemory | None]) -> Float32Array:
        """Chunks [row, horizon, action_dim] in the robot's units. Raises ValueError for an arm without a memory."""
        memories = [memory for memory in of_arms if memory is not None]
        if len(memories) != len(sights):
            raise ValueError(
                f"{len(sights)} sights, {len(memories)} memories: each arm needs its own"
            )
        policy, flow = self._policy, self._policy.flow
        features = flow.encode_views(torch.from_numpy(np.stack([sight.images for sight in sights])))
        state = self._processor.state(np.stack([sight.state for sight in sights]))
        text_kv = torch.cat([self._text(sight.prompt) for sight in sights])
        observation_kv = flow.prefill_observation(features, state.to(policy.dtype), text_kv)
        context_kv = torch.cat([text_kv, observation_kv], dim=3)
        seq = torch.tensor([memory.num_seen for memory in memories])
        page = policy.remember(observation_kv, state, seq)
        hidden = policy.advance(torch.stack([memory.hidden for memory in memories]), page)
        kept = [memory.history.items for memory in memories]
        past = torch.stack(
            [self._past(memory, items) for memory, items in zip(memories, kept, strict=True)]
        )
        seen_hidden = hidden if Roads.RECURRENT in self._roads else torch.zeros_like(hidden)
        memory_kv = policy.recall(past, seen_hidden, seq, context_kv)
        context_kv = torch.cat([context_kv, memory_kv], dim=3)
        masses = policy.relevance(context_kv, self._probe).tolist()
        for row, memory in enumerate(memories):
            self._remember(memory, page[row], hidden[row], kept[row], masses[row])
        x = torch.stack([self._noise(sight.noise_seed) for sight in sights])
        tau = torch.zeros(len(sights), flow.config.horizon)
        dtau = torch.full((len(sights),), 1.0 / self._num_flow_steps)
        return self._processor.actions(flow.denoise(x, tau, dtau, context_kv, self._num_flow_steps))

    def _past(self, memory: ArmMemory, items: tuple[int, ...]) -> Tensor:
        """Pages [T, row, column] oldest first; zeros in front of them where there are fewer."""
        past = torch.zeros(
            self._policy.config.num_past, *memory_page_shape(self._policy.flow.config),
            dtype=self._policy.dtype,
        )  # fmt: skip
        for place, item in enumerate(items, start=len(past) - len(items)):
            page = memory.pages[item]
            is_encoded = page.dtype is torch.int8
            past[place] = self._codec.decode(page, past.dtype) if is_encoded else page
        return past

    def _remember(
        self,
        memory: ArmMemory,
        page: Tensor,
        hidden: Tensor,
        kept: tuple[int, ...],
        masses: list[float],
    ) -> None:
        now, memory.num_seen = memory.num_seen, memory.num_seen + 1
        memory.hidden = hidden
        if Roads.HISTORY not in self._roads:
            return
        # the last mass is the recurrent token's
        for item, mass in zip(reversed(kept), reversed(masses[:-1]), strict=False):
            memory.history.note(item, min(mass, 1.0), now)
        memory.pages[now] = page
        descent = memory.history.add(now, now)
        for item in descent.encode:
            memory.pages[item] = self._codec.encode(memory.pages[item])
        for item in descent.drop:
            del memory.pages[item]

    def _text(self, prompt: str) -> Tensor:
        if prompt not in self._text_kv:
            tokens = self._processor.tokens([prompt])
            self._text_kv[prompt] = self._policy.flow.prefill_text(tokens)
        return self._text_kv[prompt]

    def _noise(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        config = self._policy.flow.config
        return torch.randn(config.horizon, config.action_dim, generator=generator)
