"""`ganglion train`: the recipe of the shipped policy, stage by stage; each stage goes on where it stopped.

The stage `lm` is a recipe of its own, in `cli.train_lm`.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ganglion.cli import train_lm
from ganglion.config import PolicyConfig
from ganglion.errors import FieldError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.registry import DTYPES, policy_folder
from ganglion.robots.metaworld import UNSEEN_SEEDS
from ganglion.train.card import CARD_FILE, Figures, mean_success, write_card
from ganglion.train.corrections import CorrectConfig, correct
from ganglion.train.dataset import Dataset
from ganglion.train.demonstrations import CollectConfig, CollectProgress, collect, plan_shards
from ganglion.train.evaluate import (
    EvaluateConfig,
    Instruction,
    TaskResult,
    ambiguous_tasks,
    evaluate,
)
from ganglion.train.fit import FitConfig, FitProgress, averaged_policy, fit
from ganglion.train.recipe import (
    DelayRound,
    RecipeConfig,
    delay_rounds,
    run_recipe,
    tune_for_delays,
)
from ganglion.train.ship import ship

CHECKPOINT = "checkpoint"  # folder in --run that `fit` writes and `evaluate` reads
RUN_DIR = "runs/metaworld-ten"
HALF_WAY = "half-way"  # folder in --run: the policy whose mistakes `correct` corrects


def run(args: argparse.Namespace) -> int:
    """Run the stage, or all of them in order."""
    for name in ("episodes", "steps", "until", "eval_episodes", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise FieldError(f"--{name.replace('_', '-')}", expected="at least 1", got=str(value))
    args.run = args.run or (train_lm.RUN_DIR if args.stage == "lm" else RUN_DIR)
    for name in ("moe", "dense", "quick"):
        if getattr(args, name) and args.stage != "lm":
            raise FieldError(f"--{name}", expected="with the stage lm only", got=args.stage)
    match args.stage:
        case "lm":
            train_lm.run(args)
        case "collect":
            run_collect(args)
        case "fit":
            run_fit(args, until_step=args.until)
        case "correct":
            run_correct(args)
        case "delays":
            run_delays(args)
        case "evaluate":
            run_evaluate(args)
        case "all":
            run_all(args)
    return 0


def run_all(args: argparse.Namespace) -> None:
    """The whole recipe, rounds of corrections included, to a checkpoint with its card."""
    fitting = fit_config(args)
    rounds = tuple(r for r in RecipeConfig().rounds if r.after_step < fitting.num_steps)
    config = RecipeConfig(
        collect=collect_config(args),
        fit=fitting,
        rounds=rounds,
        evaluate=EvaluateConfig(seeds=unseen_seeds(args), num_workers=args.workers),
    )
    folder = Path(args.run) / CHECKPOINT
    with tqdm(desc="shards", unit="shard") as shards, tqdm(desc="fit", unit="step") as steps:
        steps.total = fitting.num_steps

        def on_report(report: CollectProgress | FitProgress | TaskResult) -> None:
            match report:
                case CollectProgress():
                    shards.total = report.num_shards
                    shards.n = report.num_shards_done
                    shards.set_postfix(samples=report.num_samples)
                case FitProgress():
                    steps.update(report.step - steps.n)
                    steps.set_postfix(flow=f"{report.flow_loss:.4f}")
                case TaskResult():
                    steps.write(
                        f"{report.task:<24} {report.prompt:<52} {report.success_rate:>8.2f}"
                    )

        figures = run_recipe(
            config,
            data_dir=Path(args.data),
            run_dir=Path(args.run),
            out_dir=folder,
            on_report=on_report,
        )
    print(f"mean success {mean_success(figures.delayed):.3f}; ganglion serve policy={folder}")


def run_collect(args: argparse.Namespace) -> None:
    """Demonstrations of the scripted experts, into --data."""
    config, folder = collect_config(args), Path(args.data)
    plans = plan_shards(config)
    num_there = sum((folder / plan.file_name).exists() for plan in plans)
    with tqdm(total=len(plans), initial=num_there, desc="collect", unit="shard") as bar:

        def on_progress(progress: CollectProgress) -> None:
            bar.update(progress.num_shards_done - bar.n)
            bar.set_postfix(samples=progress.num_samples, failed=progress.num_failed)

        collect(config, folder, on_progress)
    print(f"demonstrations in {folder}")


def collect_config(args: argparse.Namespace) -> CollectConfig:
    """The recipe's demonstrations, and what the flags change in them."""
    config = replace(CollectConfig(), num_workers=args.workers)
    if args.episodes is None:
        return config
    return replace(config, num_episodes=args.episodes, num_hard_episodes=args.episodes)


def unseen_seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """Starts that the published figures rest on, or the first few of them."""
    return tuple(UNSEEN_SEEDS)[: args.eval_episodes or len(UNSEEN_SEEDS)]


def fit_config(args: argparse.Namespace) -> FitConfig:
    """The recipe, and what the flags change in it."""
    config = replace(FitConfig(), seed=args.seed)
    return config if args.steps is None else replace(config, num_steps=args.steps)


