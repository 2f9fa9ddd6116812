"""Temporal fit: a memory for a trained flow policy. Trains what is new and, gently, the expert that reads it.

Owns the loss and the optimiser. Called by the CLI and by tests. Knows no simulator. The trunk stays as it is, so what the
policy does with a visible goal is where it starts from, and its frames are encoded once (`train.temporal_dataset`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ganglion.clock import Clock, RealClock
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.temporal import FROZEN, TemporalConfig, TemporalPolicy
from ganglion.train.dataset import ANY
from ganglion.train.fit import Draw, FitConfig, draw_of_step
from ganglion.train.temporal_dataset import GOAL_SCALE_M, TemporalBatch, TemporalDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalFitConfig:
    """One training run."""

    num_steps: int = 4000
    num_episodes: int = 16  # unrolled by the recurrent road at each step
    num_rows: int = 32
    num_draws: int = 2
    memory_rate: float = 6e-4
    expert_rate: float = 1.5e-4
    final_rate_share: float = 0.02
    num_warmup_steps: int = 100
    weight_decay: float = 0.02
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.998
    prefix_share: float = 0.25
    road_dropout: float = 0.3
    num_steps_per_draft: int = 250
    goal_loss_weight: float = 0.5
    num_threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalProgress:
    """Reported after every step; running means. Goal errors are in metres, of what each road says the goal is."""

    step: int
    flow_loss: float
    page_goal_m: float
    hidden_goal_m: float
    step_s: float


class _Trainee(nn.Module):
    """The policy and heads that only training uses: each road must say where the goal is."""

    def __init__(self, policy: TemporalPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.page_head = nn.Linear(policy.flow.config.trunk_width, 3)
        self.hidden_head = nn.Linear(policy.config.hidden_dim, 3)

    def losses(
        self, data: TemporalDataset, batch: TemporalBatch, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flow, and goal as the pages and as the recurrent state tell it."""
        memory, flow, dtype = self.policy.memory, self.policy.flow, self.policy.dtype
        is_frame = torch.from_numpy(batch.frames >= 0)
        frames = torch.from_numpy(np.maximum(batch.frames, 0))
        encoded = memory.encode(data.pages[frames])
        goal = data.goal[frames]
        is_seen = is_frame & data.is_goal_visible[frames]
        page_loss = functional.smooth_l1_loss(
            self.page_head(encoded).float()[is_seen], goal[is_seen]
        )
        hidden = self._unrolled(encoded)
        hidden_loss = functional.smooth_l1_loss(
            self.hidden_head(hidden.to(dtype)).float()[is_frame], goal[is_frame]
        )
        episode, place = torch.from_numpy(batch.row_episode), torch.from_numpy(batch.row_place)
        past = torch.from_numpy(batch.past)
        is_past = (past >= 0) & torch.from_numpy(batch.has_history)[:, None]
        history = memory.history_tokens(
            encoded[episode[:, None], past.clamp(min=0)], (place[:, None] - past).float(), is_past
        )
        recurrent = memory.recurrent_token(
            hidden[episode, place], torch.from_numpy(batch.has_recurrent)
        )
        rows = torch.from_numpy(batch.rows)
        context_kv = torch.cat([data.text_of(batch.rows), data.observation_kv[rows]], dim=3)
        memory_kv = memory.project(torch.cat([history, recurrent], dim=1), context_kv)
        num_draws = draw.noise.shape[0] // len(rows)
        context_kv = torch.cat([context_kv, memory_kv], dim=3).repeat_interleave(num_draws, 0)
        action = data.chunk[rows].repeat_interleave(num_draws, 0)
        x = torch.lerp(draw.noise, action, draw.tau[..., None])
        velocity = flow.velocity(x.to(dtype), draw.tau, context_kv).float()
        error = (velocity - (action - draw.noise)).square().mean(-1)
        return error[draw.tau < 1.0].mean(), page_loss, hidden_loss

    def _unrolled(self, encoded: Tensor) -> Tensor:
        """Recurrent states [episode, place, hidden] after each observation."""
        gru = self.policy.memory.gru
        hidden = encoded.new_zeros(
            (len(encoded), self.policy.config.hidden_dim), dtype=torch.float32
        )
        states = []
        for from_x in gru.x_in(encoded).unbind(1):
            hidden = gru.update(from_x, hidden)
            states.append(hidden)
        return torch.stack(states, dim=1)


