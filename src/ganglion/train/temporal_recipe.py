"""Temporal recipe: from a trained flow policy to one with a memory, and its measured card. Called by the CLI.

Owns the order of the parts and the card's words. Every part keeps what it has finished, so a stopped recipe continues.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ganglion.models.policies.flow_checkpoint import FlowCheckpoint, load_flow_checkpoint
from ganglion.models.policies.temporal import TemporalPolicy
from ganglion.models.policies.temporal_checkpoint import (
    load_temporal_checkpoint,
    save_temporal_checkpoint,
)
from ganglion.robots.hidden import VISIBLE_TICKS
from ganglion.train.card import CARD_FILE, RESULTS_FILE
from ganglion.train.evaluate import TaskResult
from ganglion.train.temporal import TemporalFitConfig, TemporalProgress, fit_temporal
from ganglion.train.temporal_corrections import TemporalCorrectConfig, correct_temporal
from ganglion.train.temporal_data import TemporalCollectConfig, collect_temporal
from ganglion.train.temporal_evaluate import TemporalEvaluateConfig, evaluate_temporal

OnReport = Callable[[str], None]
_STEPS_PER_REPORT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalRecipeConfig:
    """The parts of the shipped memory's recipe."""

    collect: TemporalCollectConfig = field(default_factory=TemporalCollectConfig)
    fit: TemporalFitConfig = field(default_factory=lambda: TemporalFitConfig(num_steps=1500))
    correct: TemporalCorrectConfig = field(default_factory=TemporalCorrectConfig)
    refit: TemporalFitConfig = field(
        default_factory=lambda: TemporalFitConfig(
            num_steps=1500, memory_rate=3e-4, expert_rate=1e-4, seed=1
        )
    )
    evaluate: TemporalEvaluateConfig = field(default_factory=TemporalEvaluateConfig)


def run_temporal_recipe(
    config: TemporalRecipeConfig,
    *,
    base_dir: Path,
    data_dir: Path,
    run_dir: Path,
    out_dir: Path,
    on_report: OnReport,
) -> dict[str, tuple[TaskResult, ...]]:
    """Collect, fit, correct, fit on, evaluate; writes the checkpoint and its card into `out_dir`."""
    base = load_flow_checkpoint(base_dir, dtype=torch.bfloat16)
    draft_dir = run_dir / "draft"

    def on_shard(name: str, num_samples: int) -> None:
        on_report(f"{name}: {num_samples} samples")

    collect_temporal(config.collect, data_dir, on_shard)
    if not draft_dir.exists():
        draft = fit_temporal(config.fit, base, data_dir, _fit_report(on_report))
        _save(draft, base, base_dir, draft_dir)
    correct_temporal(config.correct, draft_dir, data_dir, on_shard)
    if not out_dir.exists():
        start = load_temporal_checkpoint(draft_dir, dtype=torch.bfloat16).policy
        policy = fit_temporal(config.refit, base, data_dir, _fit_report(on_report), start=start)
        _save(policy, base, base_dir, out_dir)
    return measure_temporal(config.evaluate, out_dir, on_report)


def measure_temporal(
    config: TemporalEvaluateConfig, out_dir: Path, on_report: OnReport, *, notes: str = ""
) -> dict[str, tuple[TaskResult, ...]]:
    """Evaluate the checkpoint in `out_dir` under every recollection, and write its card.

    `notes`: what the run behind it did differently from the recipe.
    """

    def on_result(name: str, result: TaskResult) -> None:
        on_report(f"{name}, {result.task}: {_share(result)}")

    results = evaluate_temporal(config, out_dir, on_result)
    write_temporal_card(config, results, out_dir, notes=notes)
    return results


