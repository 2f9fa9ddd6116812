"""Actor: a flow policy called in process, for evaluation and for tests; the server has its own, paged way.

Knows no simulator and no server.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.types import Float32Array, UInt8Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """One robot's observation; `prefix` [d, action_dim] holds the actions that it will execute anyway."""

    images: UInt8Array  # [view, height, width, 3]
    state: Float32Array
    prompt: str
    noise_seed: int
    prefix: Float32Array


class Actor:
    """Observations of any robots in, one chunk each out, in one batch."""

    def __init__(self, checkpoint: FlowCheckpoint, *, num_flow_steps: int) -> None:
        self._policy, self._processor = checkpoint.policy, checkpoint.processor
        self._num_flow_steps = num_flow_steps
        self._dtype = checkpoint.policy.dtype
        self._text_kv: dict[str, Tensor] = {}

    @torch.inference_mode()
    def act(self, glances: Sequence[Glance]) -> Float32Array:
        """Chunks [row, horizon, action_dim] in the robot's units."""
        policy, config = self._policy, self._policy.config
        features = policy.encode_views(
            torch.from_numpy(np.stack([glance.images for glance in glances]))
        )
        state = self._processor.state(np.stack([glance.state for glance in glances]))
        text_kv = torch.cat([self._text(glance.prompt) for glance in glances])
        observation_kv = policy.prefill_observation(features, state.to(self._dtype), text_kv)
        context_kv = torch.cat([text_kv, observation_kv], dim=3)
        x = torch.stack([self._noise(glance.noise_seed) for glance in glances])
        tau = torch.zeros(len(glances), config.horizon)
        for row, glance in enumerate(glances):
            length = len(glance.prefix)
            x[row, :length] = self._processor.prefix(glance.prefix)
            tau[row, :length] = 1.0
        dtau = torch.full((len(glances),), 1.0 / self._num_flow_steps)
        return self._processor.actions(
            policy.denoise(x, tau, dtau, context_kv, self._num_flow_steps)
        )

    def _text(self, prompt: str) -> Tensor:
        if prompt not in self._text_kv:
            self._text_kv[prompt] = self._policy.prefill_text(self._processor.tokens([prompt]))
        return self._text_kv[prompt]

    def _noise(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(
            self._policy.config.horizon, self._policy.config.action_dim, generator=generator
        )
