"""Training: batches are a function of the step, a resumed run is the uninterrupted one, prefixes are conditions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ganglion.errors import CheckpointError, FieldError
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint
from ganglion.models.tiny import TINY_FLOW
from ganglion.robots.metaworld import TASKS
from ganglion.train.dataset import ANY, AugmentConfig, Dataset, Statistics, prompts
from ganglion.train.demonstrations import CollectConfig, plan_shards
from ganglion.train.fit import (
    FitConfig,
    FitProgress,
    averaged_policy,
    between,
    draw_of_step,
    fit,
    learning_rate,
)
from ganglion.train.ship import ship

MODEL = replace(TINY_FLOW, vocab_size=96, horizon=48, max_prefix=20)
CONFIG = FitConfig(
    num_steps=6, batch_size=4, num_warmup_steps=2, num_steps_per_state=3, learning_rate=3e-3
)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two shards of nine samples whose action is a function of the picture."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("drawer-open.plain.000.npz", "push.crossed.000.npz"):
        views = rng.integers(0, 256, (2, 9, 32, 32, 3)).astype(np.uint8)
        level = views[0].mean((1, 2, 3), keepdims=True)[:, :, 0] / 127.5 - 1
        np.savez(
            folder / name,
            corner=views[0],
            gripper=views[1],
            state=rng.normal(size=(9, 4)).astype(np.float32),
            privileged=rng.normal(size=(9, 39)).astype(np.float32),
            chunk=np.broadcast_to(level, (9, 48, 4)).astype(np.float32),
        )
    return folder


def test_a_batch_is_a_function_of_seed_and_step(data_dir: Path) -> None:
    dataset = Dataset(data_dir)
    assert len(dataset) == 18

    def batch(step: int, seed: int = 0) -> bytes:
        out = dataset.batch(step=step, batch_size=4, seed=seed, augment=AugmentConfig())
        return out.images.tobytes() + out.state.tobytes() + out.prompt_index.tobytes()

    assert batch(5) == batch(5)
    assert len({batch(0), batch(1), batch(0, seed=1)}) == 3


def test_an_epoch_shows_every_sample_once(data_dir: Path) -> None:
    dataset = Dataset(data_dir)
    still = AugmentConfig(max_shift_px=0, gain=0, bias=0, state_noise=0)
    seen = [
        row.tobytes()
        for step in range(9)
        for row in dataset.batch(step=step, batch_size=2, seed=0, augment=still).state
    ]
    assert len(set(seen)) == 18


def test_prompts_follow_the_task(data_dir: Path) -> None:
    batch = Dataset(data_dir).batch(step=0, batch_size=18, seed=0, augment=AugmentConfig())
    told = {prompts()[index] for index in batch.prompt_index}
    allowed = {
        text
        for name in ("drawer-open", "push")
        for text in (TASKS[name].prompt, *TASKS[name].paraphrases)
    }
    assert told <= allowed
    assert len(told) > 2


def test_pictures_shift_by_whole_pixels_only(data_dir: Path) -> None:
    dataset = Dataset(data_dir)
    shifted = AugmentConfig(max_shift_px=2, gain=0, bias=0, state_noise=0)
    still = replace(shifted, max_shift_px=0)
    moved = dataset.batch(step=0, batch_size=18, seed=0, augment=shifted).images
    plain = dataset.batch(step=0, batch_size=18, seed=0, augment=still).images
    assert (moved != plain).any()
    for before, after in zip(
        plain.reshape(-1, 32, 32, 3), moved.reshape(-1, 32, 32, 3), strict=True
    ):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), mode="edge")
        assert any(
            np.array_equal(after, padded[top : top + 32, left : left + 32])
            for top in range(5)
            for left in range(5)
        )


def test_no_shards_is_said_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="data_dir") as caught:
        Dataset(tmp_path)
    assert "ganglion train collect" in caught.value.advice


def test_half_of_the_draws_have_a_committed_prefix() -> None:
    draw = draw_of_step(FitConfig(), MODEL, step=3, num_committed=np.full(400, ANY))
    is_committed = draw.tau == 1.0
    lengths = is_committed.sum(1)
    assert int(lengths.max()) == MODEL.max_prefix
    assert 0.4 < float((lengths > 0).float().mean()) < 0.6
    # a prefix is at the front, and behind it all tokens stand at one time
    expected = torch.arange(MODEL.horizon)[None] < lengths[:, None]
    assert torch.equal(is_committed, expected)
    free = draw.tau.masked_fill(is_committed, float("nan"))
    assert torch.equal(free.nan_to_num(9).amin(1), free.nan_to_num(-9).amax(1))


def test_known_prefixes_are_the_ones_that_are_given() -> None:
    num_committed = np.array([0, 3, 20, 7])
    draw = draw_of_step(FitConfig(), MODEL, step=3, num_committed=num_committed)
    assert (draw.tau == 1.0).sum(1).tolist() == num_committed.tolist()


@pytest.fixture
def late_dir(tmp_path: Path) -> Path:
    """Two episodes of rows at uneven ticks: an expert's chunk counts up from its tick, what ran is minus its tick."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "late"
    folder.mkdir()
    ticks = np.array([0, 3, 5, 9, 30, 0, 2])
    ahead = np.arange(48, dtype=np.float32)
    np.savez(
        folder / "push.delayed-in-still-push.000.npz",
        corner=rng.integers(0, 256, (7, 32, 32, 3)).astype(np.uint8),
        gripper=rng.integers(0, 256, (7, 32, 32, 3)).astype(np.uint8),
        state=np.full((7, 4), 0.5, np.float32),
        privileged=rng.normal(size=(7, 39)).astype(np.float32),
        chunk=np.repeat((ticks[:, None] + ahead)[..., None], 4, 2).astype(np.float32),
        executed=-np.repeat((ticks[:, None] + ahead[:20])[..., None], 4, 2).astype(np.float32),
        tick=ticks.astype(np.int32),
        episode=np.array([0, 0, 0, 0, 0, 1, 1], np.int32),
    )
    return folder


