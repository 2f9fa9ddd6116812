"""Temporal data: whole episodes of a world that hides its goal, in order, for a policy with memory.

Owns the plan, the episodes and their files. Called by `train.temporal`. Knows no model. Labels and noise are those of
`train.demonstrations`; what differs is that an episode stays together, from its first tick on.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ganglion.robots.hidden import HIDDEN_TASKS, HiddenGoal
from ganglion.robots.metaworld import CORNER_KEY, GRIPPER_KEY, STATE_KEY, task_seed
from ganglion.train.demonstrations import Expert, expert_chunk, write_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalCollectConfig:
    """How many episodes of each task, and how they are spoiled. Seeds are training seeds (below 10,000)."""

    tasks: tuple[str, ...] = HIDDEN_TASKS
    num_shards: int = 16
    episodes_per_shard: int = 10
    first_seed: int = 4_000
    noise_sigmas: tuple[float, ...] = (0.0, 0.3, 0.6)
    ticks_per_sample: int = 3
    extra_ticks: int = 12  # recorded past success
    max_ticks: int = 180
    num_workers: int = 1


def collect_temporal(
    config: TemporalCollectConfig, data_dir: Path, on_shard: Callable[[str, int], None]
) -> None:
    """Write every missing shard; `on_shard` hears file name and number of samples. A stopped run continues."""
    data_dir.mkdir(parents=True, exist_ok=True)
    orders = [
        (config, task, index, str(data_dir / f"{task}.{index:03d}.npz"))
        for index in range(config.num_shards)
        for task in config.tasks
    ]
    missing = [order for order in orders if not Path(order[3]).exists()]
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=8) as pool:
        for name, num_samples in pool.imap_unordered(_collect_shard, missing):
            on_shard(name, num_samples)


def _collect_shard(order: tuple[TemporalCollectConfig, str, int, str]) -> tuple[str, int]:
    config, task, index, target = order
    world = HiddenGoal(task=task)
    expert = Expert(task=task, scene=task)
    rows: list[dict[str, Any]] = []
    try:
        for number in range(config.episodes_per_shard):
            seed = config.first_seed + index * config.episodes_per_shard + number
            episode = record_hidden(world, expert, config, seed)
            rows += [{**row, "episode": np.int32(number)} for row in episode or []]
    finally:
        world.close()
    write_shard(Path(target), rows)
    return Path(target).name, len(rows)


def record_hidden(
    world: HiddenGoal, expert: Expert, config: TemporalCollectConfig, seed: int
) -> list[dict[str, Any]] | None:
    """One noisy episode, a sample at tick 0 and every `ticks_per_sample` ticks; None when the expert failed.

    Rehearsed first without samples, because rendering a failure costs far more than simulating it.
    """
    if _run_episode(world, expert, config, seed, dict) is None:
        return None
    return _run_episode(world, expert, config, seed, lambda: temporal_sample(world, expert))


def _run_episode(
    world: HiddenGoal,
    expert: Expert,
    config: TemporalCollectConfig,
    seed: int,
    take_sample: Callable[[], dict[str, Any]],
) -> list[dict[str, Any]] | None:
    rng = task_seed(f"hidden noise of {world.task_name}", seed)
    sigma = config.noise_sigmas[seed % len(config.noise_sigmas)]
    world.reset(seed)
    rows: list[dict[str, Any]] = []
    done_tick: int | None = None
    while world.num_ticks < config.max_ticks:
        if done_tick is None and world.success:
            done_tick = world.num_ticks
        if done_tick is not None and world.num_ticks >= done_tick + config.extra_ticks:
            return rows
        clean = expert.action(world.inner)
        if world.num_ticks % config.ticks_per_sample == 0:
            rows.append(take_sample())
        noise = rng.normal(size=4) * sigma
        noise[3] = 0.0  # an opened gripper drops the puck: that is not noise to recover from
        world.apply((clean + noise).astype(np.float32))
    return None


def temporal_sample(world: HiddenGoal, expert: Expert) -> dict[str, Any]:
    """What the robot sees now, what the expert would do from here, and where things really are."""
    views = world.observe()
    return {
        "corner": views[CORNER_KEY],
        "gripper": views[GRIPPER_KEY],
        "state": views[STATE_KEY],
        "privileged": world.inner.privileged_obs.astype(np.float32),
        "is_goal_visible": np.bool_(world.is_goal_visible),
        "tick": np.int32(world.num_ticks),
        "chunk": expert_chunk(world.inner, expert),
    }
