"""Actor: a flow policy called in process, for evaluation and for tests; the server has its own, paged way.

A chunk is perceived, begun and refined flow step by flow step, so that an evaluation can do each of them at the tick at
which a server would. Knows no simulator and no server.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.flow_model import PULLS
from ganglion.models.policies.guidance import Aim
from ganglion.types import Execution, Float32Array, Plan, UInt8Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """One robot's observation, and what it executes from there on, as far as it is known."""

    images: UInt8Array  # [view, height, width, 3]
    state: Float32Array
    prompt: str
    noise_seed: int
    execution: Execution = Execution.NAIVE
    plan: Plan | None = None


@dataclass(slots=True, kw_only=True)
class Draft:
    """A chunk in the making. Between two flow steps its owner may give it a newer context and plan."""

    latent: Tensor  # float32 [horizon, action_dim]
    context: Tensor  # keys and values of what it sees: [layer, 2, token, head, dim]
    execution: Execution
    plan: Plan | None
    num_steps: int  # flow steps in all
    num_steps_done: int = 0

    @property
    def is_done(self) -> bool:
        return self.num_steps_done == self.num_steps

    def move_up(self, num_ticks: int) -> None:
        """Row i becomes row i - num_ticks; the last one fills what is left."""
        places = torch.arange(len(self.latent)) + num_ticks
        self.latent = self.latent[places.clamp_max(len(self.latent) - 1)]


class Actor:
    """Observations of any robots in, one chunk each out, in one batch."""

    def __init__(self, checkpoint: FlowCheckpoint, *, num_flow_steps: int) -> None:
        self._policy, self._processor = checkpoint.policy, checkpoint.processor
        self._dtype = checkpoint.policy.dtype
        self._text_kv: dict[str, Tensor] = {}
        self.num_flow_steps = num_flow_steps
        self._max_prefix = checkpoint.spec.max_prefix

    def act(self, glances: Sequence[Glance]) -> Float32Array:
        """Chunks [row, horizon, action_dim] in the robot's units."""
        drafts = self.begin(glances)
        self.refine(drafts, self.num_flow_steps)
        return self.emit(drafts)

    @torch.inference_mode()
    def begin(self, glances: Sequence[Glance]) -> list[Draft]:
        """Perceive; a chunk of noise for each."""
        policy = self._policy
        features = policy.encode_views(
            torch.from_numpy(np.stack([glance.images for glance in glances]))
        )
        state = self._processor.state(np.stack([glance.state for glance in glances]))
        text_kv = torch.cat([self._text(glance.prompt) for glance in glances])
        observation_kv = policy.prefill_observation(features, state.to(self._dtype), text_kv)
        contexts = torch.cat([text_kv, observation_kv], dim=3)
        return [
            Draft(
                latent=self._noise(glance.noise_seed),
                context=context,
                execution=glance.execution,
                plan=glance.plan,
                num_steps=self.num_flow_steps,
            )
            for glance, context in zip(glances, contexts, strict=True)
        ]

    @torch.inference_mode()
    def refine(self, drafts: Sequence[Draft], num_steps: int) -> None:
        """`num_steps` further flow steps of each draft, whatever step it stands at."""
        width = 1.0 / self.num_flow_steps
        x = torch.stack([draft.latent for draft in drafts])
        tau = torch.tensor([[draft.num_steps_done * width] for draft in drafts])
        tau = tau.repeat(1, x.shape[1])
        for row, draft in enumerate(drafts):
            if draft.execution is Execution.PREFIX and draft.plan is not None:
                num_committed = min(draft.plan.num_committed, self._max_prefix)
                x[row, :num_committed] = self._processor.prefix(draft.plan.actions[:num_committed])
                tau[row, :num_committed] = 1.0
        context_kv = torch.stack([draft.context for draft in drafts])
        dtau = torch.full((len(drafts),), width)
        aims = [self._aim(draft) for draft in drafts]
        x = self._policy.denoise(x, tau, dtau, context_kv, num_steps, aims)
        for latent, draft in zip(x, drafts, strict=True):
            draft.latent = latent
            draft.num_steps_done += num_steps

    def emit(self, drafts: Sequence[Draft]) -> Float32Array:
        """The chunks [row, horizon, action_dim] of fully refined drafts, in the robot's units."""
        return self._processor.actions(torch.stack([draft.latent for draft in drafts]))

    def _aim(self, draft: Draft) -> Aim | None:
        pull = PULLS.get(draft.execution)
        if pull is None or draft.plan is None:
            return None
        return Aim(
            pull=pull,
            known=self._processor.prefix(draft.plan.actions),
            num_committed=draft.plan.num_committed,
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
