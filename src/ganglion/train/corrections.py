"""Corrections: a half-trained policy drives, the scripted expert says what it would have done (DAgger).

Owns the plan and the episodes of this second round of data; the shards lie beside the demonstrations. Called by the
CLI between two parts of `fit`. Noise around an expert's path never shows where a policy's own mistakes lead; these
samples do. arXiv 1011.0686.
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
from ganglion.robots.metaworld import STATE_KEY, TASKS, VIEW_KEYS, MetaWorld, task_seed
from ganglion.train.actor import Actor, Glance
from ganglion.train.demonstrations import CollectProgress, Expert, sample, write_shard
from ganglion.types import Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectConfig:
    """How many corrected episodes. Their seeds lie among the training seeds, above those of the demonstrations."""

    num_shards: int = 2
    num_hard_shards: int = 8
    num_crossed_shards: int = 3
    hard_tasks: tuple[str, ...] = ("push", "pick-place")
    episodes_per_shard: int = 8
    first_seed: int = 7_000
    policy_ticks: tuple[int, int] = (10, 110)  # the policy drives this long, then the expert
    max_ticks: int = 180
    ticks_per_chunk: int = 3
    num_flow_steps: int = 5
    dtype: str = "bfloat16"
    round_name: str = "corrected"
    num_workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    config: CorrectConfig
    task: str
    scene: str
    index: int
    checkpoint_dir: str
    target: str


def correct(
    config: CorrectConfig,
    checkpoint_dir: Path,
    data_dir: Path,
    on_progress: Callable[[CollectProgress], None],
) -> None:
    """Write every missing shard of corrections of the policy in `checkpoint_dir` into `data_dir`."""
    orders = _plan(config, checkpoint_dir, data_dir)
    missing = [order for order in orders if not Path(order.target).exists()]
    num_done, num_episodes, num_samples = len(orders) - len(missing), 0, 0
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=4) as pool:
        for target, num_rows in pool.imap_unordered(_correct_shard, missing):
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


def _plan(config: CorrectConfig, checkpoint_dir: Path, data_dir: Path) -> list[_Order]:
    pairs: list[tuple[str, str, int]] = []
    for name, task in TASKS.items():
        is_hard = name in config.hard_tasks
        pairs.append((name, name, config.num_hard_shards if is_hard else config.num_shards))
        if task.opposite is not None and task.joint is None:
            pairs.append((name, task.opposite, config.num_crossed_shards))
    orders = [
        _Order(
            config=config,
            task=task,
            scene=scene,
            index=index,
            checkpoint_dir=str(checkpoint_dir),
            target=str(data_dir / f"{task}.{config.round_name}-in-{scene}.{index:03d}.npz"),
        )
        for task, scene, num_shards in pairs
        for index in range(num_shards)
    ]
    return sorted(orders, key=lambda order: order.index)


def _correct_shard(order: _Order) -> tuple[str, int]:
    torch.set_num_threads(1)
    config = order.config
    checkpoint = load_flow_checkpoint(Path(order.checkpoint_dir), dtype=DTYPES[config.dtype])
    actor = Actor(checkpoint, num_flow_steps=config.num_flow_steps)
    world = MetaWorld(task=order.scene)
    expert = Expert(task=order.task, scene=order.scene)
    rows: list[dict[str, Any]] = []
    try:
        for number in range(config.episodes_per_shard):
            seed = config.first_seed + order.index * config.episodes_per_shard + number
            episode = _corrected_episode(world, expert, actor, config, order.task, seed)
            rows += [{**row, "episode": number} for row in episode]
    finally:
        world.close()
    write_shard(Path(order.target), rows)
    return order.target, len(rows)


def _corrected_episode(
    world: MetaWorld, expert: Expert, actor: Actor, config: CorrectConfig, task: str, seed: int
) -> list[dict[str, Any]]:
    """Samples at every chunk, first with the policy driving, then with the expert, until solved or out of ticks."""
    rng = task_seed(f"corrections of {task}", seed)
    num_policy_ticks = int(rng.integers(*config.policy_ticks))
    world.reset(seed)
    rows: list[dict[str, Any]] = []
    chunk: Float32Array = np.empty((0, 4), np.float32)
    while world.num_ticks < config.max_ticks and not expert.is_done(world):
        tick = world.num_ticks
        has_policy = tick < num_policy_ticks
        if tick % config.ticks_per_chunk == 0:
            row = sample(world, expert)
            rows.append(row)
            if has_policy:
                chunk = actor.act([_glance(row, TASKS[task].prompt, seed * 1_000 + tick)])[0]
        offset = tick % config.ticks_per_chunk
        world.apply(chunk[offset] if has_policy else expert.action(world))
    return rows


def _glance(row: dict[str, Any], prompt: str, noise_seed: int) -> Glance:
    views = {VIEW_KEYS[0]: row["corner"], VIEW_KEYS[1]: row["gripper"], STATE_KEY: row["state"]}
    return Glance(
        images=np.stack([views[key] for key in VIEW_KEYS]),
        state=views[STATE_KEY],
        prompt=prompt,
        noise_seed=noise_seed,
    )
