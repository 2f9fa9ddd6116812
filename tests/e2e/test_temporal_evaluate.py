"""The shipped policy with a memory around it, closed loop in the hidden world; corrections of what it does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ganglion.memory.retention.history import HistoryConfig
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.policies.temporal import TemporalConfig, TemporalPolicy
from ganglion.models.policies.temporal_checkpoint import (
    load_temporal_checkpoint,
    save_temporal_checkpoint,
)
from ganglion.models.registry import policy_folder
from ganglion.robots.hidden import HiddenGoal
from ganglion.train.demonstrations import Expert
from ganglion.train.temporal_actor import Roads, TemporalActor
from ganglion.train.temporal_corrections import TemporalCorrectConfig, corrected_episode
from ganglion.train.temporal_evaluate import (
    Recollection,
    TemporalEvaluateConfig,
    evaluate_temporal,
)
from ganglion.train.temporal_recipe import write_temporal_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained memory around the shipped policy."""
    torch.set_num_threads(1)
    base_dir = policy_folder("metaworld-ten")
    base = load_flow_checkpoint(base_dir)
    policy = TemporalPolicy.from_flow(base.policy, TemporalConfig())
    folder = tmp_path_factory.mktemp("run") / "metaworld-hidden"
    save_temporal_checkpoint(folder, policy, base, base_dir=str(base_dir))
    return folder


@pytest.mark.slow
def test_an_evaluation_ends_in_a_card(folder: Path) -> None:
    config = TemporalEvaluateConfig(
        recollections=(
            Recollection(name="base", roads=None),
            Recollection(name="both", roads=Roads.BOTH),
        ),
        tasks=("push",),
        seeds=(20_000,),
        max_ticks=12,
    )
    names: list[str] = []
    results = evaluate_temporal(config, folder, lambda name, _: names.append(name))
    assert names == ["base", "both"]
    assert results["both"][0].solved_ticks == {20_000: None}  # nobody pushes in 12 ticks
    write_temporal_card(config, results, folder)
    card = (folder / "README.md").read_text()
    assert "| both | 0% | **0%** | nan |" in card
    assert "1 starts a task" in card


def test_corrections_hold_what_the_policy_saw_and_the_expert_would_do(folder: Path) -> None:
    checkpoint = load_temporal_checkpoint(folder)
    history = HistoryConfig(num_whole=1, num_encoded=2)
    actor = TemporalActor(checkpoint, num_flow_steps=1, history=history)
    world = HiddenGoal(task="push")
    try:
        config = TemporalCorrectConfig(policy_ticks=(6, 7), max_ticks=18)
        rows = corrected_episode(world, Expert(task="push", scene="push"), actor, config, 8_500)
    finally:
        world.close()
    assert [int(row["tick"]) for row in rows] == [0, 3, 6, 9, 12, 15]
    assert all(np.abs(row["chunk"]).max() <= 1.0 for row in rows)


def test_a_history_that_the_policy_cannot_read_is_refused(folder: Path) -> None:
    checkpoint = load_temporal_checkpoint(folder)
    with pytest.raises(ValueError, match="9 places; the policy reads 7"):
        TemporalActor(
            checkpoint, num_flow_steps=1, history=HistoryConfig(num_whole=4, num_encoded=5)
        )
