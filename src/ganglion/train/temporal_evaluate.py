"""Temporal evaluation: closed-loop episodes of a world that hides its goal, with more or less of a memory.

Owns the success table of what is remembered. Called by the CLI. A chunk is planned anew every `ticks_per_chunk` ticks
and arrives `delay_ticks` later, as in `train.evaluate`; the memory sees every observation that a chunk is planned from.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ganglion.memory.retention.history import HistoryConfig
from ganglion.models.policies.temporal_checkpoint import load_base, load_temporal_checkpoint
from ganglion.models.registry import DTYPES
from ganglion.robots.hidden import HIDDEN_TASKS, HiddenGoal
from ganglion.robots.metaworld import ACTION_DIM, MAX_TICKS, STATE_KEY, UNSEEN_SEEDS, VIEW_KEYS
from ganglion.robots.world import World
from ganglion.train.actor import Actor, Glance
from ganglion.train.evaluate import TaskResult
from ganglion.train.temporal_actor import ArmMemory, Roads, Sight, TemporalActor
from ganglion.types import Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Recollection:
    """One column of the table: which roads are open, and what the history keeps of its pages.

    `roads` None: the base policy, which never had a memory. `is_shown`: the goal stays visible, as in its training.
    """

    name: str
    roads: Roads | None
    history: HistoryConfig | None = None
    is_shown: bool = False


# Seven places each, but for the short one, whole or encoded; a window keeps the newest whatever attention says.
RECOLLECTIONS = (
    Recollection(name="base, goal shown", roads=None, is_shown=True),
    Recollection(name="base", roads=None),
    Recollection(name="none", roads=Roads.NONE),
    Recollection(name="history", roads=Roads.HISTORY),
    Recollection(
        name="history int8",
        roads=Roads.HISTORY,
        history=HistoryConfig(num_whole=1, num_encoded=6),
    ),
    Recollection(
        name="history int8 short",
        roads=Roads.HISTORY,
        history=HistoryConfig(num_whole=1, num_encoded=2),
    ),
    Recollection(
        name="window",  # so much is a new page worth that no attention outweighs its age
        roads=Roads.HISTORY,
        history=HistoryConfig(num_whole=7, num_encoded=0, first_score=1e6),
    ),
    Recollection(name="gru", roads=Roads.RECURRENT),
    Recollection(name="both", roads=Roads.BOTH),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalEvaluateConfig:
    """Which episodes, and how the chunk is used."""

    recollections: tuple[Recollection, ...] = RECOLLECTIONS
    tasks: tuple[str, ...] = HIDDEN_TASKS
    seeds: tuple[int, ...] = tuple(UNSEEN_SEEDS)
    ticks_per_chunk: int = 3
    delay_ticks: int = 1
    max_ticks: int = 150  # two and a half times what a solved episode takes
    num_flow_steps: int = 5
    dtype: str = "bfloat16"
    num_parallel: int = 10
    num_workers: int = 1


def evaluate_temporal(
    config: TemporalEvaluateConfig,
    checkpoint_dir: Path,
    on_result: Callable[[str, TaskResult], None],
) -> dict[str, tuple[TaskResult, ...]]:
    """Run all episodes under each recollection; `on_result` hears of each task as it ends."""
    results: dict[str, list[TaskResult]] = {r.name: [] for r in config.recollections}
    orders = [
        (config, recollection, task, str(checkpoint_dir))
        for task in config.tasks
        for recollection in config.recollections
    ]
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=1) as pool:
        for name, result in pool.imap_unordered(_evaluate_task, orders, chunksize=1):
            results[name].append(result)
            on_result(name, result)
    return {name: tuple(of_tasks) for name, of_tasks in results.items()}


def _evaluate_task(
    order: tuple[TemporalEvaluateConfig, Recollection, str, str],
) -> tuple[str, TaskResult]:
    config, recollection, task, checkpoint_dir = order
    torch.set_num_threads(1)
    driver = _driver(Path(checkpoint_dir), recollection, config)
    worlds = [HiddenGoal(task=task) for _ in range(min(config.num_parallel, len(config.seeds)))]
    solved: dict[int, int | None] = {}
    try:
        for first in range(0, len(config.seeds), len(worlds)):
            wave = config.seeds[first : first + len(worlds)]
            arms = [
                Arm(w.inner if recollection.is_shown else w, seed, driver.new_memory())
                for w, seed in zip(worlds, wave, strict=False)
            ]
            run_wave(arms, driver, config)
            solved |= {arm.seed: arm.world.num_ticks if arm.world.success else None for arm in arms}
        prompt = worlds[0].prompt
    finally:
        for world in worlds:
            world.close()
    return recollection.name, TaskResult(task=task, prompt=prompt, solved_ticks=solved)


class Driver(Protocol):
    """A policy that drives arms, each with its memory."""

    def new_memory(self) -> ArmMemory | None:
        """The memory of an episode that begins; None for a policy without one."""
        ...

    def act(self, sights: Sequence[Sight], memories: Sequence[ArmMemory | None]) -> Float32Array:
        """One chunk [horizon, action_dim] for each."""
        ...


class _Forgetful:
    """The base policy: every observation is its first."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def new_memory(self) -> None:
        return None

    def act(self, sights: Sequence[Sight], memories: Sequence[ArmMemory | None]) -> Float32Array:
        assert not any(memories), "the base policy has no memory"
        return self._actor.act(
            [
                Glance(
                    images=sight.images,
                    state=sight.state,
                    prompt=sight.prompt,
                    noise_seed=sight.noise_seed,
                )
                for sight in sights
            ]
        )


