"""Demonstrations: scripted experts of Meta-World drive the arm under noise; what they would do next is written down.

Owns the recipe of one episode, the plan of shards and the shard files. Called by the CLI and by `train.fit`. Knows no
model. A label is the expert's own noise-free future from that very state (the simulator is rolled forward and put
back), so that noise widens the states that are seen without blurring what to do there.
"""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ganglion.robots.metaworld import (
    CORNER_KEY,
    GRIPPER_KEY,
    STATE_KEY,
    TASKS,
    MetaWorld,
    Start,
    task_seed,
)
from ganglion.robots.world import Views
from ganglion.types import Float32Array

HORIZON = 48
DEMONSTRATION_KINDS = ("plain", "crossed")  # second part of a shard's name; corrections have others
_TABLE_Z_M = 0.02  # centre of a puck that lies on the table
# Of the hand; the puck hangs 4 cm lower: out of push's 5 cm, within pick-place's 7 cm of its lowest goals.
_LIFT_Z_M = 0.14


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """How many demonstrations, and how they are spoiled. Seeds 0..9,999 are for training alone."""

    num_episodes: int = 100
    num_hard_episodes: int = 250  # of each task in `hard_tasks`
    hard_tasks: tuple[str, ...] = ("push", "pick-place")
    num_crossed_episodes: int = (
        30  # push in pick-place's scenes and the reverse: the words decide, not the goal
    )
    episodes_per_shard: int = 10
    noise_sigmas: tuple[float, ...] = (0.0, 0.3, 0.6)
    ticks_per_sample: int = 3
    extra_ticks: int = 18  # recorded past success, so that the policy learns to stay
    max_ticks: int = 250
    view_px: int = 80
    first_seed: int = 0
    num_workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One file: `episodes` of `task`, in the scenes of `scene` (another task's name when crossed)."""

    task: str
    scene: str
    index: int
    seeds: tuple[int, ...]

    @property
    def file_name(self) -> str:
        kind = DEMONSTRATION_KINDS[0] if self.task == self.scene else DEMONSTRATION_KINDS[1]
        return f"{self.task}.{kind}.{self.index:03d}.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectProgress:
    """Reported after every shard."""

    num_shards_done: int
    num_shards: int
    shard: str
    num_episodes: int
    num_failed: int
    num_samples: int


def plan_shards(config: CollectConfig) -> tuple[ShardPlan, ...]:
    """All shards, the first of every task before the second of any: training can start on what is there."""
    plans: list[ShardPlan] = []
    for name, task in TASKS.items():
        is_hard = name in config.hard_tasks
        num_plain = config.num_hard_episodes if is_hard else config.num_episodes
        plans += _shards(name, name, num_plain, config, first_seed=config.first_seed)
        if task.opposite is not None and task.joint is None:
            first_seed = config.first_seed + 5_000
            plans += _shards(
                name, task.opposite, config.num_crossed_episodes, config, first_seed=first_seed
            )
    return tuple(sorted(plans, key=lambda plan: plan.index))


def _shards(
    task: str, scene: str, num_episodes: int, config: CollectConfig, *, first_seed: int
) -> list[ShardPlan]:
    starts = range(0, num_episodes, config.episodes_per_shard)
    return [
        ShardPlan(
            task=task,
            scene=scene,
            index=index,
            seeds=tuple(
                first_seed + number
                for number in range(start, min(start + config.episodes_per_shard, num_episodes))
            ),
        )
        for index, start in enumerate(starts)
    ]


def collect(
    config: CollectConfig, data_dir: Path, on_progress: Callable[[CollectProgress], None]
) -> CollectProgress | None:
    """Write every missing shard of the plan into `data_dir`. Finished shards are kept: a stopped run continues."""
    data_dir.mkdir(parents=True, exist_ok=True)
    plans = plan_shards(config)
    missing = [plan for plan in plans if not (data_dir / plan.file_name).exists()]
    progress: CollectProgress | None = None
    num_done = len(plans) - len(missing)
    totals = np.zeros(3, np.int64)
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=8) as pool:
        orders = [(config, plan, str(data_dir)) for plan in missing]
        for counts in pool.imap_unordered(_collect_shard, orders):
            num_done += 1
            totals += counts.totals
            progress = CollectProgress(
                num_shards_done=num_done,
                num_shards=len(plans),
                shard=counts.file_name,
                num_episodes=int(totals[0]),
                num_failed=int(totals[1]),
                num_samples=int(totals[2]),
            )
            on_progress(progress)
    return progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardCounts:
    file_name: str
    totals: npt.NDArray[np.int64]  # episodes, failed, samples


def _collect_shard(order: tuple[CollectConfig, ShardPlan, str]) -> _ShardCounts:
    config, plan, data_dir = order
    world = MetaWorld(task=plan.scene, view_px=config.view_px)
    expert = Expert(task=plan.task, scene=plan.scene)
    rows: list[dict[str, Any]] = []
    num_failed = 0
    try:
        for number, seed in enumerate(plan.seeds):
            episode = record_episode(world, expert, config, seed)
            if episode is None:
                num_failed += 1
                continue
            rows += [{**row, "episode": number} for row in episode]
    finally:
        world.close()
    write_shard(Path(data_dir) / plan.file_name, rows)
    totals = np.array([len(plan.seeds), num_failed, len(rows)])
    return _ShardCounts(file_name=plan.file_name, totals=totals)