def run_fit(args: argparse.Namespace, *, until_step: int | None) -> None:
    """Train on --data; training states and the checkpoint go to --run."""
    config, folder = fit_config(args), Path(args.run)
    with tqdm(total=until_step or config.num_steps, desc="fit", unit="step") as bar:

        def on_progress(progress: FitProgress) -> None:
            bar.update(progress.step - bar.n)
            bar.set_postfix(flow=f"{progress.flow_loss:.4f}", target=f"{progress.target_loss:.4f}")

        result = fit(config, Path(args.data), folder, on_progress, until_step=until_step)
    is_done = result.step >= config.num_steps
    target = folder / (CHECKPOINT if is_done else HALF_WAY)
    ship(result, target)
    print(f"step {result.step} of {config.num_steps}; ganglion serve policy={target}")


def run_correct(args: argparse.Namespace) -> None:
    """A second round of data: the half-trained policy drives, the experts say what they would have done."""
    half = Path(args.run) / HALF_WAY
    if not half.is_dir():
        raise FieldError(
            "--run",
            expected=f"a half-trained policy in {half}",
            got="none",
            next_step="ganglion train fit --until 2500",
        )
    with tqdm(desc="correct", unit="shard") as bar:

        def on_progress(progress: CollectProgress) -> None:
            bar.total = progress.num_shards
            bar.update(progress.num_shards_done - bar.n)
            bar.set_postfix(samples=progress.num_samples)

        correct(CorrectConfig(num_workers=args.workers), half, Path(args.data), on_progress)


def run_delays(args: argparse.Namespace) -> None:
    """From a trained policy on: it drives with late chunks, the experts say what to do, it learns that, twice."""
    start = policy_folder(args.checkpoint or PolicyConfig().path)
    with tqdm(desc="late chunks", unit="shard") as shards, tqdm(desc="fit", unit="step") as steps:

        def on_report(report: CollectProgress | FitProgress | TaskResult) -> None:
            match report:
                case CollectProgress():
                    shards.total = report.num_shards
                    shards.update(report.num_shards_done - shards.n)
                case FitProgress():
                    steps.total = report.num_steps
                    steps.update(report.step - steps.n)
                    steps.set_postfix(flow=f"{report.flow_loss:.4f}")

        folder, rounds = Path(args.run), delay_config(args)
        result = tune_for_delays(rounds, start, Path(args.data), folder, on_report)
    ship(result, folder / CHECKPOINT)
    print(f"step {result.step}; ganglion serve {folder / CHECKPOINT}")


def delay_config(args: argparse.Namespace) -> tuple[DelayRound, ...]:
    """The recipe's rounds with late chunks, and what the flags change in them."""
    rounds = delay_rounds(args.workers)
    if args.steps is None:
        return rounds
    fits = [replace(part.fit, num_steps=min(args.steps, part.fit.num_steps)) for part in rounds]
    return tuple(replace(part, fit=fitted) for part, fitted in zip(rounds, fits, strict=True))


def run_evaluate(args: argparse.Namespace) -> None:
    """Closed-loop success on unseen seeds, with the right and with the opposite instruction."""
    fitted = Path(args.run) / CHECKPOINT
    default = str(fitted) if fitted.is_dir() else PolicyConfig().path
    folder = policy_folder(args.checkpoint or default)
    seeds = unseen_seeds(args)
    num_seeds = len(seeds)
    own = EvaluateConfig(seeds=seeds, num_workers=args.workers)
    runs = {
        "own instruction": own,
        "own instruction, chunks without delay": replace(own, delay_ticks=0),
        "opposite instruction": replace(
            own, instruction=Instruction.OPPOSITE, tasks=ambiguous_tasks()
        ),
    }
    print(f"{folder}: {num_seeds} unseen seeds of each task")
    found = {name: evaluate_one(name, config, folder) for name, config in runs.items()}
    if args.json:
        success = {
            name: {result.task: result.success_rate for result in results}
            for name, results in found.items()
        }
        Path(args.json).write_text(
            json.dumps({"num_seeds": num_seeds, "success": success}, indent=1) + "\n"
        )
    if folder == fitted:
        delayed, undelayed, opposite = found.values()
        figures = Figures(
            delayed=delayed,
            undelayed=undelayed,
            opposite=opposite,
            delay_ticks=own.delay_ticks,
            num_flow_steps=own.num_flow_steps,
            num_samples=len(Dataset(Path(args.data))),
            num_steps=averaged_policy(Path(args.run)).step,
            num_parameters=num_parameters(folder),
        )
        write_card(figures, folder)
        print(f"model card: {folder / CARD_FILE}")


def evaluate_one(name: str, config: EvaluateConfig, folder: Path) -> tuple[TaskResult, ...]:
    """One table of success."""
    print(f"\n{name}\n{'task':<24} {'told':<52} {'success':>8} {'ticks':>7}")

    def on_result(result: TaskResult) -> None:
        ticks = "-" if result.success_rate == 0 else f"{result.mean_ticks:.0f}"
        print(f"{result.task:<24} {result.prompt:<52} {result.success_rate:>8.2f} {ticks:>7}")
        sys.stdout.flush()

    results = evaluate(config, folder, on_result)
    worst = min(result.success_rate for result in results)
    print(f"mean {mean_success(results):.3f}, lowest {worst:.2f}")
    return results


def num_parameters(folder: Path) -> int:
    """Of the policy in `folder`."""
    checkpoint = load_flow_checkpoint(folder, dtype=DTYPES["float32"])
    return sum(parameter.numel() for parameter in checkpoint.policy.parameters())
