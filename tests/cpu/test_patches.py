"""Perception in parts: equal to the whole where it must be, near it where it may differ."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ganglion.models.packing import pack
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint, load_flow_checkpoint
from ganglion.models.policies.patches import (
    Box,
    attended,
    box_around,
    encode_patches,
    refill_observation,
    view_attention,
)
from ganglion.models.registry import DTYPES, policy_folder
from ganglion.models.tiny import TINY_FLOW, TINY_PROMPTS, tiny_flow
from ganglion.pipeline.gate import GateConfig, Perceive, ViewGate
from ganglion.pipeline.patch_grid import BoolArray, reading_tokens

PATCH_PX = 16
ROUNDING = {"float32": 5e-5, "bfloat16": 0.0}  # of features whose standard deviation is about 1


def shipped(dtype: str) -> FlowCheckpoint:
    checkpoint = load_flow_checkpoint(policy_folder("metaworld-ten"), dtype=DTYPES[dtype])
    pack(checkpoint.policy)
    return checkpoint


def random_images(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size_px", [(80, 80), (72, 88), (77, 93)])
@torch.inference_mode()
def test_patches_equal_the_whole_image(dtype: str, size_px: tuple[int, int]) -> None:
    """Wherever the change is: inside, at any border, of several rows at once; packed weights as served."""
    rng = np.random.default_rng(0)
    config = replace(
        shipped(dtype).policy.config, view_height_px=size_px[0], view_width_px=size_px[1]
    )
    policy = tiny_flow(seed=6, config=config, dtype=DTYPES[dtype]).policy
    pack(policy)
    grid = tuple(-(-side // PATCH_PX) for side in size_px)
    for _ in range(12):
        before = random_images(rng, 3, *size_px)
        after, patches = before.clone(), np.zeros((3, *grid), np.bool_)
        for row in range(3):
            for _ in range(rng.integers(0, 3)):
                top, left = rng.integers(size_px[0]), rng.integers(size_px[1])
                height, width = rng.integers(1, 24, 2)
                area = after[row, top : top + height, left : left + width]
                area.copy_(random_images(rng, *area.shape[:2]))
                below, beyond = (
                    (top + area.shape[0] - 1) // PATCH_PX + 1,
                    (left + area.shape[1] - 1) // PATCH_PX + 1,
                )
                patches[row, top // PATCH_PX : below, left // PATCH_PX : beyond] = True
        tokens = np.stack([reading_tokens(changed) for changed in patches])
        old = policy.encode_view(1, before)
        kept = old.clone()
        got, whole = encode_patches(policy, 1, after, old, tokens), policy.encode_view(1, after)
        assert (got - whole).abs().max() <= ROUNDING[dtype]
        assert torch.equal(old, kept), "the old page is read only"
        is_kept = ~tokens.reshape(3, -1)
        if not patches.any():
            assert torch.equal(got, old)
        assert (got[is_kept] - old[is_kept]).abs().max() <= ROUNDING[dtype]


@torch.inference_mode()
def test_a_view_through_the_gate_holds_the_features_of_its_reference() -> None:
    """The exactness bound: after any frames, pages = encode(reference), and the reference is near the camera."""
    rng = np.random.default_rng(1)
    policy = shipped("bfloat16").policy
    config = GateConfig(refresh_ms=1e9)
    gate = ViewGate(config, height_px=80, width_px=80, patch_px=PATCH_PX)
    features = torch.empty(0)
    scene = rng.normal(120.0, 40.0, (80, 80, 3))
    actions = []
    for at in range(40):
        if at % 3 == 0:
            top, left = rng.integers(0, 70, 2)
            scene[top : top + 8, left : left + 8] = rng.normal(120.0, 40.0, 3)
        frame = np.clip(np.rint(scene + rng.normal(0.0, 2.0, scene.shape)), 0, 255).astype(np.uint8)
        decision = gate.decide(frame, now_s=at * 0.05)
        actions.append(decision.action)
        reference = torch.from_numpy(decision.image.copy())[None]
        if decision.action is Perceive.FULL:
            features = policy.encode_view(0, reference)
        elif decision.action is Perceive.PATCHES:
            features = encode_patches(policy, 0, reference, features, decision.tokens[None])
        assert torch.equal(features, policy.encode_view(0, reference))
    assert set(actions) == set(Perceive)


@torch.inference_mode()
def test_kept_features_drift_no_more_than_the_changes_that_the_gate_lets_pass() -> None:
    """In features: a shift of everything, the worst case below the threshold, costs three times what noise costs."""
    rng = np.random.default_rng(2)
    policy = shipped("float32").policy
    config = GateConfig(refresh_ms=1e9)
    gate = ViewGate(config, height_px=80, width_px=80, patch_px=PATCH_PX)
    scene = np.repeat(np.repeat(rng.normal(120.0, 40.0, (10, 10, 3)), 8, axis=0), 8, axis=1)

    def photo(level: float) -> np.ndarray:
        shifted = scene + level + rng.normal(0.0, 2.0, scene.shape)
        return np.clip(np.rint(shifted), 0, 255).astype(np.uint8)

    def drift(one: np.ndarray, other: np.ndarray) -> float:
        both = policy.encode_view(0, torch.from_numpy(np.stack([one, other])))
        return float((both[0] - both[1]).pow(2).mean().sqrt())

    first = photo(0.0)
    gate.decide(first, now_s=0.0)
    by_noise = drift(first, photo(0.0))
    worst = 0.0
    for level in np.linspace(0.0, 8.0, 33):
        frame = photo(float(level))
        decision = gate.decide(frame, now_s=1.0)
        worst = max(worst, drift(decision.image, frame))
    scale = float(policy.encode_view(0, torch.from_numpy(first)[None]).std())
    assert 0.0 < worst <= 3.0 * by_noise
    assert worst <= 0.1 * scale


def test_boxes() -> None:
    def tokens(*places: tuple[int, int]) -> BoolArray:
        marked = np.zeros((5, 5), np.bool_)
        for place in places:
            marked[place] = True
        return marked

    assert box_around(tokens()) is None
    assert box_around(tokens((0, 3), (2, 1))) == Box(0, 3, 1, 4)
    assert Box(0, 3, 1, 4).margins == (0, 1)
    assert box_around(tokens((4, 4))) == Box(4, 5, 4, 5)


def context_of(tiny: FlowCheckpoint, images: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """Features, text KV and observation KV."""
    features = tiny.policy.encode_views(images)
    text_kv = tiny.policy.prefill_text(tiny.processor.tokens(TINY_PROMPTS[:2]))
    return features, text_kv, tiny.policy.prefill_observation(features, state, text_kv)


@torch.inference_mode()
def test_refill_of_all_tokens_is_the_prefill_and_of_none_changes_the_state_alone() -> None:
    rng = np.random.default_rng(3)
    tiny = tiny_flow(seed=3)
    images, others = (random_images(rng, 2, 2, 32, 32) for _ in range(2))
    state, other_state = torch.zeros(2, 4), torch.ones(2, 4)
    _, text_kv, old_kv = context_of(tiny, others, other_state)
    features, _, new_kv = context_of(tiny, images, state)
    num_tokens = features.shape[1]
    kept = old_kv.clone()

    def refilled(tokens: BoolArray) -> Tensor:
        return refill_observation(tiny.policy, features, state, text_kv, old_kv, tokens)

    assert (refilled(np.ones((2, num_tokens), np.bool_)) - new_kv).abs().max() < 1e-5
    only_state = refilled(np.zeros((2, num_tokens), np.bool_))
    assert torch.equal(only_state[..., :-1, :, :], old_kv[..., :-1, :, :])
    first_layer = only_state[:, 0, :, -1]
    assert (first_layer - new_kv[:, 0, :, -1]).abs().max() < 1e-5, "it reads nothing but the state"
    ragged = np.zeros((2, num_tokens), np.bool_)
    ragged[0, :3] = True
    mixed = refilled(ragged)
    assert (mixed[1] - only_state[1]).abs().max() < 1e-5, "a row does not depend on its batch"
    assert torch.equal(mixed[0, ..., 3:-1, :, :], old_kv[0, ..., 3:-1, :, :])
    assert (mixed[0, 0, :, :3] - new_kv[0, 0, :, :3]).abs().max() < 1e-5
    assert torch.equal(old_kv, kept), "the old pages are read only"


@torch.inference_mode()
def test_refill_of_an_unchanged_observation_changes_nothing() -> None:
    tiny = tiny_flow(seed=4)
    images = random_images(np.random.default_rng(4), 2, 2, 32, 32)
    state = torch.full((2, 4), 0.3)
    features, text_kv, kv = context_of(tiny, images, state)
    tokens = np.zeros((2, features.shape[1]), np.bool_)
    tokens[:, ::2] = True
    again = refill_observation(tiny.policy, features, state, text_kv, kv, tokens)
    assert (again - kv).abs().max() < 1e-5


@torch.inference_mode()
def test_attention_shares_are_what_the_experts_softmax_says() -> None:
    """Keys of one token made huge in the direction of every query draw all attention to it."""
    tiny = tiny_flow(seed=5)
    images = random_images(np.random.default_rng(5), 2, 2, 32, 32)
    state = torch.zeros(2, 4)
    _, text_kv, observation_kv = context_of(tiny, images, state)
    context = torch.cat([text_kv, observation_kv], dim=3)
    x = torch.randn(2, TINY_FLOW.horizon, 4, generator=torch.Generator().manual_seed(0))
    tau = torch.full((2, TINY_FLOW.horizon), 0.8)
    shares = view_attention(tiny.policy, x, tau, context)
    assert shares.shape == (2, 2, TINY_FLOW.num_view_tokens)
    assert torch.allclose(shares.sum(dim=-1), torch.ones(2, 2))
    assert (shares > 0).all()
    same = context.clone()
    views = slice(TINY_FLOW.num_text_tokens, TINY_FLOW.num_context_tokens - 1)
    same[:, :, 0, views] = 0.0
    even = view_attention(tiny.policy, x, tau, same)
    assert torch.allclose(even, torch.full_like(even, 1 / TINY_FLOW.num_view_tokens), atol=1e-6)
    assert not attended(even).any()
    marked = even.clone()
    marked[1, 0, 2] = 0.6
    assert np.argwhere(attended(marked)).tolist() == [[1, 0, 2]]


@torch.inference_mode()
def test_another_instruction_attends_elsewhere() -> None:
    checkpoint = shipped("bfloat16")
    policy, processor = checkpoint.policy, checkpoint.processor
    images = random_images(np.random.default_rng(6), 1, 2, 80, 80)
    shares = []
    for prompt in ("open the drawer", "press the button from above"):
        text_kv = policy.prefill_text(processor.tokens([prompt]))
        state = torch.zeros(1, 4, dtype=policy.dtype)
        observation_kv = policy.prefill_observation(policy.encode_views(images), state, text_kv)
        context = torch.cat([text_kv, observation_kv], dim=3)
        x, tau = torch.zeros(1, policy.config.horizon, 4), torch.full((1, 48), 0.8)
        shares.append(view_attention(policy, x, tau, context))
    assert (shares[0] - shares[1]).abs().max() > 0.01