def write_shard(target: Path, rows: list[dict[str, Any]]) -> None:
    """Write samples as one file that is there completely or not at all; no samples are a file without arrays."""
    keys = tuple(rows[0]) if rows else ()
    samples = {key: np.stack([row[key] for row in rows]) for key in keys}
    partial = target.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **samples)
    partial.rename(target)


class ExpertWorld(Protocol):
    """A world that a scripted expert can look ahead in: Meta-World, still or moving."""

    @property
    def privileged_obs(self) -> npt.NDArray[np.float64]: ...
    @property
    def success(self) -> bool: ...
    @property
    def num_ticks(self) -> int: ...
    def observe(self) -> Views: ...
    def advance(self, action: Float32Array) -> None: ...
    def snapshot(self) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...


class Expert:
    """Meta-World's scripted policy of `task`, at work in the scenes of `scene`."""

    def __init__(self, *, task: str, scene: str) -> None:
        from metaworld.policies import ENV_POLICY_MAP  # late: imports mujoco, which reads MUJOCO_GL

        self._policy: Any = ENV_POLICY_MAP[TASKS[task].env_name]()  # type: ignore[abstract]
        self._task = task
        self._is_crossed = task != scene

    def action(self, world: ExpertWorld) -> Float32Array:
        """What the expert does now, clipped to the bounds."""
        obs = world.privileged_obs
        if self._is_crossed:
            obs = np.concatenate([obs[:36], self.goal(world)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "constants may be too high": clipping is meant
            action = np.asarray(self._policy.get_action(obs), np.float32)
        return np.clip(action, -1.0, 1.0)

    def goal(self, world: ExpertWorld) -> npt.NDArray[np.float64]:
        """Where this task wants the puck: on the table below the goal (push), or above the table (pick-place)."""
        goal = world.privileged_obs[36:39].copy()
        if self._is_crossed:
            goal[2] = _TABLE_Z_M if self._task == "push" else _LIFT_Z_M
        return goal

    def is_done(self, world: ExpertWorld) -> bool:
        """Whether the instruction is carried out; in its own scenes that is Meta-World's rule."""
        if not self._is_crossed:
            return world.success
        return bool(np.linalg.norm(world.privileged_obs[4:7] - self.goal(world)) <= 0.05)


def record_episode(
    world: MetaWorld, expert: Expert, config: CollectConfig, seed: int
) -> list[dict[str, Any]] | None:
    """One noisy episode: samples every `ticks_per_sample` ticks, or None when the expert failed.

    Rehearsed first without taking samples, because rendering a failure costs far more than simulating it.
    """
    if _run_episode(world, expert, config, seed, dict) is None:
        return None
    return _run_episode(world, expert, config, seed, lambda: sample(world, expert))


def _run_episode(
    world: MetaWorld,
    expert: Expert,
    config: CollectConfig,
    seed: int,
    take_sample: Callable[[], dict[str, Any]],
) -> list[dict[str, Any]] | None:
    rng = task_seed(f"noise of {world.task_name}", seed)
    sigma = config.noise_sigmas[seed % len(config.noise_sigmas)]
    if TASKS[world.task_name].joint is not None and seed % 6 == 5:
        world.reset_to(seed, Start.DONE)
    else:
        world.reset(seed)
    rows: list[dict[str, Any]] = []
    done_tick: int | None = None
    first_tick = int(rng.integers(config.ticks_per_sample))
    min_ticks = 50 if seed % 6 == 5 else 0  # a task that starts done still shows what to do
    while world.num_ticks < config.max_ticks:
        if done_tick is None and world.num_ticks >= min_ticks and expert.is_done(world):
            done_tick = world.num_ticks
        if done_tick is not None and world.num_ticks >= done_tick + config.extra_ticks:
            return rows
        clean = expert.action(world)
        if world.num_ticks % config.ticks_per_sample == first_tick:
            rows.append(take_sample())
        noise = rng.normal(size=4) * sigma
        noise[3] = 0.0  # an opened gripper drops the puck: that is not noise to recover from
        world.apply((clean + noise).astype(np.float32))
    return None


def sample(world: ExpertWorld, expert: Expert) -> dict[str, Any]:
    views = world.observe()
    return {
        "corner": views[CORNER_KEY],
        "gripper": views[GRIPPER_KEY],
        "state": views[STATE_KEY],
        "privileged": world.privileged_obs.astype(np.float32),
        "tick": np.int32(world.num_ticks),
        "chunk": expert_chunk(world, expert),
    }


def expert_chunk(world: ExpertWorld, expert: Expert) -> Float32Array:
    """The expert's next HORIZON actions from here without noise; the world is left as it was."""
    snapshot = world.snapshot()
    chunk = np.empty((HORIZON, 4), np.float32)
    for index in range(HORIZON):
        chunk[index] = expert.action(world)
        world.advance(chunk[index])
    world.restore(snapshot)
    return chunk
