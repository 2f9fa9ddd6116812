"""Evaluate: closed-loop episodes in process, many arms to a forward, with the delay that a server adds.

Owns the success tables and the processes that fill them. Called by the CLI, the recipe and `bench delay`. Knows no server:
the same figures through the server are `ganglion bench control`. What becomes of a late chunk: `rollout`.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from ganglion.errors import FieldError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.registry import DTYPES
from ganglion.robots.catalog import Arm, check_world, open_arm
from ganglion.robots.metaworld import MAX_TICKS, TASKS, UNSEEN_SEEDS, task_named
from ganglion.train.actor import Actor
from ganglion.train.rollout import Episode, RolloutConfig, mean_square, run_episodes
from ganglion.types import Execution

CONFIGS_PER_PROCESS = (
    8  # worlds take a second each to open, and a task under many configs takes minutes
)


class Instruction(StrEnum):
    """What the arm is told."""

    OWN = "own"
    OPPOSITE = "opposite"  # the opposite task's words: the arm must not solve the task then


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Which episodes, and how the chunks are used. `world`: name in `robots.catalog` of the world that has the tasks."""

    world: str = "metaworld"
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = tuple(UNSEEN_SEEDS)
    instruction: Instruction = Instruction.OWN
    execution: Execution = Execution.NAIVE
    ticks_per_chunk: int = 3
    delay_ticks: int = 1
    is_context_public: bool = False
    max_ticks: int = MAX_TICKS
    num_flow_steps: int = 5
    dtype: str = "bfloat16"
    num_parallel: int = 10
    num_workers: int = 2
    num_threads: int = 1

    @property
    def rollout(self) -> RolloutConfig:
        """What each episode needs of it."""
        return RolloutConfig(
            execution=self.execution,
            ticks_per_chunk=self.ticks_per_chunk,
            delay_ticks=self.delay_ticks,
            is_context_public=self.is_context_public,
            max_ticks=self.max_ticks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Episodes of one task. `solved_ticks`: seed -> ticks to success, None when it was not solved.

    `switch_jump`: mean squared change of the motion at the ticks at which a new chunk took over; `jerk`: mean squared
    second difference of the motion over all ticks. Actions are the unit.
    """

    task: str
    prompt: str
    solved_ticks: dict[int, int | None]
    switch_jump: float = 0.0
    jerk: float = 0.0

    @property
    def success_rate(self) -> float:
        return sum(ticks is not None for ticks in self.solved_ticks.values()) / len(
            self.solved_ticks
        )

    @property
    def mean_ticks(self) -> float:
        """Mean ticks to success of the solved episodes; NaN when none was."""
        solved = [ticks for ticks in self.solved_ticks.values() if ticks is not None]
        return float(np.mean(solved)) if solved else float("nan")


def evaluate(
    config: EvaluateConfig, checkpoint_dir: Path, on_result: Callable[[TaskResult], None]
) -> tuple[TaskResult, ...]:
    """Run all episodes; `on_result` hears of each task as it ends. Opposite instructions need tasks that have one."""
    (results,) = evaluate_each([config], checkpoint_dir, lambda _, result: on_result(result))
    return results


def evaluate_each(
    configs: Sequence[EvaluateConfig],
    checkpoint_dir: Path,
    on_result: Callable[[int, TaskResult], None],
) -> tuple[tuple[TaskResult, ...], ...]:
    """The results of each config, by task. They share worlds, network and processes, so they differ in use of chunks only.

    `on_result` hears the place of the config and the result of a task, some configs of a task at a time.
    """
    first = configs[0]
    for config in configs:
        same = ("world", "tasks", "num_flow_steps", "dtype", "num_parallel", "num_workers")
        for name in (*same, "num_threads"):
            if getattr(config, name) != getattr(first, name):
                got = f"{getattr(first, name)} and {getattr(config, name)}"
                raise FieldError(name, expected="the same in all configs", got=got)
        for name in config.tasks:
            check_world(f"{config.world}:{name}")
            if config.instruction is Instruction.OPPOSITE and task_named(name).opposite is None:
                raise FieldError("tasks", expected="tasks with an opposite", got=name)
    results: dict[int, dict[str, TaskResult]] = {at: {} for at in range(len(configs))}
    orders = [
        _Order(
            configs=tuple(configs[start : start + CONFIGS_PER_PROCESS]),
            first_config=start,
            task=name,
            checkpoint_dir=str(checkpoint_dir),
        )
        for start in range(0, len(configs), CONFIGS_PER_PROCESS)
        for name in first.tasks
    ]
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(first.num_workers, maxtasksperchild=1) as pool:
        for start, of_task in pool.imap_unordered(_evaluate_task, orders, chunksize=1):
            for at, result in enumerate(of_task, start):
                results[at][result.task] = result
                on_result(at, result)
    return tuple(tuple(of_config[name] for name in first.tasks) for of_config in results.values())


def ambiguous_tasks() -> tuple[str, ...]:
    """The tasks whose scenes do not tell them from their opposite."""
    return tuple(name for name, task in TASKS.items() if task.opposite is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """One task under some of the configs, from number `first_config` on: the work of one process."""

    configs: tuple[EvaluateConfig, ...]
    first_config: int
    task: str
    checkpoint_dir: str


def _evaluate_task(order: _Order) -> tuple[int, list[TaskResult]]:
    first = order.configs[0]
    torch.set_num_threads(first.num_threads)
    checkpoint = load_flow_checkpoint(Path(order.checkpoint_dir), dtype=DTYPES[first.dtype])
    actor = Actor(checkpoint, num_flow_steps=first.num_flow_steps)
    num_arms = min(first.num_parallel, max(len(config.seeds) for config in order.configs))
    arms = [open_arm(f"{first.world}:{order.task}") for _ in range(num_arms)]
    try:
        results = [_evaluate_one(config, order.task, arms, actor) for config in order.configs]
        return order.first_config, results
    finally:
        for arm in arms:
            arm.world.close()


def _evaluate_one(
    config: EvaluateConfig, task: str, arms: Sequence[Arm], actor: Actor
) -> TaskResult:
    prompt = TASKS[task].prompt
    if config.instruction is Instruction.OPPOSITE:
        opposite = TASKS[task].opposite
        assert opposite is not None, task
        prompt = TASKS[opposite].prompt
    episodes: list[Episode] = []
    for start in range(0, len(config.seeds), len(arms)):
        wave = [
            Episode(arm, seed, prompt, config.rollout)
            for arm, seed in zip(arms, config.seeds[start : start + len(arms)], strict=False)
        ]
        run_episodes(wave, actor)
        episodes += wave
    return TaskResult(
        task=task,
        prompt=prompt,
        solved_ticks={episode.seed: episode.solved_tick for episode in episodes},
        switch_jump=mean_square(jump for e in episodes for jump in e.switch_jumps()),
        jerk=mean_square(jerk for e in episodes for jerk in e.jerks()),
    )