def fit_temporal(
    config: TemporalFitConfig,
    checkpoint: FlowCheckpoint,
    data_dir: Path,
    on_progress: Callable[[TemporalProgress], None],
    *,
    start: TemporalPolicy | None = None,
    on_draft: Callable[[TemporalPolicy], None] | None = None,
    model: TemporalConfig | None = None,
    clock: Clock | None = None,
) -> TemporalPolicy:
    """Train a memory for `checkpoint` (or go on with `start`); averaged weights, float32.

    `on_draft` is given the averaged weights now and then, for a run that may be cut. `checkpoint` must be in bfloat16 or float32; training computes in its dtype and keeps float32 weights beside it.
    """
    clock = clock or RealClock()
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    policy = start or TemporalPolicy.from_flow(checkpoint.policy, model or TemporalConfig())
    policy = policy.to(checkpoint.policy.dtype)
    data = TemporalDataset(data_dir, policy, checkpoint, num_past=policy.config.num_past)
    trainee = _Trainee(policy).to(policy.dtype)
    run = _Run(trainee, config)
    fit_config = FitConfig(prefix_share=config.prefix_share, seed=config.seed)
    means: tuple[float, ...] = ()
    for step in range(config.num_steps):
        start_s = clock.now_s()
        batch = data.batch(
            step=step,
            num_episodes=min(config.num_episodes, data.num_episodes),
            num_rows=config.num_rows,
            seed=config.seed,
            road_dropout=config.road_dropout,
        )
        num_committed = np.full(config.num_rows * config.num_draws, ANY)
        draw = draw_of_step(fit_config, policy.flow.config, step=step, num_committed=num_committed)
        flow_loss, page_loss, hidden_loss = trainee.losses(data, batch, draw)
        torch.autograd.backward(flow_loss + config.goal_loss_weight * (page_loss + hidden_loss))
        run.update(step)
        losses = [float(loss.detach()) for loss in (flow_loss, page_loss, hidden_loss)]
        now = (*losses, clock.now_s() - start_s)
        means = tuple(0.98 * m + 0.02 * v for m, v in zip(means or now, now, strict=True))
        on_progress(
            TemporalProgress(
                step=step + 1,
                flow_loss=means[0],
                page_goal_m=_metres(means[1]),
                hidden_goal_m=_metres(means[2]),
                step_s=means[3],
            )
        )
        if on_draft is not None and (step + 1) % config.num_steps_per_draft == 0:
            on_draft(run.averaged())
    return run.averaged()


def _metres(loss: float) -> float:
    """Typical error along one axis behind a smooth-l1 loss in units of GOAL_SCALE_M."""
    return math.sqrt(2 * loss) * GOAL_SCALE_M


class _Run:
    """Float32 weights of what is trained, their moments and their average; the trainee is a copy of them."""

    def __init__(self, trainee: _Trainee, config: TemporalFitConfig) -> None:
        self._trainee, self._config = trainee, config
        self._parameters = {}
        for name, parameter in trainee.named_parameters():
            is_frozen = name.removeprefix("policy.").startswith(FROZEN)
            parameter.requires_grad_(not is_frozen)
            if not is_frozen:
                self._parameters[name] = parameter
        self._weights = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._averages = {name: value.clone() for name, value in self._weights.items()}
        groups = []
        for is_expert in (False, True):
            rate = config.expert_rate if is_expert else config.memory_rate
            for has_decay in (False, True):
                chosen = [
                    value
                    for name, value in self._weights.items()
                    if name.startswith("policy.flow.") == is_expert
                    and (value.ndim > 1) == has_decay
                ]
                decay = config.weight_decay if has_decay else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "rate": rate})
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    def update(self, step: int) -> None:
        """One optimiser step from the trainee's gradients, which are then cleared."""
        for name, weight in self._weights.items():
            gradient = self._parameters[name].grad
            weight.grad = None if gradient is None else gradient.float()
            self._parameters[name].grad = None
        nn.utils.clip_grad_norm_(list(self._weights.values()), self._config.max_gradient_norm)
        share = _rate_share(self._config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * share
        self._optimizer.step()
        decay = min(self._config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), 1 - decay)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._weights[name])

    def averaged(self) -> TemporalPolicy:
        """The policy with averaged weights, float32."""
        trained = self._trainee.policy
        policy = TemporalPolicy(trained.flow.config, trained.config)
        policy.load_state_dict(
            {name: value.float() for name, value in trained.state_dict().items()}
        )
        averages = {
            name.removeprefix("policy."): value
            for name, value in self._averages.items()
            if name.startswith("policy.")
        }
        policy.load_state_dict(averages, strict=False)
        return policy.eval().requires_grad_(requires_grad=False)


def _rate_share(config: TemporalFitConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to `final_rate_share`."""
    if step < config.num_warmup_steps:
        return (step + 1) / config.num_warmup_steps
    done = (step - config.num_warmup_steps) / max(1, config.num_steps - config.num_warmup_steps)
    low = config.final_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