def _driver(
    checkpoint_dir: Path, recollection: Recollection, config: TemporalEvaluateConfig
) -> Driver:
    dtype = DTYPES[config.dtype]
    if recollection.roads is None:
        base = load_base(checkpoint_dir, dtype=dtype)
        return _Forgetful(Actor(base, num_flow_steps=config.num_flow_steps))
    return TemporalActor(
        load_temporal_checkpoint(checkpoint_dir, dtype=dtype),
        num_flow_steps=config.num_flow_steps,
        roads=recollection.roads,
        history=recollection.history,
    )


def run_wave(arms: list["Arm"], driver: Driver, config: TemporalEvaluateConfig) -> None:
    """One episode of every arm, side by side."""
    for arm in arms:
        arm.world.reset(arm.seed)
    for tick in range(config.max_ticks):
        active = [arm for arm in arms if not arm.world.success]
        if not active:
            return
        if tick % config.ticks_per_chunk == 0:
            chunks = driver.act([arm.sight(tick) for arm in active], [a.memory for a in active])
            for arm, chunk in zip(active, chunks, strict=True):
                arm.expect(tick, chunk)
        for arm in active:
            arm.advance(tick, config.delay_ticks)


class Arm:
    """One episode: its world, its memory and the chunks under way."""

    def __init__(self, world: World, seed: int, memory: ArmMemory | None) -> None:
        self.world, self.seed, self.memory = world, seed, memory
        self._arriving: list[tuple[int, Float32Array]] = []  # (tick of the observation, chunk)
        self._current: tuple[int, Float32Array] | None = None

    def sight(self, tick: int) -> Sight:
        """What the arm sees now."""
        views = self.world.observe()
        return Sight(
            images=np.stack([views[key] for key in VIEW_KEYS]).astype(np.uint8),
            state=np.asarray(views[STATE_KEY], np.float32),
            prompt=self.world.prompt,
            noise_seed=self.seed * MAX_TICKS + tick,
        )

    def expect(self, tick: int, chunk: Float32Array) -> None:
        """A chunk that rests on the observation of `tick` is under way."""
        self._arriving.append((tick, chunk))

    def advance(self, tick: int, delay_ticks: int) -> None:
        """One tick of the world, under the newest chunk that has arrived."""
        while self._arriving and self._arriving[0][0] + delay_ticks <= tick:
            self._current = self._arriving.pop(0)
        action = np.zeros(ACTION_DIM, np.float32)  # holds still until the first chunk is there
        if self._current is not None:
            action = self._current[1][tick - self._current[0]]
        self.world.apply(action)
