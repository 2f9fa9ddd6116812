"""Recipe: everything from nothing to a checkpoint folder with its measured card, and from there to one for late chunks.

Called by `ganglion train all` and `ganglion train delays`.

Owns the order of the parts. Every part keeps what it has finished, so a stopped recipe continues where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ganglion.errors import FieldError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.train.card import Figures, write_card
from ganglion.train.corrections import CorrectConfig, correct
from ganglion.train.dataset import Dataset
from ganglion.train.delays import DelayedConfig, drive_late
from ganglion.train.demonstrations import CollectConfig, CollectProgress, collect
from ganglion.train.evaluate import (
    EvaluateConfig,
    Instruction,
    TaskResult,
    ambiguous_tasks,
    evaluate,
)
from ganglion.train.fit import FitConfig, FitProgress, FitResult, between, fit
from ganglion.train.ship import ship

LEARNT_SHARE = 0.7  # of what training with late chunks learnt; the rest is what was there before
Report = CollectProgress | FitProgress | TaskResult
OnReport = Callable[[Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionRound:
    """Corrections of the policy as it stands after `after_step` training steps."""

    after_step: int
    config: CorrectConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayRound:
    """Episodes with late chunks of the policy as it stands, and training on all of them gathered so far."""

    drive: DelayedConfig
    fit: FitConfig


def delay_rounds(num_workers: int = 2) -> tuple[DelayRound, ...]:
    """Those of the shipped `metaworld-ten-late`."""
    first = FitConfig(
        num_steps=1200,
        learning_rate=4e-4,
        num_warmup_steps=100,
        target_loss_weight=0.1,
        seed=1,
    )
    again = DelayedConfig(
        num_still_shards=1,
        num_moving_shards=2,
        num_crossed_shards=2,
        hard_factor=4,
        first_seed=9_400,
        round_name="delayed2",
        num_workers=num_workers,
    )
    return (
        DelayRound(drive=DelayedConfig(num_workers=num_workers), fit=first),
        DelayRound(drive=again, fit=replace(first, num_steps=1300, learning_rate=3e-4, seed=2)),
    )


def _rounds() -> tuple[CorrectionRound, ...]:
    second = CorrectConfig(
        num_shards=0,
        num_hard_shards=7,
        num_crossed_shards=0,
        hard_tasks=("pick-place",),
        first_seed=8_000,
        round_name="corrected2",
    )
    return (
        CorrectionRound(after_step=3000, config=CorrectConfig()),
        CorrectionRound(after_step=4500, config=second),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    """The parts of the shipped policy's recipe."""

    collect: CollectConfig = field(default_factory=CollectConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    rounds: tuple[CorrectionRound, ...] = field(default_factory=_rounds)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def run_recipe(
    config: RecipeConfig, *, data_dir: Path, run_dir: Path, out_dir: Path, on_report: OnReport
) -> Figures:
    """Collect, fit with rounds of corrections, evaluate; writes the checkpoint and its card into `out_dir`."""
    collect(config.collect, data_dir, on_report)
    for number, correction in enumerate(config.rounds):
        draft_dir = run_dir / f"draft-{number}"
        if not draft_dir.exists():
            draft = fit(config.fit, data_dir, run_dir, on_report, until_step=correction.after_step)
            ship(draft, draft_dir)
        correct(correction.config, draft_dir, data_dir, on_report)
    result = fit(config.fit, data_dir, run_dir, on_report)
    ship(result, out_dir)
    return measure(config.evaluate, result, data_dir=data_dir, out_dir=out_dir, on_report=on_report)


def tune_for_delays(
    rounds: Sequence[DelayRound],
    start_dir: Path,
    data_dir: Path,
    run_dir: Path,
    on_report: OnReport,
) -> FitResult:
    """Rounds of driving with late chunks and of training, from the checkpoint in `start_dir` on.

    A round drives with what the round before has learnt; all of `data_dir` is trained on. The result lies LEARNT_SHARE of
    the way from the start to what was learnt. `step`: of all rounds.
    """
    first = start = load_flow_checkpoint(start_dir, dtype=torch.float32)
    result: FitResult | None = None
    num_steps = 0
    for number, part in enumerate(rounds):
        drive_late(part.drive, start_dir, data_dir, on_report)
        folder = run_dir / f"delays-{number}"
        result = fit(part.fit, data_dir, folder, on_report, start=start)
        start_dir = folder / "checkpoint"
        ship(result, start_dir)
        start = load_flow_checkpoint(start_dir, dtype=torch.float32)
        num_steps += result.step
    if result is None:
        raise FieldError("rounds", expected="at least one", got="none")
    return replace(between(first, result, LEARNT_SHARE), step=num_steps)


def measure(
    config: EvaluateConfig, result: FitResult, *, data_dir: Path, out_dir: Path, on_report: OnReport
) -> Figures:
    """Evaluate the checkpoint in `out_dir` in all three ways, and write its card."""
    opposite = replace(config, instruction=Instruction.OPPOSITE, tasks=ambiguous_tasks())
    figures = Figures(
        delayed=evaluate(config, out_dir, on_report),
        undelayed=evaluate(replace(config, delay_ticks=0), out_dir, on_report),
        opposite=evaluate(opposite, out_dir, on_report),
        delay_ticks=config.delay_ticks,
        num_flow_steps=config.num_flow_steps,
        num_samples=len(Dataset(data_dir)),
        num_steps=result.step,
        num_parameters=sum(value.numel() for value in result.policy.parameters()),
    )
    write_card(figures, out_dir)
    return figures
