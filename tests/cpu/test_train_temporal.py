"""Temporal training: batches are functions of their step, the trunk stays, and a toy task that needs memory is learned."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ganglion.errors import FieldError
from ganglion.models.policies.temporal import FROZEN, TemporalConfig, TemporalPolicy
from ganglion.models.tiny import TINY_FLOW, tiny_flow
from ganglion.train.temporal import TemporalFitConfig, TemporalProgress, fit_temporal
from ganglion.train.temporal_actor import Roads
from ganglion.train.temporal_dataset import TemporalDataset

MODEL = TemporalConfig(num_past=3, hidden_dim=16)
LENGTHS = (4, 7, 5, 6)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Episodes whose goal is a bright or a dark first picture; afterwards nothing tells them apart."""
    rng = np.random.default_rng(0)
    side, total = TINY_FLOW.view_height_px, sum(LENGTHS)
    for shard in range(4):
        is_first = np.concatenate([np.arange(n) == 0 for n in LENGTHS])
        sign = np.repeat(rng.permutation([-1, -1, 1, 1]), LENGTHS)
        views = rng.integers(90, 110, (2, total, side, side, 3))
        views = np.where((is_first & (sign > 0))[None, :, None, None, None], 250, views)
        chunk = np.zeros((total, TINY_FLOW.horizon, 4), np.float32)
        chunk[..., 0] = 0.5 * sign[:, None]
        privileged = np.zeros((total, 39), np.float32)
        privileged[:, 36] = 0.1 * sign
        np.savez(
            tmp_path / f"push.{shard:03d}.npz",
            corner=views[0].astype(np.uint8),
            gripper=views[1].astype(np.uint8),
            state=rng.normal(size=(total, 4)).astype(np.float32),
            chunk=chunk,
            privileged=privileged,
            is_goal_visible=is_first,
            episode=np.repeat(np.arange(len(LENGTHS)), LENGTHS),
        )
    np.savez(tmp_path / "push.999.npz")  # all of its episodes failed
    return tmp_path


def dataset(data_dir: Path) -> TemporalDataset:
    tiny = tiny_flow(seed=1)
    policy = TemporalPolicy.from_flow(tiny.policy, MODEL)
    return TemporalDataset(data_dir, policy, tiny, num_past=MODEL.num_past)


def test_a_batch_is_a_function_of_its_step_and_stays_within_episodes(data_dir: Path) -> None:
    data = dataset(data_dir)
    assert (len(data), data.num_episodes) == (4 * sum(LENGTHS), 16)
    sizes = {"num_episodes": 6, "num_rows": 40, "seed": 3, "road_dropout": 0.3}
    batch, again = data.batch(step=5, **sizes), data.batch(step=5, **sizes)  # type: ignore[arg-type]
    for name in ("frames", "rows", "past", "has_history"):
        assert np.array_equal(getattr(batch, name), getattr(again, name))
    assert not np.array_equal(batch.rows, data.batch(step=6, **sizes).rows)  # type: ignore[arg-type]
    for row in range(40):
        place, past = batch.row_place[row], batch.past[row]
        kept = past[past >= 0]
        assert len(kept) == min(place, MODEL.num_past)
        assert np.array_equal(kept, np.unique(kept))
        assert (kept < place).all()
        assert batch.rows[row] == batch.frames[batch.row_episode[row], place]


def test_stamps_count_from_the_start_of_each_episode(data_dir: Path) -> None:
    data = dataset(data_dir)
    expected = np.concatenate([np.arange(n) for n in LENGTHS] * 4)
    assert np.array_equal(data.pages[:, -1, 1].numpy(), expected)


def test_a_folder_without_samples_is_named(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="data_dir"):
        dataset(tmp_path)


def test_what_was_seen_once_is_remembered(data_dir: Path) -> None:
    """With either road the sign of the action is known long after the picture; without both it cannot be."""
    tiny = tiny_flow(seed=1)
    config = TemporalFitConfig(
        num_steps=150,
        num_episodes=8,
        num_rows=32,
        memory_rate=5e-3,
        expert_rate=5e-3,
        num_warmup_steps=10,
        ema_decay=0.9,
        prefix_share=0.0,
        num_steps_per_draft=100,
    )
    seen: list[TemporalProgress] = []
    drafts: list[TemporalPolicy] = []
    policy = fit_temporal(config, tiny, data_dir, seen.append, model=MODEL, on_draft=drafts.append)
    assert len(drafts) == 1
    assert seen[-1].hidden_goal_m < 0.5 * seen[0].hidden_goal_m
    before = tiny.policy.state_dict()
    for name, value in policy.state_dict().items():
        if name.startswith(FROZEN):
            assert torch.equal(value, before[name.removeprefix("flow.")]), name
    data = TemporalDataset(data_dir, policy, tiny, num_past=MODEL.num_past)
    for roads in (Roads.HISTORY, Roads.RECURRENT):
        assert _sign_accuracy(policy, data, roads) > 0.9
    assert _sign_accuracy(policy, data, Roads.NONE) < 0.8


@torch.inference_mode()
def _sign_accuracy(policy: TemporalPolicy, data: TemporalDataset, roads: Roads) -> float:
    """Over the last frame of every episode: does the first action have the right sign?"""
    hits = []
    for first, last in zip(data._bounds[:-1], data._bounds[1:] - 1, strict=True):
        hidden = torch.zeros(1, MODEL.hidden_dim)
        for page in data.pages[first : last + 1]:
            hidden = policy.advance(hidden, page[None])
        past = torch.zeros(1, MODEL.num_past, *data.pages.shape[1:])
        if Roads.HISTORY in roads:
            past[0, 0] = data.pages[first]
        if Roads.RECURRENT not in roads:
            hidden = torch.zeros_like(hidden)
        rows = np.array([last])
        context = torch.cat([data.text_of(rows), data.observation_kv[last][None]], dim=3)
        seq = torch.tensor([last - first])
        memory = policy.recall(past, hidden, seq, context)
        noise = torch.zeros(1, TINY_FLOW.horizon, 4)
        latent = policy.flow.denoise(
            noise,
            torch.zeros(1, TINY_FLOW.horizon),
            torch.full((1,), 0.2),
            torch.cat([context, memory], dim=3),
            5,
        )
        hits.append(bool(latent[0, 0, 0] * data.chunk[last, 0, 0] > 0))
    return float(np.mean(hits))
