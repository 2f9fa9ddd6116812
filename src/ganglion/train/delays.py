"""Delays: a policy drives with late chunks, over scenes at rest and in motion; the expert says what it would have done.

Owns the episodes of this round of data; the shards lie beside the others. Called by `train.recipe` and the CLI. Knows no
loss. Every row keeps what was executed after it, so that `train.dataset` can ask of one row's picture the expert's
actions of a later row: what a chunk must be that arrives so much later (arXiv 2512.05964), from a prefix that the arm
really ran and no expert would have (DAgger, arXiv 1011.0686).
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.registry import DTYPES
from ganglion.robots.metaworld import (
    ACTION_DIM,
    STATE_KEY,
    TASKS,
    VIEW_KEYS,
    MetaWorld,
    task_seed,
)
from ganglion.robots.moving import MovingMetaWorld
from ganglion.train.actor import Actor, Glance
from ganglion.train.demonstrations import CollectProgress, Expert, sample, write_shard
from ganglion.types import Execution, Float32Array, Plan

MAX_DELAY_TICKS = 20  # what is kept of the actions after a row


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedConfig:
    """How many episodes with late chunks. Their seeds lie among the training seeds, above those of the corrections."""

    num_still_shards: int = 2
    num_moving_shards: int = 3
    num_crossed_shards: int = 1
    hard_tasks: tuple[str, ...] = ("push", "pick-place")
    hard_factor: int = 1  # so many times as many still and moving shards of these
    episodes_per_shard: int = 6
    first_seed: int = 9_000
    delay_ticks: tuple[int, int] = (0, 13)
    ticks_per_row: tuple[int, int] = (2, 5)  # uneven, so that every delay lies between two rows
    policy_ticks: tuple[int, int] = (0, 120)  # the policy drives this long, then the expert
    noise_sigma: float = 0.3  # on the expert's actions, in half of the episodes
    max_ticks: int = 180
    extra_ticks: int = 8  # recorded past success
    num_flow_steps: int = 5
    dtype: str = "bfloat16"
    round_name: str = "delayed"
    num_workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    config: DelayedConfig
    task: str
    scene: str
    is_moving: bool
    index: int
    checkpoint_dir: str
    target: str


def drive_late(
    config: DelayedConfig,
    checkpoint_dir: Path,
    data_dir: Path,
    on_progress: Callable[[CollectProgress], None],
) -> None:
    """Write every missing shard of the policy in `checkpoint_dir` into `data_dir`."""
    data_dir.mkdir(parents=True, exist_ok=True)
    orders = _plan(config, checkpoint_dir, data_dir)
    missing = [order for order in orders if not Path(order.target).exists()]
    num_done, num_episodes, num_samples = len(orders) - len(missing), 0, 0
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=4) as pool:
        for target, num_rows in pool.imap_unordered(_drive_shard, missing):
            num_done += 1
            num_episodes += config.episodes_per_shard
            num_samples += num_rows
            on_progress(
                CollectProgress(
                    num_shards_done=num_done,
                    num_shards=len(orders),
                    shard=Path(target).name,
                    num_episodes=num_episodes,
                    num_failed=0,
                    num_samples=num_samples,
                )
            )


def _plan(config: DelayedConfig, checkpoint_dir: Path, data_dir: Path) -> list[_Order]:
    kinds: list[tuple[str, str, bool, int]] = []
    for name, task in TASKS.items():
        factor = config.hard_factor if name in config.hard_tasks else 1
        kinds.append((name, name, False, factor * config.num_still_shards))
        kinds.append((name, name, True, factor * config.num_moving_shards))
        if task.opposite is not None and task.joint is None:
            kinds.append((name, task.opposite, False, config.num_crossed_shards))
    orders = []
    for name, scene, is_moving, num_shards in kinds:
        where = f"{'moving' if is_moving else 'still'}-{scene}"
        orders += [
            _Order(
                config=config,
                task=name,
                scene=scene,
                is_moving=is_moving,
                index=index,
                checkpoint_dir=str(checkpoint_dir),
                target=str(data_dir / f"{name}.{config.round_name}-in-{where}.{index:03d}.npz"),
            )
            for index in range(num_shards)
        ]
    return sorted(orders, key=lambda order: order.index)


def _drive_shard(order: _Order) -> tuple[str, int]:
    torch.set_num_threads(1)
    config = order.config
    checkpoint = load_flow_checkpoint(Path(order.checkpoint_dir), dtype=DTYPES[config.dtype])
    actor = Actor(checkpoint, num_flow_steps=config.num_flow_steps)
    world = MovingMetaWorld(task=order.scene) if order.is_moving else MetaWorld(task=order.scene)
    expert = Expert(task=order.task, scene=order.scene)
    rows: list[dict[str, Any]] = []
    try:
        for number in range(config.episodes_per_shard):
            seed = config.first_seed + order.index * config.episodes_per_shard + number
            episode = late_episode(world, expert, actor, config, order.task, seed)
            rows += [{**row, "episode": np.int32(number)} for row in episode]
    finally:
        world.close()
    write_shard(Path(order.target), rows)
    return order.target, len(rows)


@dataclass(slots=True)
class _Driver:
    """Chunks under way and the one that is executed, each row at its own tick."""

    actor: Actor
    prompt: str
    delay_ticks: int
    flights: list[tuple[int, int, Float32Array]]  # tick of arrival, tick of row 0, rows
    current: tuple[int, Float32Array] | None = None

    def launch(self, row: dict[str, Any], tick: int, seed: int) -> None:
        """Begin a chunk of the observation `row`; it arrives `delay_ticks` later."""
        plan = None
        if self.current is not None:
            actions = self._rows(tick)
            plan = Plan(actions=actions, num_committed=min(self.delay_ticks, len(actions)))
        views = {VIEW_KEYS[0]: row["corner"], VIEW_KEYS[1]: row["gripper"], STATE_KEY: row["state"]}
        glance = Glance(
            images=np.stack([views[key] for key in VIEW_KEYS]),
            state=views[STATE_KEY],
            prompt=self.prompt,
            noise_seed=seed * 1_000 + tick,
            execution=Execution.PREFIX,
            plan=plan,
        )
        chunk = self.actor.act([glance])[0]
        self.flights.append((tick + self.delay_ticks, tick, chunk))

    def action(self, tick: int) -> Float32Array | None:
        """What the newest chunk that is there says; None when it says nothing."""
        while self.flights and self.flights[0][0] <= tick:
            _, first_tick, chunk = self.flights.pop(0)
            self.current = (first_tick, chunk)
        rows = self._rows(tick)
        return rows[0] if len(rows) else None

    def _rows(self, tick: int) -> Float32Array:
        if self.current is None:
            return np.empty((0, ACTION_DIM), np.float32)
        first_tick, chunk = self.current
        return chunk[tick - first_tick :]


def late_episode(
    world: MetaWorld | MovingMetaWorld,
    expert: Expert,
    actor: Actor,
    config: DelayedConfig,
    task: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of one episode: first the policy drives with late chunks, then the expert, until solved or out of ticks.

    Each row has `executed` [MAX_DELAY_TICKS, ACTION_DIM], what ran from its tick on, the last action repeated.
    """
    rng = task_seed(f"late chunks of {task} in {type(world).__name__}", seed)
    delay_ticks = int(rng.integers(*config.delay_ticks))
    num_policy_ticks = int(rng.integers(*config.policy_ticks))
    sigma = config.noise_sigma * float(rng.integers(2))
    driver = _Driver(actor, TASKS[task].prompt, delay_ticks, [])
    world.reset(seed)
    rows: list[dict[str, Any]] = []
    executed: list[Float32Array] = []
    next_row_tick, done_tick = 0, None
    while world.num_ticks < config.max_ticks:
        tick = world.num_ticks
        if done_tick is None and expert.is_done(world):
            done_tick = tick
        if done_tick is not None and tick >= done_tick + config.extra_ticks:
            break
        if tick >= next_row_tick:
            next_row_tick = tick + int(rng.integers(*config.ticks_per_row))
            rows.append(sample(world, expert))
            if tick < num_policy_ticks:
                driver.launch(rows[-1], tick, seed)
        if tick < num_policy_ticks:
            planned = driver.action(tick)
            held = executed[-1] * (0, 0, 0, 1) if executed else np.zeros(ACTION_DIM)
            action = held if planned is None else planned
        else:
            noise = rng.normal(size=ACTION_DIM) * sigma
            noise[3] = 0.0  # an opened gripper drops the puck: that is not noise to recover from
            action = expert.action(world) + noise
        executed.append(np.clip(action, -1.0, 1.0).astype(np.float32))
        world.apply(executed[-1])
    return [{**row, "executed": _after(executed, int(row["tick"]))} for row in rows]


def _after(executed: list[Float32Array], tick: int) -> Float32Array:
    actions = executed[tick : tick + MAX_DELAY_TICKS] or executed[-1:]
    return np.stack([*actions, *[actions[-1]] * (MAX_DELAY_TICKS - len(actions))])
