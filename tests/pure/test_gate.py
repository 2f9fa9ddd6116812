"""Gate: noise is skipped, what moves is not, and the reference never strays further than it says."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.errors import ConfigError, FieldError
from ganglion.pipeline.gate import (
    UNASKED_IMAGES,
    Gate,
    GateConfig,
    Perceive,
    Reason,
    ViewDecision,
    ViewGate,
)
from ganglion.pipeline.patch_grid import (
    BoolArray,
    crop_share,
    only_read_by,
    reading_tokens,
    seen_patches,
)
from ganglion.spec import ViewSpec
from ganglion.types import Observation, RobotId, SessionId, UInt8Array

PATCH_PX = 16
PERIOD_S = 0.05
FIXED = ViewSpec(key="fixed", height=80, width=80, patch_px=PATCH_PX)
BETWEEN = 9  # levels: more than settle_rms, less than change_rms at a noise of 4
NEVER = GateConfig(refresh_ms=1e9, attended_refresh_ms=1e9)


def view_gate(config: GateConfig = NEVER, height_px: int = 80, width_px: int = 80) -> ViewGate:
    return ViewGate(config, height_px=height_px, width_px=width_px, patch_px=PATCH_PX)


def scene(rng: np.random.Generator, height_px: int = 80, width_px: int = 80) -> UInt8Array:
    return rng.integers(30, 220, (height_px, width_px, 3)).astype(np.uint8)


def noisy(rng: np.random.Generator, image: UInt8Array, std: float = 2.0) -> UInt8Array:
    return np.clip(np.rint(image + rng.normal(0.0, std, image.shape)), 0, 255).astype(np.uint8)


def grid(*places: tuple[int, int]) -> BoolArray:
    marked = np.zeros((5, 5), np.bool_)
    for place in places:
        marked[place] = True
    return marked


def cell_rms(image: UInt8Array, reference: UInt8Array, cell_px: int) -> float:
    """The largest root mean square of any cell, computed slowly; cells at the edge may be cut."""
    squares = (image.astype(np.float64) - reference) ** 2
    return max(
        float(squares[top : top + cell_px, left : left + cell_px].mean()) ** 0.5
        for top in range(0, image.shape[0], cell_px)
        for left in range(0, image.shape[1], cell_px)
    )


def test_noise_is_skipped() -> None:
    rng = np.random.default_rng(0)
    still, gate = scene(rng), view_gate()
    decisions = [gate.decide(noisy(rng, still), now_s=at * PERIOD_S) for at in range(1000)]
    assert decisions[0].reason is Reason.NOTHING_OLD
    assert {decision.action for decision in decisions[1:]} == {Perceive.SKIP}
    assert all(decision.image is decisions[0].image for decision in decisions[1:])
    assert not decisions[1].tokens.any()


@pytest.mark.parametrize("contrast", [30, 80])
def test_a_small_thing_that_moves_is_seen_where_it_was_and_where_it_is(contrast: int) -> None:
    rng = np.random.default_rng(1)
    empty = np.full((80, 80, 3), 100, np.uint8)
    before, after = empty.copy(), empty.copy()
    before[20:23, 20:23] += np.uint8(contrast)
    after[20:23, 60:63] += np.uint8(contrast)
    gate = view_gate()
    gate.decide(noisy(rng, before), now_s=0.0)
    decision = gate.decide(noisy(rng, after), now_s=PERIOD_S)
    assert decision.action is Perceive.PATCHES
    assert decision.reason is Reason.SOME_CHANGED
    expected = reading_tokens(grid((1, 1), (1, 3)))
    assert np.array_equal(decision.tokens, expected)


def test_slow_motion_cannot_creep_past() -> None:
    """Each frame differs from the last by less than noise; the sum is seen."""
    gate = view_gate(GateConfig(noise_std=2.0, refresh_ms=1e9))
    actions = []
    for level in range(40):
        image = np.full((80, 80, 3), 100, np.uint8)
        image[32:48, 32:48] += np.uint8(level)
        decision = gate.decide(image, now_s=level * PERIOD_S)
        actions.append(decision.action)
        assert cell_rms(image, decision.image, 4) <= NEVER.change_rms
    assert Perceive.PATCHES in actions
    assert Perceive.SKIP in actions


def test_the_last_of_a_motion_is_seen_more_sharply() -> None:
    config = GateConfig(noise_std=4.0, refresh_ms=1e9)
    assert config.settle_rms < BETWEEN < config.change_rms
    image = np.full((80, 80, 3), 100, np.uint8)
    calm = view_gate(config)
    calm.decide(image, now_s=0.0)
    assert calm.decide(image + np.uint8(BETWEEN), now_s=1.0).action is Perceive.SKIP
    moving = view_gate(config)
    moving.decide(image, now_s=0.0)
    moved = image.copy()
    moved[:16, :16] += np.uint8(50)
    assert moving.decide(moved, now_s=1.0).action is Perceive.PATCHES
    moved[:16, :16] += np.uint8(BETWEEN)
    assert moving.decide(moved, now_s=2.0).action is Perceive.PATCHES
    assert moving.decide(moved, now_s=3.0).action is Perceive.SKIP


def test_motion_may_pass_up_to_its_bound_but_not_where_the_instruction_attends() -> None:
    """One pixel of sixteen that changes by 72 makes a root mean square of 18."""
    image = np.full((80, 80, 3), 100, np.uint8)
    flipped = image.copy()
    flipped[40, 40] += np.uint8(72)
    config = GateConfig(motion_rms=20.0, refresh_ms=1e9, attended_refresh_ms=1e9)
    for attended, expected in ((None, Perceive.SKIP), (grid((2, 2)), Perceive.PATCHES)):
        gate = view_gate(config)
        gate.decide(image, now_s=0.0)
        assert gate.decide(flipped, now_s=0.1, attended=attended).action is expected
    strict = view_gate()
    strict.decide(image, now_s=0.0)
    assert strict.decide(flipped, now_s=0.1).action is Perceive.PATCHES


def test_a_view_is_perceived_whole_every_refresh_ms_at_the_latest() -> None:
    rng = np.random.default_rng(2)
    still = scene(rng)
    gate = view_gate(GateConfig(refresh_ms=500.0))
    whole_s = [
        at * PERIOD_S
        for at in range(60)
        if gate.decide(noisy(rng, still), now_s=at * PERIOD_S).action is Perceive.FULL
    ]
    assert whole_s == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])


def test_a_clock_that_goes_backwards_makes_a_refresh_due() -> None:
    gate, image = view_gate(), np.full((80, 80, 3), 9, np.uint8)
    gate.decide(image, now_s=100.0)
    assert gate.decide(image, now_s=99.0).reason is Reason.REFRESH_DUE
    assert gate.decide(image, now_s=99.5).action is Perceive.SKIP


def test_changes_all_over_are_perceived_whole_until_it_is_calmer() -> None:
    config = GateConfig(refresh_ms=1e9, full_share=0.8, calm_share=0.5)
    gate, image = view_gate(config), np.full((80, 80, 3), 100, np.uint8)
    gate.decide(image, now_s=0.0)

    def step(num_rows: int) -> ViewDecision:
        nonlocal image
        image = image.copy()
        image[: num_rows * 16] ^= np.uint8(64)
        return gate.decide(image, now_s=0.0)

    assert step(2).action is Perceive.PATCHES, "three rows of tokens of five: 0.6"
    assert step(5).reason is Reason.CHANGED_ALL_OVER
    assert step(2).reason is Reason.CHANGED_ALL_OVER, "0.6 is not yet calm"
    assert [step(1).reason for _ in range(UNASKED_IMAGES)] == [Reason.BUSY] * UNASKED_IMAGES
    assert step(1).action is Perceive.PATCHES
    assert step(2).action is Perceive.PATCHES


def test_attended_tokens_are_judged_sharply_and_refreshed_more_often() -> None:
    image = np.full((80, 80, 3), 100, np.uint8)
    attended = grid((2, 2))
    config = GateConfig(noise_std=4.0, refresh_ms=1000.0, attended_refresh_ms=200.0)
    gate = view_gate(config)
    gate.decide(image, now_s=0.0, attended=attended)
    shifted = image + np.uint8(BETWEEN)
    decision = gate.decide(shifted, now_s=0.05, attended=attended)
    assert decision.reason is Reason.SOME_CHANGED
    assert np.array_equal(decision.tokens, reading_tokens(seen_patches(attended)))
    assert (decision.image[16:48, 16:48] == 100 + BETWEEN).all(), "what the token sees is new"
    assert (decision.image[64:] == 100).all()
    still = decision.image
    assert gate.decide(still, now_s=0.1, attended=attended).action is Perceive.SKIP
    due = gate.decide(still, now_s=0.2, attended=attended)
    assert (due.action, due.reason) == (Perceive.PATCHES, Reason.ATTENDED_DUE)
    assert due.tokens[2, 2]
    assert gate.decide(still, now_s=0.25, attended=attended).action is Perceive.SKIP


def test_vla_caches_own_rule_perceives_attended_tokens_in_every_frame() -> None:
    gate = view_gate(GateConfig(attended_refresh_ms=0.0))
    image = np.full((80, 80, 3), 100, np.uint8)
    actions = [gate.decide(image, now_s=at * 0.01, attended=grid((0, 0))).action for at in range(5)]
    assert actions == [Perceive.FULL] + [Perceive.PATCHES] * 4
    assert gate.decide(image, now_s=0.1, attended=grid()).action is Perceive.SKIP


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height_px=st.integers(17, 90),
    width_px=st.integers(17, 90),
    num_frames=st.integers(2, 12),
)
def test_the_reference_stays_within_the_bound_and_changes_only_where_tokens_say(
    seed: int, height_px: int, width_px: int, num_frames: int
) -> None:
    """Any size of view, any motion: the two promises that make the kept features exact."""
    rng = np.random.default_rng(seed)
    config = GateConfig(
        motion_rms=float(rng.choice([0.0, 20.0])),
        refresh_ms=float(rng.choice([120.0, 1e9])),
        attended_refresh_ms=float(rng.choice([0.0, 60.0, 120.0])),
    )
    gate = view_gate(config, height_px, width_px)
    image = scene(rng, height_px, width_px)
    for at in range(num_frames):
        if rng.random() < 0.7:
            top, left = rng.integers(height_px), rng.integers(width_px)
            size = rng.integers(1, 20, 2)
            image = image.copy()
            image[top : top + size[0], left : left + size[1]] += np.uint8(rng.integers(256))
        attended = rng.random(gate.grid) < 0.1 if rng.random() < 0.5 else None
        frame = noisy(rng, image)
        decision = gate.decide(frame, now_s=at * PERIOD_S, attended=attended)
        assert cell_rms(frame, decision.image, 4) <= config.change_rms * (1 + 1e-4)
        assert not decision.image.flags.writeable
        if decision.action is Perceive.SKIP:
            assert decision.image is decision.base
            assert not decision.tokens.any()
        elif decision.action is Perceive.FULL:
            assert np.array_equal(decision.image, frame)
            assert decision.tokens.all()
        else:
            assert decision.base is not None
            differs = (decision.image != decision.base).any(axis=2)
            for row, column in np.argwhere(~decision.tokens):
                top, left = row * PATCH_PX, column * PATCH_PX
                seen = differs[
                    max(0, top - PATCH_PX + 1) : top + PATCH_PX,
                    max(0, left - PATCH_PX + 1) : left + PATCH_PX,
                ]
                assert not seen.any(), f"token {row, column} is kept but sees new pixels"


def test_grid_rules() -> None:
    assert np.array_equal(reading_tokens(grid((1, 1))), grid((1, 1), (1, 2), (2, 1), (2, 2)))
    assert np.array_equal(reading_tokens(grid((4, 4))), grid((4, 4)))
    assert np.array_equal(seen_patches(grid((1, 1))), grid((0, 0), (0, 1), (1, 0), (1, 1)))
    assert np.array_equal(only_read_by(reading_tokens(grid((1, 1)))), grid((1, 1)))
    assert only_read_by(np.ones((5, 5), np.bool_)).all()
    assert crop_share(grid()) == 0.0
    assert crop_share(grid((0, 0))) == pytest.approx(1 / 25)
    assert crop_share(grid((2, 2))) == pytest.approx(4 / 25)
    assert crop_share(grid((0, 0), (4, 4))) == 1.0


def test_gate_decides_view_by_view_and_forgets_on_reset() -> None:
    rng = np.random.default_rng(3)
    images = {"fixed": scene(rng), "wrist": scene(rng, 48, 64), "depth": scene(rng, 10, 10)}
    wrist = ViewSpec(key="wrist", height=48, width=64, patch_px=PATCH_PX)
    gate = Gate(NEVER, (FIXED, wrist, ViewSpec(key="depth", height=10, width=10)))

    def observe(seq: int, images: dict[str, UInt8Array]) -> Observation:
        return Observation(
            session_id=SessionId("s"),
            robot_id=RobotId("r"),
            seq=seq,
            images=images,
            state=np.full(4, seq, np.float32),
            prompt="open the drawer",
        )

    first, decisions = gate.admit(observe(0, images), now_s=0.0)
    assert {key: d.action for key, d in decisions.items()} == {
        "fixed": Perceive.FULL,
        "wrist": Perceive.FULL,
    }
    assert first.images["depth"] is images["depth"], "a view without patches passes as it is"
    assert first.renewal is None
    moved = images | {"wrist": 255 - images["wrist"]}
    second, decisions = gate.admit(observe(1, moved), now_s=0.1)
    assert decisions["fixed"].action is Perceive.SKIP
    assert decisions["wrist"].action is Perceive.FULL
    assert second.images["fixed"] is first.images["fixed"]
    assert np.array_equal(second.images["wrist"], moved["wrist"])
    assert (second.seq, second.state[0]) == (1, 1.0)
    touched = {key: image.copy() for key, image in moved.items()}
    touched["fixed"][:8, :8] = 0
    third, decisions = gate.admit(observe(2, touched), now_s=0.2)
    assert third.renewal is not None
    assert third.renewal.images.keys() == third.renewal.tokens.keys() == {"fixed"}
    assert third.renewal.images["fixed"] is second.images["fixed"]
    assert np.array_equal(third.renewal.tokens["fixed"], reading_tokens(grid((0, 0))))
    gate.reset()
    _, decisions = gate.admit(observe(3, touched), now_s=0.3)
    assert {d.reason for d in decisions.values()} == {Reason.NOTHING_OLD}


def test_a_still_observation_repeats_the_last_one() -> None:
    rng = np.random.default_rng(4)
    image, state = scene(rng), np.array([0.1, 0.2], np.float32)

    def observe(seq: int, moved: float, prompt: str = "open the drawer") -> Observation:
        return Observation(
            session_id=SessionId("s"),
            robot_id=RobotId("r"),
            seq=seq,
            images={"fixed": noisy(rng, image)},
            state=state + np.float32(moved),
            prompt=prompt,
        )

    gate = Gate(replace(NEVER, state_change=0.01), (FIXED,))
    first, _ = gate.admit(observe(0, 0.0), now_s=0.0)
    assert first.renewal is None
    for seq, moved in ((1, 0.008), (2, -0.008)):
        again, _ = gate.admit(observe(seq, moved), now_s=seq * 0.1)
        assert again.renewal is not None
        assert again.renewal.is_repeat
        assert np.array_equal(again.state, state), "the state that was perceived"
        assert again.images["fixed"] is first.images["fixed"]
    moved, _ = gate.admit(observe(3, 0.02), now_s=0.3)
    assert moved.renewal is None
    assert np.array_equal(moved.state, state + np.float32(0.02))
    told, _ = gate.admit(observe(4, 0.02, "close the drawer"), now_s=0.4)
    assert told.renewal is None
    image[:16, :16] ^= 64
    seen, _ = gate.admit(observe(5, 0.02, "close the drawer"), now_s=0.5)
    assert seen.renewal is not None
    assert not seen.renewal.is_repeat
    exact = Gate(NEVER, (FIXED,))
    for seq, moved_by in ((0, 0.0), (1, 1e-6), (2, 1e-6)):
        seen, _ = exact.admit(observe(seq, moved_by), now_s=0.0)
        is_repeat = seen.renewal is not None and seen.renewal.is_repeat
        assert is_repeat == (seq == 2), "by default a state must be the same"


def test_gate_asks_what_is_attended_to_when_that_may_have_changed() -> None:
    gate = Gate(GateConfig(refresh_ms=1000.0, attended_refresh_ms=1000.0), (FIXED,))
    image = np.full((80, 80, 3), 100, np.uint8)
    gate.instruct("open the drawer")
    gate.decide("fixed", image, now_s=0.0)
    assert not gate.is_heed_due(0.0), "a view perceived whole has no use for it"
    gate.decide("fixed", image, now_s=0.1)
    assert gate.is_heed_due(0.1)
    gate.heed({"fixed": grid((2, 2))}, now_s=0.1)
    for now_s in (0.5, 1.0, 1.5, 3.0):
        gate.decide("fixed", image, now_s=now_s)
        assert not gate.is_heed_due(now_s), "nothing has changed"
    moved = image.copy()
    moved[:8, :8] = 0
    assert gate.decide("fixed", moved, now_s=3.1).action is Perceive.PATCHES
    assert gate.is_heed_due(3.1)
    gate.heed({"fixed": grid((2, 2))}, now_s=3.1)
    moved[:8, :8] = 200
    gate.decide("fixed", moved, now_s=3.2)
    assert not gate.is_heed_due(3.2), "once in refresh_ms"
    gate.instruct("close the drawer")
    assert gate.is_heed_due(3.2), "another instruction attends to other things"


def test_gate_hands_the_attended_tokens_to_their_view() -> None:
    image = np.full((80, 80, 3), 100, np.uint8)
    gate = Gate(GateConfig(attended_refresh_ms=0.0), (FIXED, replace(FIXED, key="wrist")))
    for key in ("fixed", "wrist"):
        gate.decide(key, image, now_s=0.0)
    gate.heed({"wrist": grid((2, 2))}, now_s=0.0)
    assert gate.decide("fixed", image, now_s=0.1).action is Perceive.SKIP
    assert gate.decide("wrist", image, now_s=0.1).reason is Reason.ATTENDED_DUE
    gate.instruct("close the drawer")
    assert gate.decide("wrist", image, now_s=0.2).action is Perceive.SKIP


def test_the_robots_own_array_may_be_written_again() -> None:
    gate, image = view_gate(), np.full((80, 80, 3), 100, np.uint8)
    gate.decide(image, now_s=0.0)
    image[:] = 0
    assert gate.decide(image, now_s=1.0).reason is Reason.CHANGED_ALL_OVER


def test_bad_input_is_named() -> None:
    gate = view_gate()
    with pytest.raises(FieldError, match=r"image: expected uint8 \(80, 80, 3\)"):
        gate.decide(np.zeros((64, 80, 3), np.uint8), now_s=0.0)
    with pytest.raises(FieldError, match="attended"):
        gate.decide(np.zeros((80, 80, 3), np.uint8), now_s=0.0, attended=np.zeros(25, np.bool_))
    with pytest.raises(FieldError, match="patch_px"):
        ViewGate(NEVER, height_px=80, width_px=80, patch_px=14)
    for wrong in (
        {"noise_std": 0.0},
        {"noise_std": float("nan")},
        {"motion_rms": -1.0},
        {"refresh_ms": 0.0},
        {"attended_refresh_ms": 2000.0},
        {"full_share": 0.5, "calm_share": 0.6},
    ):
        with pytest.raises(ConfigError, match="gate"):
            GateConfig(**wrong)
