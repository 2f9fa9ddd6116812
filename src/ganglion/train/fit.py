"""Fit: behaviour cloning with flow matching, and training-time real-time chunking.

Owns the loss, the optimiser's schedule and resumable training states. Called by the CLI. Knows no simulator.

Weights are kept in float32 and computed with in bfloat16. Half of the noise draws see a committed prefix of 1 to
`max_prefix` actions: those tokens are given clean at flow time 1 and take no part in the loss (arXiv 2512.05964).
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ganglion.clock import Clock, RealClock
from ganglion.errors import CheckpointError
from ganglion.models.policies.flow import FlowConfig, FlowPolicy
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.tokenizer import WordTokenizer
from ganglion.train.dataset import ANY, AugmentConfig, Batch, Dataset, Statistics, prompts

_STATE_FILE = "training_state.safetensors"
MODEL = FlowConfig(vocab_size=96)  # what the shipped policy is


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """One training run."""

    num_steps: int = 7600
    batch_size: int = 64
    num_draws: int = 2  # noise draws per encoded observation: the expert is cheap beside perception
    learning_rate: float = 8e-4
    final_rate_share: float = 0.02
    num_warmup_steps: int = 200
    weight_decay: float = 0.02
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.998
    prefix_share: float = 0.5
    target_loss_weight: float = 0.5
    num_steps_per_state: int = 250
    num_threads: int = 1
    seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProgress:
    """Reported after every step; losses are running means."""

    step: int
    num_steps: int
    flow_loss: float
    target_loss: float
    step_s: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The averaged weights, float32, and what belongs to them."""

    policy: FlowPolicy
    tokenizer: WordTokenizer
    statistics: Statistics
    step: int


class _Trainee(nn.Module):
    """The policy and a head that only training uses: it makes the trunk say where the object is, seen from the hand."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.policy = FlowPolicy(config)
        self.target_head = nn.Linear((config.num_views + 1) * config.trunk_width, 6)

    def losses(self, batch: Batch, token_ids: Tensor, draw: "Draw") -> tuple[Tensor, Tensor]:
        policy, config = self.policy, self.policy.config
        dtype, rows = policy.dtype, len(batch.state)
        text_kv = policy.prefill_text(token_ids)[torch.from_numpy(batch.prompt_index)]
        features = policy.encode_views(torch.from_numpy(batch.images))
        observation_kv, hidden = policy.observe(
            features, torch.from_numpy(batch.state).to(dtype), text_kv
        )
        views = hidden[:, :-1].reshape(rows, config.num_views, config.num_view_tokens, -1).mean(2)
        seen = torch.cat([views, hidden[:, -1:]], dim=1).flatten(1)
        target_loss = functional.smooth_l1_loss(
            self.target_head(seen).float(), torch.from_numpy(batch.target)
        )
        num_draws = draw.noise.shape[0] // rows
        context_kv = torch.cat([text_kv, observation_kv], dim=3).repeat_interleave(num_draws, 0)
        action = torch.from_numpy(batch.chunk).repeat_interleave(num_draws, 0)
        x = torch.lerp(draw.noise, action, draw.tau[..., None])
        velocity = policy.velocity(x.to(dtype), draw.tau, context_kv).float()
        error = (velocity - (action - draw.noise)).square().mean(-1)
        flow_loss = error[draw.tau < 1.0].mean()
        return flow_loss, target_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Noise [row, horizon, action] and flow time [row, horizon] of one step; committed tokens stand at time 1."""

    noise: Tensor
    tau: Tensor


def draw_of_step(
    config: FitConfig, model: FlowConfig, *, step: int, num_committed: npt.NDArray[np.int64]
) -> Draw:
    """The noise of one step, from the seed and the step alone; a row for each of `num_committed`, the given actions."""
    num_rows = len(num_committed)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    noise = torch.randn(num_rows, model.horizon, model.action_dim, generator=generator)
    # dense near the noise, where the choice between futures is made (as pi0's beta distribution)
    tau = 1.0 - torch.rand(num_rows, 1, generator=generator) ** (1 / 1.5)
    tau = tau.clamp(max=0.999).expand(-1, model.horizon)
    length = torch.randint(1, model.max_prefix + 1, (num_rows, 1), generator=generator)
    has_prefix = torch.rand(num_rows, 1, generator=generator) < config.prefix_share
    known = torch.from_numpy(num_committed)[:, None]
    length = torch.where(known == ANY, length * has_prefix, known)
    is_committed = torch.arange(model.horizon)[None] < length
    return Draw(noise=noise, tau=torch.where(is_committed, 1.0, tau))