def write_temporal_card(
    config: TemporalEvaluateConfig,
    results: Mapping[str, tuple[TaskResult, ...]],
    folder: Path,
    *,
    notes: str = "",
) -> None:
    """CARD_FILE, and RESULTS_FILE episode by episode."""
    episodes = {name: [asdict(of_task) for of_task in of_name] for name, of_name in results.items()}
    content = json.dumps(episodes, indent=1)
    (folder / RESULTS_FILE).write_text(content + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(_card(config, results, folder, notes), encoding="utf-8")


def _save(policy: TemporalPolicy, base: FlowCheckpoint, base_dir: Path, folder: Path) -> None:
    relative = os.path.relpath(base_dir, folder)
    save_temporal_checkpoint(folder, policy, base, base_dir=relative)


def _fit_report(on_report: OnReport) -> Callable[[TemporalProgress], None]:
    def report(progress: TemporalProgress) -> None:
        if progress.step % _STEPS_PER_REPORT == 0:
            on_report(
                f"step {progress.step}: flow {progress.flow_loss:.4f}, goal off by "
                f"{100 * progress.page_goal_m:.1f} cm (pages), {100 * progress.hidden_goal_m:.1f} cm (state)"
            )

    return report


def _share(result: TaskResult) -> str:
    return f"{100 * result.success_rate:.0f}%"


def _card(
    config: TemporalEvaluateConfig,
    results: Mapping[str, tuple[TaskResult, ...]],
    folder: Path,
    notes: str,
) -> str:
    policy = load_temporal_checkpoint(folder, dtype=torch.float32).policy
    num_trained = sum(value.numel() for value in policy.trained().values())
    num_all = sum(value.numel() for value in policy.parameters())
    rows = []
    for name, of_tasks in results.items():
        mean = sum(result.success_rate for result in of_tasks) / len(of_tasks)
        cells = " | ".join(_share(result) for result in of_tasks)
        ticks = " / ".join(f"{result.mean_ticks:.0f}" for result in of_tasks)
        rows.append(f"| {name} | {cells} | **{100 * mean:.0f}%** | {ticks} |")
    tasks = " | ".join(config.tasks)
    low, high = VISIBLE_TICKS
    return f"""# {folder.name}

metaworld-ten with a memory: the goal of push and pick-place is shown for the first {low} to {high} ticks of an episode, then
the marker is gone, and the arm must still bring the puck there. {num_all / 1e6:.1f} M parameters, of which {num_trained / 1e6:.1f} M are this
folder's (the memory, and the action expert that learned to read it); eyes, words and trunk are metaworld-ten's, unchanged.

Of each observation a memory page of 5 KB stays (bfloat16; 2.5 KB as int8). Up to {policy.config.num_past} earlier ones are read as
tokens (history), and a GRU of {policy.config.hidden_dim} numbers runs over all of them (its state is a page of {4 * policy.config.hidden_dim} bytes). A full history drops
what the action expert attends to least (decayed attention mass), not what is oldest.

## Success
Closed loop, {len(config.seeds)} starts a task (the same for all rows), at most {config.max_ticks} ticks, a new chunk every {config.ticks_per_chunk} ticks that arrives {config.delay_ticks}
tick later, {config.num_flow_steps} flow steps, {config.dtype}. Rows are one set of weights with parts of its memory taken away, except for `base`:
metaworld-ten itself. `none`: neither road. `history`: {policy.config.num_past} pages. `int8`: one page as written, six as int8 (`short`: two).
`window`: the {policy.config.num_past} newest pages, whatever attention says. `gru`: the recurrent state alone.

| memory | {tasks} | mean | ticks to success |
|---|{"---|" * len(config.tasks)}---|---|
{chr(10).join(rows)}

Episode by episode: {RESULTS_FILE}.

## Recipe
`train.temporal_recipe`: episodes of Meta-World's scripted experts under execution noise, an observation every 3 ticks, each
labelled with the expert's noise-free next 48 actions; eyes and trunk are frozen, so every frame is encoded once. The memory
is trained from nothing and the action expert goes on from metaworld-ten's, by the flow matching loss and by two auxiliary
heads (not in the checkpoint) that must tell where the goal is, from a page that saw it and from the recurrent state. Each road
is left out in 30% of the rows. Then corrections: the policy drives, the expert says what it would have done (DAgger), and
training goes on with both.
{notes}
## Limits
Two tasks of metaworld-ten's ten, canonical instructions; the others were not trained on and are not claimed. The memory counts
observations and saw one every {config.ticks_per_chunk} ticks in training; other rates age its pages faster or slower. `action_prefix` was trained
with, and is not measured here. With {len(config.seeds)} starts a cell, differences under ten points may be chance.
Not for real robots.
"""
