"""The recipe's ends, with the shipped policy: closed-loop evaluation, and everything from nothing in miniature."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ganglion.errors import FieldError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.registry import policy_folder
from ganglion.robots.metaworld import TASKS
from ganglion.train.card import CARD_FILE, RESULTS_FILE
from ganglion.train.corrections import CorrectConfig
from ganglion.train.delays import DelayedConfig
from ganglion.train.demonstrations import CollectConfig
from ganglion.train.evaluate import (
    EvaluateConfig,
    Instruction,
    TaskResult,
    evaluate,
    evaluate_each,
)
from ganglion.train.fit import FitConfig
from ganglion.train.recipe import (
    LEARNT_SHARE,
    CorrectionRound,
    DelayRound,
    RecipeConfig,
    Report,
    run_recipe,
    tune_for_delays,
)
from ganglion.types import Execution

SHIPPED = policy_folder("metaworld-ten")
QUICK = EvaluateConfig(
    tasks=("drawer-close",), seeds=(20_001, 20_003), max_ticks=200, num_workers=1
)


def test_the_shipped_policy_closes_half_open_drawers_in_every_mode() -> None:
    late = replace(QUICK, delay_ticks=4, ticks_per_chunk=4)
    configs = [
        QUICK,
        replace(QUICK, delay_ticks=0),
        *(replace(late, execution=mode) for mode in Execution),
        replace(QUICK, delay_ticks=8, execution=Execution.PREFIX, is_context_public=True),
    ]
    heard: list[tuple[int, TaskResult]] = []
    found = evaluate_each(configs, SHIPPED, lambda at, result: heard.append((at, result)))
    assert heard == [(at, result) for at, (result,) in enumerate(found)]
    for config, (result,) in zip(configs, found, strict=True):
        assert result.success_rate == 1.0, config
        assert all(ticks is not None and ticks > 5 for ticks in result.solved_ticks.values())
        assert result.switch_jump > 0.0
        assert result.jerk > 0.0
    assert len({tuple(result.solved_ticks.items()) for (result,) in found}) > 5, "modes differ"


def test_configs_that_share_processes_agree_on_what_they_share() -> None:
    other = replace(QUICK, dtype="float32")
    with pytest.raises(FieldError, match="dtype: expected the same in all configs"):
        evaluate_each([QUICK, other], SHIPPED, lambda _, __: None)


def test_told_the_opposite_it_does_not() -> None:
    config = replace(QUICK, instruction=Instruction.OPPOSITE)
    (result,) = evaluate(config, SHIPPED, lambda _: None)
    assert result.prompt == "open the drawer"
    assert result.success_rate == 0.0


def test_a_task_without_opposite_is_named() -> None:
    config = replace(QUICK, tasks=("door-close",), instruction=Instruction.OPPOSITE)
    with pytest.raises(FieldError, match="tasks: expected tasks with an opposite, got door-close"):
        evaluate(config, SHIPPED, lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_recipe_in_miniature(tmp_path: Path) -> None:
    config = RecipeConfig(
        collect=CollectConfig(num_episodes=1, num_hard_episodes=1, num_crossed_episodes=1),
        fit=FitConfig(num_steps=4, batch_size=8, num_warmup_steps=1, num_steps_per_state=2),
        rounds=(
            CorrectionRound(
                after_step=2,
                config=CorrectConfig(
                    num_shards=1,
                    num_hard_shards=1,
                    num_crossed_shards=1,
                    episodes_per_shard=1,
                    policy_ticks=(3, 6),
                    max_ticks=12,
                ),
            ),
        ),
        evaluate=EvaluateConfig(seeds=(20_000,), max_ticks=6),
    )
    reports: list[Report] = []
    out = tmp_path / "out"
    figures = run_recipe(
        config,
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        out_dir=out,
        on_report=reports.append,
    )
    assert len(list((tmp_path / "data").glob("*.npz"))) == 2 * (len(TASKS) + 2)
    assert figures.num_steps == 4
    assert load_flow_checkpoint(out).spec.horizon == 48
    assert all(task in (out / CARD_FILE).read_text() for task in TASKS)
    assert len(json.loads((out / RESULTS_FILE).read_text())["opposite"]) == 6
    num_reports = len(reports)
    run_recipe(
        config,
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        out_dir=out,
        on_report=reports.append,
    )
    assert len(reports) - num_reports == 10 + 10 + 6  # nothing is done again but the measuring


def test_late_chunks_are_driven_with_and_learnt_from(tmp_path: Path) -> None:
    drive = DelayedConfig(
        num_still_shards=1,
        num_moving_shards=1,
        num_crossed_shards=1,
        episodes_per_shard=1,
        policy_ticks=(3, 6),
        max_ticks=12,
    )
    fitting = FitConfig(num_steps=2, batch_size=8, num_warmup_steps=1)
    again = replace(drive, num_crossed_shards=0, round_name="again", hard_factor=2)
    rounds = (DelayRound(drive=drive, fit=fitting), DelayRound(drive=again, fit=fitting))
    reports: list[Report] = []
    data_dir, run_dir = tmp_path / "data", tmp_path / "run"
    result = tune_for_delays(rounds, SHIPPED, data_dir, run_dir, reports.append)
    assert result.step == 4
    # still and moving scenes of every task, two crossed ones; in the second round push and pick-place twice
    assert len(list(data_dir.glob("*.npz"))) == 2 * len(TASKS) + 2 + 2 * (len(TASKS) + 2)
    start = load_flow_checkpoint(SHIPPED, dtype=torch.float32).policy.state_dict()
    learnt = load_flow_checkpoint(run_dir / "delays-1" / "checkpoint", dtype=torch.float32)
    for name, value in result.policy.state_dict().items():
        expected = (1 - LEARNT_SHARE) * start[name] + LEARNT_SHARE * learnt.policy.state_dict()[
            name
        ]
        torch.testing.assert_close(
            value, expected, atol=2e-2, rtol=2e-2, msg=name
        )  # bfloat16 files