def fit(
    config: FitConfig,
    data_dir: Path,
    run_dir: Path,
    on_progress: Callable[[FitProgress], None],
    *,
    model: FlowConfig = MODEL,
    until_step: int | None = None,
    start: FlowCheckpoint | None = None,
    clock: Clock | None = None,
) -> FitResult:
    """Train from the last state in `run_dir`, if there is one, to `until_step` (None: `config.num_steps`).

    `start`: whose weights and statistics a run begins with, instead of random ones.

    The learning rate follows `config.num_steps` wherever this call stops, so a run may be cut and continued.
    """
    clock = clock or RealClock()
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = WordTokenizer.from_prompts(
        prompts(), num_tokens=model.num_text_tokens, vocab_size=model.vocab_size
    )
    token_table = torch.from_numpy(np.stack([tokenizer.encode(prompt) for prompt in prompts()]))
    trainee = _Trainee(model)
    run = _Run(trainee, config)
    has_state = (run_dir / _STATE_FILE).exists()
    step, statistics = 0, None
    if has_state:
        step, statistics = run.load(run_dir)
    elif start is not None:
        statistics = run.start(start)
    dataset = Dataset(data_dir, statistics)
    trainee.to(torch.bfloat16)
    last_step = config.num_steps if until_step is None else min(until_step, config.num_steps)
    flow_mean = target_mean = step_s_mean = math.nan
    while step < last_step:
        start_s = clock.now_s()
        batch = dataset.batch(
            step=step, batch_size=config.batch_size, seed=config.seed, augment=config.augment
        )
        num_committed = batch.num_committed.repeat(config.num_draws)
        draw = draw_of_step(config, model, step=step, num_committed=num_committed)
        token_ids = _with_unknown_words(token_table, config, step=step)
        flow_loss, target_loss = trainee.losses(batch, token_ids, draw)
        torch.autograd.backward(flow_loss + config.target_loss_weight * target_loss)
        rate = learning_rate(config, step)
        run.update(rate, step)
        step += 1
        flow_mean = _running(flow_mean, float(flow_loss.detach()))
        target_mean = _running(target_mean, float(target_loss.detach()))
        step_s_mean = _running(step_s_mean, clock.now_s() - start_s)
        on_progress(
            FitProgress(
                step=step,
                num_steps=config.num_steps,
                flow_loss=flow_mean,
                target_loss=target_mean,
                step_s=step_s_mean,
                learning_rate=rate,
            )
        )
        if step % config.num_steps_per_state == 0 or step == last_step:
            run.save(run_dir, step, dataset.statistics)
    return FitResult(
        policy=run.averaged_policy(),
        tokenizer=tokenizer,
        statistics=dataset.statistics,
        step=step,
    )


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to `final_rate_share`."""
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    done = (step - config.num_warmup_steps) / max(1, config.num_steps - config.num_warmup_steps)
    low = config.final_rate_share
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class _Run:
    """Float32 weights, their moments and their running average; the bfloat16 trainee is a copy of them."""

    def __init__(self, trainee: _Trainee, config: FitConfig) -> None:
        self._trainee, self._config = trainee, config
        self._weights = {
            name: value.detach().float().clone() for name, value in trainee.named_parameters()
        }
        self._averages = {name: value.clone() for name, value in self._weights.items()}
        decayed = [value for value in self._weights.values() if value.ndim > 1]
        rest = [value for value in self._weights.values() if value.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True
        )

    def update(self, rate: float, step: int) -> None:
        """One optimiser step from the trainee's gradients, which are then cleared."""
        parameters = dict(self._trainee.named_parameters())
        for name, weight in self._weights.items():
            gradient = parameters[name].grad
            weight.grad = None if gradient is None else gradient.float()
            parameters[name].grad = None
        nn.utils.clip_grad_norm_(list(self._weights.values()), self._config.max_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        decay = min(self._config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), 1 - decay)
        self._copy_into_trainee()

    def start(self, checkpoint: FlowCheckpoint) -> Statistics:
        """Begin with the weights of `checkpoint`: the statistics that belong to them."""
        for name, value in checkpoint.policy.state_dict().items():
            self._weights[f"policy.{name}"].copy_(value)
            self._averages[f"policy.{name}"].copy_(value)
        self._copy_into_trainee()
        state, action = (
            checkpoint.processor.state_statistics,
            checkpoint.processor.action_statistics,
        )
        return Statistics(
            state_mean=state.mean.numpy(),
            state_std=state.std.numpy(),
            action_mean=action.mean.numpy(),
            action_std=action.std.numpy(),
        )

    def averaged_policy(self) -> FlowPolicy:
        """The policy with averaged weights, float32."""
        policy = FlowPolicy(self._trainee.policy.config)
        prefix = "policy."
        averages = {
            name: value for name, value in self._averages.items() if name.startswith(prefix)
        }
        policy.load_state_dict(
            {name.removeprefix(prefix): value for name, value in averages.items()}
        )
        return policy.eval()

    def save(self, run_dir: Path, step: int, statistics: Statistics) -> None:
        """Write the whole training state; the old one stays until the new one is complete."""
        tensors: dict[str, Tensor] = {
            f"statistics.{name}": torch.from_numpy(value)
            for name, value in asdict(statistics).items()
        }
        for name, weight in self._weights.items():
            tensors[f"weight.{name}"] = weight
            tensors[f"average.{name}"] = self._averages[name]
            moments = self._optimizer.state[weight]
            tensors[f"mean.{name}"] = moments["exp_avg"]
            tensors[f"square.{name}"] = moments["exp_avg_sq"]
        target = run_dir / _STATE_FILE
        partial = target.with_suffix(".partial")
        save_file(tensors, partial, {"step": str(step), "config": json.dumps(asdict(self._config))})
        os.replace(partial, target)

    def load(self, run_dir: Path) -> tuple[int, Statistics]:
        """Continue from the state in `run_dir`: its step and the data's statistics.

        Raises CheckpointError when it does not fit.
        """
        path = run_dir / _STATE_FILE
        with safe_open(path, framework="pt") as state:
            step = int(state.metadata()["step"])
            for name, weight in self._weights.items():
                stored = {
                    kind: state.get_tensor(f"{kind}.{name}")
                    for kind in ("weight", "average", "mean", "square")
                }
                if stored["weight"].shape != weight.shape:
                    raise CheckpointError(
                        f"{path}: {name} expected {tuple(weight.shape)}, got {tuple(stored['weight'].shape)}",
                        next_step="train into an empty run folder, or with the sizes of the old run",
                    )
                weight.copy_(stored["weight"])
                self._averages[name].copy_(stored["average"])
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": stored["mean"],
                    "exp_avg_sq": stored["square"],
                }
            statistics = Statistics(
                **{
                    field.name: state.get_tensor(f"statistics.{field.name}").numpy()
                    for field in fields(Statistics)
                }
            )
        self._copy_into_trainee()
        return step, statistics

    def _copy_into_trainee(self) -> None:
        with torch.no_grad():
            for name, parameter in self._trainee.named_parameters():
                parameter.copy_(self._weights[name])


