"""Temporal checkpoints: what is written is what is read, over its base; what does not fit is named."""

import json
from pathlib import Path

import pytest
import torch

from ganglion.errors import CheckpointError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint, save_flow_checkpoint
from ganglion.models.policies.temporal import TemporalConfig, TemporalPolicy
from ganglion.models.policies.temporal_checkpoint import (
    load_temporal_checkpoint,
    save_temporal_checkpoint,
)
from ganglion.models.policies.temporal_model import TemporalModel
from ganglion.models.tiny import tiny_flow
from tests.cpu.temporal_stage import tiny_temporal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny = tiny_flow(seed=1)
    save_flow_checkpoint(
        tmp_path / "base",
        tiny.policy,
        tiny.processor,
        control_hz=80.0,
        action_low=tiny.spec.action_low,
        action_high=tiny.spec.action_high,
    )
    base = load_flow_checkpoint(tmp_path / "base", dtype=torch.float32)
    policy = tiny_temporal(base).policy
    save_temporal_checkpoint(tmp_path / "memory", policy, base, base_dir="../base")
    return tmp_path / "memory"


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    loaded = load_temporal_checkpoint(folder, dtype=torch.float32)
    base = load_flow_checkpoint(folder.parent / "base", dtype=torch.float32)
    expected = tiny_temporal(base).policy.state_dict()
    for name, value in loaded.policy.state_dict().items():
        assert torch.equal(value, expected[name].to(torch.bfloat16).float()), name
    assert (loaded.spec.name, loaded.spec.family) == ("memory", "ganglion_temporal")
    assert loaded.spec.version != base.spec.version


def test_the_version_follows_weights_and_base(folder: Path) -> None:
    before = load_temporal_checkpoint(folder).spec.version
    assert load_temporal_checkpoint(folder).spec.version == before
    edit(folder / "config.json", note="other")
    assert load_temporal_checkpoint(folder).spec.version != before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"type": "act"}, "type: expected 'ganglion_temporal', got 'act'"),
        ({"base": ""}, "base: expected a folder"),
        ({"base": "../nowhere"}, "nowhere"),
        ({"base_version": "0"}, "base_version: expected '0'"),
        ({"memory": {"num_past": 3}}, r"memory: expected the keys .*got \['num_past'\]"),
        ({"memory": {"num_past": 0, "hidden_dim": 16}}, "memory.num_past: expected a positive"),
        ({"memory": {"num_past": 99, "hidden_dim": 16}}, "at most 64, got 99"),
        ({"memory": {"num_past": 3, "hidden_dim": 8}}, "shape expected"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, changes: dict[str, object], problem: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=problem):
        load_temporal_checkpoint(folder)


def test_memory_tokens_fill_whole_pages() -> None:
    tiny = tiny_flow(seed=1)
    policy = TemporalPolicy.from_flow(tiny.policy, TemporalConfig(num_past=4, hidden_dim=16))
    with pytest.raises(CheckpointError, match=r"4 \+ 1 memory tokens do not fill pages of 4"):
        TemporalModel(policy, tiny.processor, tiny.spec)
