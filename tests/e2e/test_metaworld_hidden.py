"""The shipped memory: what its card says, and an arm that brings the puck to a goal that it can no longer see."""

import json
from pathlib import Path

import pytest
import torch

from ganglion.memory.retention.history import HistoryConfig
from ganglion.models.policies.temporal_checkpoint import load_temporal_checkpoint
from ganglion.models.policies.temporal_model import TemporalModel
from ganglion.models.registry import policy_folder
from ganglion.robots.hidden import HIDDEN_TASKS, HiddenGoal
from ganglion.train.temporal_actor import Roads, TemporalActor
from ganglion.train.temporal_evaluate import Arm, TemporalEvaluateConfig, run_wave

FOLDER: Path = policy_folder("metaworld-ten").parent / "metaworld-hidden"


def test_it_rests_on_the_shipped_base_and_is_served_as_stages() -> None:
    checkpoint = load_temporal_checkpoint(FOLDER)
    model = TemporalModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    assert checkpoint.spec.name == "metaworld-hidden"
    assert [stage.name for stage in model.stages[-4:]] == [
        "memory",
        "recurrent",
        "recall",
        "denoise",
    ]
    page_bytes = {layout.name: layout.page_bytes for layout in model.layouts}
    assert (page_bytes["memory"], page_bytes["recurrent"]) == (5120, 768)


def test_the_card_shows_that_memory_matters() -> None:
    results = json.loads((FOLDER / "evaluation.json").read_text())

    def mean(name: str) -> float:
        solved = [
            ticks is not None
            for result in results[name]
            for ticks in result["solved_ticks"].values()
        ]
        assert len(solved) == 20 * len(HIDDEN_TASKS)
        return sum(solved) / len(solved)

    assert mean("base, goal shown") == 1.0
    assert mean("base") < 0.3
    assert mean("none") < 0.6
    for name in ("history", "history int8", "gru", "both"):
        assert mean(name) > 0.85, name


@pytest.mark.slow
@pytest.mark.parametrize("roads", [Roads.HISTORY, Roads.RECURRENT])
def test_an_arm_remembers_where_the_goal_was(roads: Roads) -> None:
    torch.set_num_threads(1)
    actor = TemporalActor(
        load_temporal_checkpoint(FOLDER),
        num_flow_steps=5,
        roads=roads,
        history=HistoryConfig(num_whole=1, num_encoded=6),
    )
    worlds = [HiddenGoal(task="push") for _ in range(3)]
    try:
        arms = [
            Arm(world, seed, actor.new_memory())
            for world, seed in zip(worlds, range(20_000, 20_003), strict=True)
        ]
        run_wave(arms, actor, TemporalEvaluateConfig(max_ticks=110))
        assert sum(arm.world.success for arm in arms) == 3
    finally:
        for world in worlds:
            world.close()
