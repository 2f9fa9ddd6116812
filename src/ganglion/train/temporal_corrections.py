"""Temporal corrections: a policy with memory drives, the scripted expert says what it would have done (DAgger).

Owns the second round of data; the shards lie beside the demonstrations. Called by the CLI between two fits. The policy
remembers by its history, its recurrent state or both, episode by episode, so that each road's own mistakes are seen.
arXiv 1011.0686.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ganglion.models.policies.temporal_checkpoint import load_temporal_checkpoint
from ganglion.models.registry import DTYPES
from ganglion.robots.hidden import HIDDEN_TASKS, HiddenGoal
from ganglion.robots.metaworld import ACTION_DIM, task_seed
from ganglion.train.demonstrations import Expert, write_shard
from ganglion.train.temporal_actor import Roads, Sight, TemporalActor
from ganglion.train.temporal_data import temporal_sample
from ganglion.types import Float32Array

_ROADS = (Roads.BOTH, Roads.HISTORY, Roads.RECURRENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalCorrectConfig:
    """How many corrected episodes. Their seeds lie among the training seeds, above the demonstrations'."""

    tasks: tuple[str, ...] = HIDDEN_TASKS
    num_shards: int = 6
    episodes_per_shard: int = 9
    first_seed: int = 8_500
    policy_ticks: tuple[int, int] = (20, 120)  # the policy drives this long, then the expert
    max_ticks: int = 150
    ticks_per_chunk: int = 3
    num_flow_steps: int = 5
    dtype: str = "bfloat16"
    round_name: str = "corrected"
    num_workers: int = 1


def correct_temporal(
    config: TemporalCorrectConfig,
    checkpoint_dir: Path,
    data_dir: Path,
    on_shard: Callable[[str, int], None],
) -> None:
    """Write every missing shard of corrections of the policy in `checkpoint_dir` into `data_dir`."""
    orders = [
        (
            config,
            task,
            index,
            str(checkpoint_dir),
            str(data_dir / f"{task}.{config.round_name}.{index:03d}.npz"),
        )
        for index in range(config.num_shards)
        for task in config.tasks
    ]
    missing = [order for order in orders if not Path(order[-1]).exists()]
    # spawn: a forked child would share the parent's GL context
    with multiprocessing.get_context("spawn").Pool(config.num_workers, maxtasksperchild=4) as pool:
        for name, num_samples in pool.imap_unordered(_correct_shard, missing):
            on_shard(name, num_samples)


def _correct_shard(order: tuple[TemporalCorrectConfig, str, int, str, str]) -> tuple[str, int]:
    torch.set_num_threads(1)
    config, task, index, checkpoint_dir, target = order
    checkpoint = load_temporal_checkpoint(Path(checkpoint_dir), dtype=DTYPES[config.dtype])
    actors = [
        TemporalActor(checkpoint, num_flow_steps=config.num_flow_steps, roads=roads)
        for roads in _ROADS
    ]
    world, expert = HiddenGoal(task=task), Expert(task=task, scene=task)
    rows: list[dict[str, Any]] = []
    try:
        for number in range(config.episodes_per_shard):
            seed = config.first_seed + index * config.episodes_per_shard + number
            episode = corrected_episode(world, expert, actors[seed % len(actors)], config, seed)
            rows += [{**row, "episode": np.int32(number)} for row in episode]
    finally:
        world.close()
    write_shard(Path(target), rows)
    return Path(target).name, len(rows)


def corrected_episode(
    world: HiddenGoal,
    expert: Expert,
    actor: TemporalActor,
    config: TemporalCorrectConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """Samples at every chunk, first with the policy driving, then with the expert, until solved or out of ticks."""
    rng = task_seed(f"hidden corrections of {world.task_name}", seed)
    num_policy_ticks = int(rng.integers(*config.policy_ticks))
    world.reset(seed)
    memory = actor.new_memory()
    rows: list[dict[str, Any]] = []
    chunk: Float32Array = np.empty((0, ACTION_DIM), np.float32)
    while world.num_ticks < config.max_ticks and not world.success:
        tick = world.num_ticks
        has_policy = tick < num_policy_ticks
        if tick % config.ticks_per_chunk == 0:
            row = temporal_sample(world, expert)
            rows.append(row)
            if has_policy:
                sight = Sight(
                    images=np.stack([row["corner"], row["gripper"]]),
                    state=row["state"],
                    prompt=world.prompt,
                    noise_seed=seed * 1_000 + tick,
                )
                chunk = actor.act([sight], [memory])[0]
        offset = tick % config.ticks_per_chunk
        world.apply(chunk[offset] if has_policy else expert.action(world.inner))
    return rows
