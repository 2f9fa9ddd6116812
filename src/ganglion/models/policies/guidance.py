"""Guidance: pulls a chunk that is being denoised towards the actions that its robot executes anyway.

Real-time chunking for policies that were not trained for it. Owns the weights, the strength and the guided Euler steps;
called by `flow`, filled in by `flow_model` and `train.actor`. Knows no network, page or request.

With flow time tau from 0 (noise) to 1 (data), a1 = x + (1 - tau) v is where the chunk x is heading, y what is executed:

    v' = v + min(beta, (1 - tau) / (tau r^2)) J^T [(y - a1) w],    r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)

| kind | J | w | beta |
|---|---|---|---|
| JACOBIAN (arXiv 2506.07339) | d a1 / d x, through the network | 1, then falling exponentially as far as y goes | 5 |
| IDENTITY (LeRobot 0.4.4) | 1: the velocity is taken as constant in x | 1, then falling linearly over the first 10 | 10 |

Dimension names: as in `flow`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

LEROBOT_EXECUTION_HORIZON = (
    10  # LeRobot's default: rows of the old chunk that a new one is merged with
)
_SMALLEST = 1e-6  # instead of tau (1 - tau) = 0: far beyond every beta

Velocity = Callable[[Tensor, Tensor], Tensor]


class Pull(StrEnum):
    """Whose formula."""

    JACOBIAN = "jacobian"
    IDENTITY = "identity"


MAX_STRENGTH = {Pull.JACOBIAN: 5.0, Pull.IDENTITY: 10.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What one row is pulled to. Row 0 of `known` belongs to row 0 of the chunk; the first `num_committed` run anyway."""

    pull: Pull
    known: Float[Tensor, "known action"]  # in the network's units
    num_committed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What the rows of one batch are pulled to; rows of zero weight stay as they are."""

    target: Float[Tensor, "b horizon action"]
    weights: Float[Tensor, "b horizon"]
    max_strength: float

    @classmethod
    def of(cls, aims: Sequence[Aim | None], pull: Pull, horizon: int, action_dim: int) -> "Guide":
        """The aims of kind `pull`; the other rows get weight zero."""
        target = torch.zeros(len(aims), horizon, action_dim)
        weights = torch.zeros(len(aims), horizon)
        weigh = soft_weights if pull is Pull.JACOBIAN else linear_weights
        for row, aim in enumerate(aims):
            if aim is not None and aim.pull is pull:
                known = aim.known[:horizon]
                target[row, : len(known)] = known
                weights[row] = weigh(aim.num_committed, len(known), horizon)
        return cls(target=target, weights=weights, max_strength=MAX_STRENGTH[pull])

    def rows(self, rows: Sequence[int]) -> "Guide":
        """Some rows of it."""
        places = list(rows)
        return Guide(
            target=self.target[places],
            weights=self.weights[places],
            max_strength=self.max_strength,
        )

    def error(
        self, x: Float[Tensor, "b horizon action"], tau: Float[Tensor, "b horizon"], v: Tensor
    ) -> Float[Tensor, "b horizon action"]:
        """(y - a1) w."""
        heading = x + (1.0 - tau)[..., None] * v
        return (self.target - heading) * self.weights[..., None]

    def strength(self, tau: Float[Tensor, "b horizon"]) -> Float[Tensor, "b horizon 1"]:
        """min(beta, (1 - tau) / (tau r^2)); beta where that is infinite."""
        ratio = (tau**2 + (1.0 - tau) ** 2) / (tau * (1.0 - tau)).clamp_min(_SMALLEST)
        return ratio.clamp_max(self.max_strength)[..., None]

    def identity(
        self, x: Float[Tensor, "b horizon action"], tau: Float[Tensor, "b horizon"], v: Tensor
    ) -> Float[Tensor, "b horizon action"]:
        """The guided velocity, J = 1."""
        return v + self.strength(tau) * self.error(x, tau, v)

    def jacobian(
        self,
        x: Float[Tensor, "b horizon action"],
        tau: Float[Tensor, "b horizon"],
        velocity: Velocity,
    ) -> Float[Tensor, "b horizon action"]:
        """The guided velocity, J^T by one backward pass. Neither x nor what `velocity` reads may be inference tensors."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            v = velocity(leaf, tau)
            heading = leaf + (1.0 - tau)[..., None] * v
            error = (self.target - heading.detach()) * self.weights[..., None]
            (correction,) = torch.autograd.grad(heading, leaf, error)
        return v.detach() + self.strength(tau) * correction


def soft_weights(num_committed: int, num_known: int, horizon: int) -> Float[Tensor, " horizon"]:
    """Real-time chunking's soft mask: 1 for what runs anyway, falling exponentially over the rest that is known."""
    place = torch.arange(horizon, dtype=torch.float32)
    left = ((num_known - place) / (num_known - num_committed + 1)).clamp(0.0, 1.0)
    falling = left * torch.expm1(left) / (math.e - 1.0)
    return torch.where(place < num_committed, 1.0, falling) * (place < num_known)


def linear_weights(
    num_committed: int,
    num_known: int,
    horizon: int,
    execution_horizon: int = LEROBOT_EXECUTION_HORIZON,
) -> Float[Tensor, " horizon"]:
    """LeRobot's prefix weights with its default schedule: 1, then a line to 0 at the execution horizon."""
    end = min(execution_horizon, num_known, horizon)
    start = min(num_committed, end)
    place = torch.arange(horizon, dtype=torch.float32)
    return (1.0 - (place - start + 1) / (end - start + 1)).clamp(0.0, 1.0).where(
        place >= start, 1.0
    ) * (place < end)


def denoise_guided(
    velocity: Velocity,
    x: Float[Tensor, "b horizon action"],
    tau: Float[Tensor, "b horizon"],
    dtau: Float[Tensor, " b"],
    num_steps: int,
    guide: Guide,
) -> Float[Tensor, "b horizon action"]:
    """`num_steps` Euler steps of width `dtau` along the velocity with the Jacobian's correction."""
    step = (tau < 1.0).to(x.dtype) * dtau[:, None]
    for at in range(num_steps):
        guided = guide.jacobian(x, tau + at * step, velocity)
        x = torch.addcmul(x, step[..., None], guided)
    return x