PLAIN = Statistics(
    state_mean=np.zeros(4, np.float32),
    state_std=np.ones(4, np.float32),
    action_mean=np.zeros(4, np.float32),
    action_std=np.ones(4, np.float32),
)


def test_late_samples_are_asked_what_a_late_chunk_must_say(late_dir: Path) -> None:
    dataset = Dataset(late_dir, PLAIN)
    still = AugmentConfig(state_noise=0, late_share=1.0, rolled_share=0.0)
    seen = set()
    for step in range(40):
        batch = dataset.batch(step=step, batch_size=7, seed=0, augment=still)
        for chunk, num_committed in zip(batch.chunk[..., 0], batch.num_committed, strict=True):
            first = abs(chunk[0])  # the tick of the picture
            # what ran, then the expert from the tick on at which the chunk arrives
            assert (chunk[:num_committed] == -(first + np.arange(num_committed))).all()
            assert (chunk[num_committed:] == first + np.arange(num_committed, 48)).all()
            seen.add((int(first), int(num_committed)))
    # every pair of rows of one episode that lie at most 20 ticks apart; last rows are asked as they are
    pairs = {(0, 3), (0, 5), (0, 9), (3, 2), (3, 6), (5, 4), (0, 2)}
    assert seen == pairs | {(9, 0), (30, 0), (2, 0)}


def test_rolled_samples_start_where_the_arm_will_be(late_dir: Path) -> None:
    dataset = Dataset(late_dir, PLAIN)
    rolled = AugmentConfig(state_noise=0, late_share=0.0, rolled_share=1.0)
    plain = replace(rolled, rolled_share=0.0)
    batch = dataset.batch(step=0, batch_size=7, seed=0, augment=rolled)
    unrolled = dataset.batch(step=0, batch_size=7, seed=0, augment=plain)
    assert (batch.num_committed == 0).all()
    assert (unrolled.num_committed == 0).all()
    assert (unrolled.state == 0.5).all()
    for row in range(7):
        delay = int(batch.chunk[row, 0, 0] - unrolled.chunk[row, 0, 0])
        # what ran is negative in all dimensions: the hand goes back, the gripper opens
        assert (batch.state[row, :3] < 0.5).all() == (delay > 0), delay


