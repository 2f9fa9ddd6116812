"""The shipped policies in motion: fresh chunks solve the moving tasks, late ones do not; grown is as good as small."""

import numpy as np
import pytest
import torch

from ganglion.models.packing import pack
from ganglion.models.policies.grow import load_checkpoint
from ganglion.models.registry import policy_folder
from ganglion.robots.catalog import Arm, open_arm
from ganglion.robots.moving import MAX_MOVING_TICKS, MOVING_TASKS
from ganglion.train.actor import Actor
from ganglion.train.rollout import Episode, RolloutConfig, run_episodes
from ganglion.types import Execution

# Mesa's EGL says goodbye with an error that means nothing
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SEEDS = range(20_000, 20_004)


def actor_of(name: str) -> Actor:
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(policy_folder(name))
    pack(checkpoint.policy)
    return Actor(checkpoint, num_flow_steps=checkpoint.spec.num_flow_steps)


def run(actor: Actor, arms: list[Arm], delay_ticks: int) -> list[int | None]:
    """Ticks to success by seed, with naive execution."""
    config = RolloutConfig(
        execution=Execution.NAIVE,
        ticks_per_chunk=3,
        delay_ticks=delay_ticks,
        max_ticks=MAX_MOVING_TICKS,
    )
    episodes = [
        Episode(arm, seed, arm.world.prompt, config) for arm, seed in zip(arms, SEEDS, strict=True)
    ]
    run_episodes(episodes, actor)
    return [episode.solved_tick for episode in episodes]


def share(solved_ticks: list[int | None]) -> float:
    return float(np.mean([tick is not None for tick in solved_ticks]))


@pytest.mark.slow
def test_fresh_chunks_solve_what_moves_and_late_ones_do_not() -> None:
    actor = actor_of("metaworld-ten")
    fresh, late = [], []
    for task in MOVING_TASKS:
        arms = [open_arm(f"metaworld-moving:{task}") for _ in SEEDS]
        fresh += run(actor, arms, 0)
        late += run(actor, arms, 8)
        for arm in arms:
            arm.world.close()
    assert share(fresh) >= 0.85, fresh
    assert share(late) <= share(fresh) - 0.15, (fresh, late)


@pytest.mark.slow
def test_the_grown_policy_moves_the_arm_as_the_small_one_does() -> None:
    arms = [open_arm("metaworld-moving:button-press-topdown") for _ in SEEDS]
    small = run(actor_of("metaworld-ten"), arms, 0)
    large = run(actor_of("metaworld-ten-large"), arms, 0)
    for arm in arms:
        arm.world.close()
    assert share(small) == share(large) == 1.0, (small, large)
    assert abs(np.mean(small) - np.mean(large)) < 10, (small, large)  # type: ignore[arg-type]
