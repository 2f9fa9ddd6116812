"""Evaluate: closed-loop episodes in process, many arms to a forward, with the delay that a server adds.

Owns the success tables. Called by the CLI. Knows no server: the same figures through the server are `ganglion bench
control`. The chunk is planned anew every `ticks_per_chunk` ticks from the newest picture; it arrives `delay_ticks`
later and its rows are executed at the ticks they were meant for.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from ganglion.errors import FieldError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.registry import DTYPES
from ganglion.robots.metaworld import (
    ACTION_DIM,
    MAX_TICKS,
    STATE_KEY,
    TASKS,
    UNSEEN_SEEDS,
    VIEW_KEYS,
    MetaWorld,
    task_named,
)
from ganglion.train.actor import Actor, Glance
from ganglion.types import Float32Array


class Instruction(StrEnum):
    """What the arm is told."""

    OWN = "own"
    OPPOSITE = "opposite"  # the opposite task's words: the arm must not solve the task then


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Which episodes, and how the chunk is used."""

    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = tuple(UNSEEN_SEEDS)
    instruction: Instruction = Instruction.OWN
    ticks_per_chunk: int = 3
    delay_ticks: int = 1
    max_ticks: int = MAX_TICKS
    num_flow_steps: int = 5
    has_action_prefix: bool = False  # tell the policy which actions will run during the delay
    dtype: str = "bfloat16"
    num_parallel: int = 10
    num_workers: int = 2
    num_threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Episodes of one task. `solved_ticks`: seed -> ticks to success, None when it was not solved."""

    task: str
    prompt: str
    solved_ticks: dict[int, int | None]

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
    for name in config.tasks:
        if config.instruction is Instruction.OPPOSITE and task_named(name).opposite is None:
            raise FieldError("tasks", expected="tasks with an opposite", got=name)
    results: list[TaskResult] = []
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=1) as pool:
        orders = [(config, name, str(checkpoint_dir)) for name in config.tasks]
        for result in pool.imap_unordered(_evaluate_task, orders, chunksize=1):
            results.append(result)
            on_result(result)
    return tuple(sorted(results, key=lambda result: config.tasks.index(result.task)))


def ambiguous_tasks() -> tuple[str, ...]:
    """The tasks whose scenes do not tell them from their opposite."""
    return tuple(name for name, task in TASKS.items() if task.opposite is not None)


def _evaluate_task(order: tuple[EvaluateConfig, str, str]) -> TaskResult:
    config, name, checkpoint_dir = order
    torch.set_num_threads(config.num_threads)
    checkpoint = load_flow_checkpoint(Path(checkpoint_dir), dtype=DTYPES[config.dtype])
    actor = Actor(checkpoint, num_flow_steps=config.num_flow_steps)
    task = TASKS[name]
    prompt = task.prompt
    if config.instruction is Instruction.OPPOSITE:
        assert task.opposite is not None, name
        prompt = TASKS[task.opposite].prompt
    worlds = [MetaWorld(task=name) for _ in range(min(config.num_parallel, len(config.seeds)))]
    solved: dict[int, int | None] = {}
    try:
        for start in range(0, len(config.seeds), len(worlds)):
            wave = config.seeds[start : start + len(worlds)]
            arms = [
                _Arm(world, seed, prompt, config) for world, seed in zip(worlds, wave, strict=False)
            ]
            _run_wave(arms, actor, config)
            solved |= {arm.seed: arm.world.num_ticks if arm.world.success else None for arm in arms}
    finally:
        for world in worlds:
            world.close()
    return TaskResult(task=name, prompt=prompt, solved_ticks=solved)


def _run_wave(arms: list["_Arm"], actor: Actor, config: EvaluateConfig) -> None:
    for arm in arms:
        arm.world.reset(arm.seed)
    for tick in range(config.max_ticks):
        active = [arm for arm in arms if not arm.world.success]
        if not active:
            return
        if tick % config.ticks_per_chunk == 0:
            chunks = actor.act([arm.glance(tick) for arm in active])
            for arm, chunk in zip(active, chunks, strict=True):
                arm.expect(tick, chunk)
        for arm in active:
            arm.advance(tick)


class _Arm:
    """One episode: its world and the chunks under way."""

    def __init__(self, world: MetaWorld, seed: int, prompt: str, config: EvaluateConfig) -> None:
        self.world, self.seed = world, seed
        self._prompt, self._config = prompt, config
        self._arriving: list[
            tuple[int, Float32Array]
        ] = []  # (tick of the observation, chunk), oldest first
        self._current: tuple[int, Float32Array] | None = None

    def glance(self, tick: int) -> Glance:
        views = self.world.observe()
        return Glance(
            images=np.stack([views[key] for key in VIEW_KEYS]).astype(np.uint8),
            state=np.asarray(views[STATE_KEY], np.float32),
            prompt=self._prompt,
            noise_seed=self.seed * MAX_TICKS + tick,
            prefix=self._committed(tick),
        )

    def _committed(self, tick: int) -> Float32Array:
        """What will be executed until the chunk planned now arrives."""
        if not self._config.has_action_prefix or self._current is None:
            return np.empty((0, ACTION_DIM), np.float32)
        first = tick - self._current[0]
        return self._current[1][first : first + self._config.delay_ticks]

    def expect(self, tick: int, chunk: Float32Array) -> None:
        self._arriving.append((tick, chunk))

    def advance(self, tick: int) -> None:
        while self._arriving and self._arriving[0][0] + self._config.delay_ticks <= tick:
            self._current = self._arriving.pop(0)
        action = np.zeros(ACTION_DIM, np.float32)  # holds still until the first chunk is there
        if self._current is not None:
            action = self._current[1][tick - self._current[0]]
        self.world.apply(action)
