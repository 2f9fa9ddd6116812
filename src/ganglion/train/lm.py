"""Language model training: next-byte loss, balanced experts, resumable training states.

Owns the loss, the optimiser's schedule and the states on disk. Called by the CLI. Shipping and measuring are
`train.lm_ship`'s and `train.lm_evaluate`'s.

Weights are kept in float32 and computed with in bfloat16. Most steps see short sequences, because attention
is what costs most at this width; one in sixteen sees sequences as long as the model's limit, so that late positions work too.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ganglion.clock import Clock, RealClock
from ganglion.errors import CheckpointError
from ganglion.train.lm_corpus import Corpus
from ganglion.train.lm_model import LmConfig, TrainedLm, balance_loss

STATE_FILE = "training_state.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LmFitConfig:
    """One training run."""

    num_steps: int = 1500
    tokens_per_step: int = 4096
    length: int = 256
    long_length: int = 2048
    num_steps_per_long: int = 16  # one step in so many sees `long_length`
    learning_rate: float = 4e-3  # AdamW: embedding, scores, routers, norms
    matrix_learning_rate: float = 0.02  # Muon: everything else
    momentum: float = 0.95
    final_rate_share: float = 0.01
    num_warmup_steps: int = 50
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    balance_weight: float = 0.01
    num_steps_per_state: int = 50
    num_threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LmProgress:
    """Reported after every step; losses are running means, `loss` in nats per byte."""

    step: int
    num_steps: int
    loss: float
    balance: float
    step_s: float
    rate_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LmResult:
    """A trained model, bfloat16, after `step` steps that took `train_s` in all."""

    model: TrainedLm
    step: int
    train_s: float


def fit_lm(
    config: LmFitConfig,
    model_config: LmConfig,
    corpus: Corpus,
    run_dir: Path,
    on_progress: Callable[[LmProgress], None],
    *,
    until_step: int | None = None,
    clock: Clock | None = None,
) -> LmResult:
    """Train from the last state in `run_dir`, if there is one, to `until_step` (None: `config.num_steps`).

    The learning rate follows `config.num_steps` wherever this call stops, so a run may be cut and continued.
    """
    clock = clock or RealClock()
    torch.set_num_threads(config.num_threads)
    run_dir.mkdir(parents=True, exist_ok=True)
    model = TrainedLm(model_config)
    model.initialise(config.seed)
    run = _Run(model, config, corpus)
    if (run_dir / STATE_FILE).exists():
        run.load(run_dir)
    tokens = torch.from_numpy(corpus.train.astype("int64"))
    last_step = config.num_steps if until_step is None else min(until_step, config.num_steps)
    loss_mean = balance_mean = math.nan
    while run.step < last_step:
        start_s = clock.now_s()
        share = rate_share(config, run.step)
        loss, balance = run.advance(batch_of_step(config, tokens, step=run.step), share)
        step_s = clock.now_s() - start_s
        run.train_s += step_s
        loss_mean, balance_mean = _running(loss_mean, loss), _running(balance_mean, balance)
        on_progress(
            LmProgress(
                step=run.step,
                num_steps=config.num_steps,
                loss=loss_mean,
                balance=balance_mean,
                step_s=step_s,
                rate_share=share,
            )
        )
        if run.step % config.num_steps_per_state == 0 or run.step == last_step:
            run.save(run_dir)
    return LmResult(model=model.eval(), step=run.step, train_s=run.train_s)


def batch_of_step(config: LmFitConfig, tokens: Tensor, *, step: int) -> Tensor:
    """Token ids [row, length + 1] of one step, from the seed and the step alone."""
    is_long = step % config.num_steps_per_long == config.num_steps_per_long - 1
    length = config.long_length if is_long else config.length
    length = min(length, len(tokens) - 1)
    num_rows = max(1, config.tokens_per_step // length)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - length, (num_rows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length + 1)]


def rate_share(config: LmFitConfig, step: int) -> float:
    """Of a step, as a share of the highest: linear warm-up, then linear down to `final_rate_share`."""
    if step < config.num_warmup_steps:
        return (step + 1) / config.num_warmup_steps
    done = (step - config.num_warmup_steps) / max(1, config.num_steps - config.num_warmup_steps)
    return 1 - (1 - config.final_rate_share) * min(done, 1.0)


def is_matrix(name: str) -> bool:
    """Whether a parameter is a map between hidden states, which Muon moves."""
    return name.endswith(("_proj.weight", "mlp.gate_up", "mlp.down"))


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor U V' of each matrix [..., row, column], by five Newton-Schulz turns.

    Coefficients and idea: Muon (Jordan et al., 2024). Singular values come out between about 0.7 and 1.2.
    """
    x = matrices.to(torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    turned: Tensor = x.mT if is_tall else x
    return turned.float()


class _Run:
    """Float32 weights, their moments, and how far the run is; the bfloat16 model is a copy of them."""

    def __init__(self, model: TrainedLm, config: LmFitConfig, corpus: Corpus) -> None:
        self.step, self.train_s = 0, 0.0
        self._model, self._config, self._corpus = model, config, corpus
        self._weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        model.to(torch.bfloat16)
        self._momenta = {
            name: torch.zeros_like(value)
            for name, value in self._weights.items()
            if is_matrix(name)
        }
        rest = {name: value for name, value in self._weights.items() if not is_matrix(name)}
        decayed = [value for value in rest.values() if value.ndim > 1]
        others = [value for value in rest.values() if value.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True
        )

    def advance(self, token_ids: Tensor, rate_share: float) -> tuple[float, float]:
        """One step; returns its loss in nats per byte and its balance (1: all experts alike; 0: no experts)."""
        scores, routings = self._model(token_ids[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), token_ids[:, 1:].flatten())
        balance = balance_loss(routings) if routings else torch.zeros(())
        torch.autograd.backward(loss + self._config.balance_weight * balance)
        for name, parameter in self._model.named_parameters():
            gradient = parameter.grad
            self._weights[name].grad = None if gradient is None else gradient.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(list(self._weights.values()), self._config.max_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * rate_share
        self._turn_matrices(self._config.matrix_learning_rate * rate_share)
        self._optimizer.step()
        self._copy_into_model()
        self.step += 1
        return float(loss.detach()), float(balance.detach())

    def _turn_matrices(self, rate: float) -> None:
        """Muon with Nesterov momentum: each matrix moves by the nearest orthogonal one to its gradient's mean."""
        momentum = self._config.momentum
        for name, mean in self._momenta.items():
            weight = self._weights[name]
            gradient = weight.grad
            if gradient is None:
                continue
            mean.lerp_(gradient, 1 - momentum)
            ahead = gradient.lerp(mean, momentum)
            # gate and up stand above each other: two matrices
            parts = ahead.chunk(2, dim=-2) if name.endswith("gate_up") else (ahead,)
            turned = [
                orthogonal(part) * max(1.0, part.shape[-2] / part.shape[-1]) ** 0.5
                for part in parts
            ]
            weight.mul_(1 - rate * self._config.weight_decay)
            weight.sub_(torch.cat(turned, dim=-2), alpha=rate)
            weight.grad = None

    def save(self, run_dir: Path) -> None:
        """Write the whole training state; the old one stays until the new one is complete."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            tensors[f"weight.{name}"] = weight
            if name in self._momenta:
                tensors[f"mean.{name}"] = self._momenta[name]
                continue
            moments = self._optimizer.state[weight]
            tensors[f"mean.{name}"] = moments["exp_avg"]
            tensors[f"square.{name}"] = moments["exp_avg_sq"]
        facts = {
            "step": str(self.step),
            "train_s": repr(self.train_s),
            "corpus": self._corpus.sha256,
            "config": json.dumps(asdict(self._config)),
        }
        target = run_dir / STATE_FILE
        partial = target.with_suffix(".partial")
        save_file(tensors, partial, facts)
        os.replace(partial, target)

    def load(self, run_dir: Path) -> None:
        """Continue from the state in `run_dir`. Raises CheckpointError when it does not fit."""
        path = run_dir / STATE_FILE
        with safe_open(path, framework="pt") as state:
            facts = state.metadata()
            if facts["corpus"] != self._corpus.sha256:
                raise CheckpointError(
                    f"{path}: trained on corpus {facts['corpus'][:12]}, this installation gives"
                    f" {self._corpus.sha256[:12]}",
                    next_step="train into an empty run folder",
                )
            names = set(state.keys())
            for name, weight in self._weights.items():
                key = f"weight.{name}"
                found = tuple(state.get_slice(key).get_shape()) if key in names else None
                if found != tuple(weight.shape):
                    raise CheckpointError(
                        f"{path}: {name} expected {tuple(weight.shape)}, got {found}",
                        next_step="train into an empty run folder, or with the sizes of the old run",
                    )
                weight.copy_(state.get_tensor(key))
                if name in self._momenta:
                    self._momenta[name].copy_(state.get_tensor(f"mean.{name}"))
                    continue
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(facts["step"])),
                    "exp_avg": state.get_tensor(f"mean.{name}"),
                    "exp_avg_sq": state.get_tensor(f"square.{name}"),
                }
        self.step, self.train_s = int(facts["step"]), float(facts["train_s"])
        self._copy_into_model()

    def _copy_into_model(self) -> None:
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._weights[name])


def _running(mean: float, value: float) -> float:
    return value if math.isnan(mean) else 0.98 * mean + 0.02 * value