def test_training_goes_on_from_a_checkpoint(data_dir: Path, late_dir: Path, tmp_path: Path) -> None:
    fitted = fit(CONFIG, data_dir, tmp_path / "first", lambda _: None, model=MODEL)
    ship(fitted, tmp_path / "checkpoint")
    start = load_flow_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    config = replace(CONFIG, num_steps=1, learning_rate=0.0)
    again = fit(config, late_dir, tmp_path / "second", lambda _: None, model=MODEL, start=start)
    for name, value in start.policy.state_dict().items():
        torch.testing.assert_close(again.policy.state_dict()[name], value, msg=name)
    np.testing.assert_allclose(again.statistics.action_mean, fitted.statistics.action_mean)


def test_between_the_start_and_what_was_learnt(data_dir: Path, tmp_path: Path) -> None:
    fitted = fit(CONFIG, data_dir, tmp_path / "first", lambda _: None, model=MODEL)
    ship(fitted, tmp_path / "checkpoint")
    start = load_flow_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    learnt = fit(CONFIG, data_dir, tmp_path / "second", lambda _: None, model=MODEL, start=start)
    for share in (0.0, 0.3, 1.0):
        mixed = between(start, learnt, share).policy.state_dict()
        for name, value in start.policy.state_dict().items():
            expected = (1 - share) * value + share * learnt.policy.state_dict()[name]
            torch.testing.assert_close(mixed[name], expected, msg=name)


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = FitConfig(num_steps=100, num_warmup_steps=10, learning_rate=1.0, final_rate_share=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def weights(run_dir: Path) -> torch.Tensor:
    policy = averaged_policy(run_dir, model=MODEL).policy
    return torch.cat([value.flatten() for value in policy.state_dict().values()])


def test_a_resumed_run_equals_an_uninterrupted_one(data_dir: Path, tmp_path: Path) -> None:
    reports: list[FitProgress] = []
    fit(CONFIG, data_dir, tmp_path / "whole", reports.append, model=MODEL)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]

    def stop_at_five(report: FitProgress) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, data_dir, tmp_path / "cut", stop_at_five, model=MODEL)
    resumed: list[FitProgress] = []
    result = fit(CONFIG, data_dir, tmp_path / "cut", resumed.append, model=MODEL)
    assert [report.step for report in resumed] == [4, 5, 6]
    assert result.step == 6
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_state_of_other_sizes_is_refused(data_dir: Path, tmp_path: Path) -> None:
    fit(replace(CONFIG, num_steps=1), data_dir, tmp_path, lambda _: None, model=MODEL)
    other = replace(MODEL, expert_width=32)
    with pytest.raises(CheckpointError, match=r"expected .*32.* got .*24"):
        fit(CONFIG, data_dir, tmp_path, lambda _: None, model=other)


def test_training_learns_and_ships(data_dir: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    config = replace(CONFIG, num_steps=80, batch_size=16, num_steps_per_state=80)
    result = fit(
        config, data_dir, tmp_path / "run", lambda p: losses.append(p.flow_loss), model=MODEL
    )
    assert losses[-1] < 0.85 * losses[0]
    ship(result, tmp_path / "shipped")
    checkpoint = load_flow_checkpoint(tmp_path / "shipped")
    assert checkpoint.spec.horizon == 48
    assert checkpoint.spec.action_high == (1.0,) * 4


def test_shards_are_interleaved_and_their_seeds_are_for_training() -> None:
    plans = plan_shards(CollectConfig())
    assert len({plan.file_name for plan in plans}) == len(plans)
    assert {plan.task for plan in plans[: len(TASKS) + 2]} == set(TASKS)
    assert {plan.scene for plan in plans if plan.task != plan.scene} == {"push", "pick-place"}
    assert all(0 <= seed < 10_000 for plan in plans for seed in plan.seeds)
    assert sum(len(plan.seeds) for plan in plans if plan.task == plan.scene == "push") == 250
