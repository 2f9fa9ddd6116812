"""Plain policies: any callable from observations to actions, served as a model of one stage.

The shortest way to serve a policy of one's own (examples/my_policy.py). Called by the engine.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ganglion.errors import FieldError
from ganglion.layout import PageKind, PageLayout
from ganglion.models.base import StageBatch
from ganglion.spec import PolicySpec, Stage
from ganglion.types import Float32Array, Observation, SpanKind


@runtime_checkable
class PlainPolicy(Protocol):
    """What a user writes: a spec, and actions for a batch of observations (from different robots)."""

    spec: PolicySpec

    def __call__(self, observations: Sequence[Observation]) -> Float32Array:
        """Actions [row, horizon, action_dim]."""
        ...


class PlainModel:
    """A PlainPolicy as a Model: one indivisible span whose page holds the chunk."""

    def __init__(self, policy: PlainPolicy) -> None:
        self._policy = policy
        self.spec = policy.spec
        shape = (self.spec.horizon, self.spec.action_dim)
        self.layouts = (
            PageLayout(name="state", kind=PageKind.STATE, shape=shape, dtype="float32", slots=1),
        )
        self.stages = (
            Stage(
                name="act",
                kind=SpanKind.DENOISE,
                num_units=1,
                reads=(),
                layout="state",
                num_pages=1,
                num_slots=1,
                is_shared=False,
                is_divisible=False,
            ),
        )

    def key(self, stage: Stage, observation: Observation) -> bytes:
        raise AssertionError(f"stage {stage.name!r} of a plain policy is not shared")

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        actions = np.asarray(self._policy(batch.observations), dtype=np.float32)
        expected = (len(batch.observations), self.spec.horizon, self.spec.action_dim)
        if actions.shape != expected:
            raise FieldError(
                "actions",
                expected=f"shape {expected} [row, horizon, action_dim]",
                got=f"shape {actions.shape}",
                next_step=f"fix what {type(self._policy).__name__}.__call__ returns, or its spec",
            )
        return torch.from_numpy(actions).unsqueeze(1)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return np.asarray(pages[:, 0].float().cpu().numpy(), dtype=np.float32)