def averaged_policy(run_dir: Path, *, model: FlowConfig = MODEL) -> FitResult:
    """The averaged weights of the last state in `run_dir`, without training on."""
    tokenizer = WordTokenizer.from_prompts(
        prompts(), num_tokens=model.num_text_tokens, vocab_size=model.vocab_size
    )
    run = _Run(_Trainee(model), FitConfig())
    step, statistics = run.load(run_dir)
    return FitResult(
        policy=run.averaged_policy(), tokenizer=tokenizer, statistics=statistics, step=step
    )


def between(start: FlowCheckpoint, result: FitResult, share: float) -> FitResult:
    """`share` of the way from the weights it began with to those it learnt (WiSE-FT, arXiv 2109.01903).

    A short training on few scenes forgets some of what a long one knew; weights in between keep most of both.
    """
    policy = FlowPolicy(result.policy.config)
    learnt = result.policy.state_dict()
    policy.load_state_dict(
        {
            name: torch.lerp(value.float(), learnt[name], share)
            for name, value in start.policy.state_dict().items()
        }
    )
    return replace(result, policy=policy.eval())


def _with_unknown_words(token_table: Tensor, config: FitConfig, *, step: int) -> Tensor:
    """Now and then a word is replaced by the unknown one, so that a strange word at run time is nothing new."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 1)
    is_lost = torch.rand(token_table.shape, generator=generator) < config.augment.unknown_word_share
    return torch.where(is_lost & (token_table > 1), torch.ones_like(token_table), token_table)


def _running(mean: float, value: float) -> float:
    return value if math.isnan(mean) else 0.98 * mean + 0.02 * value
