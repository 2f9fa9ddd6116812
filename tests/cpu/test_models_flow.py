"""FlowPolicy's stages: what depends on what, rows that do not see each other, committed actions that stay."""

import pytest
import torch
from torch import Tensor

from ganglion.models.policies.flow import FlowPolicy
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.tiny import TINY_FLOW, TINY_PROMPTS, tiny_flow

ROWS = 3


@pytest.fixture
def tiny() -> FlowCheckpoint:
    return tiny_flow(seed=1)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, state and noise of ROWS robots."""
    generator = torch.Generator().manual_seed(seed)
    size = (ROWS, 2, TINY_FLOW.view_height_px, TINY_FLOW.view_width_px, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    state = torch.randn(ROWS, TINY_FLOW.state_dim, generator=generator)
    noise = torch.randn(ROWS, TINY_FLOW.horizon, TINY_FLOW.action_dim, generator=generator)
    return images, state, noise


def context_of(policy: FlowPolicy, images: Tensor, state: Tensor, tokens: Tensor) -> Tensor:
    text_kv = policy.prefill_text(tokens)
    observation_kv = policy.prefill_observation(policy.encode_views(images), state, text_kv)
    return torch.cat([text_kv, observation_kv], dim=3)


def run(tiny: FlowCheckpoint, rows: slice = slice(None), num_steps: int = 5) -> Tensor:
    images, state, noise = (value[rows] for value in inputs())
    tokens = tiny.processor.tokens(TINY_PROMPTS)[rows]
    context = context_of(tiny.policy, images, state, tokens)
    tau = torch.zeros(len(noise), TINY_FLOW.horizon)
    dtau = torch.full((len(noise),), 1 / num_steps)
    return tiny.policy.denoise(noise, tau, dtau, context, num_steps)


def test_stages_have_the_shapes_that_the_config_promises(tiny: FlowCheckpoint) -> None:
    images, state, _ = inputs()
    policy, heads = tiny.policy, (TINY_FLOW.num_heads, TINY_FLOW.head_dim)
    features = policy.encode_views(images)
    assert features.shape == (ROWS, 2 * 4, 32)
    text_kv = policy.prefill_text(tiny.processor.tokens(TINY_PROMPTS))
    assert text_kv.shape == (ROWS, 3, 2, 16, *heads)
    observation_kv = policy.prefill_observation(features, state, text_kv)
    assert observation_kv.shape == (ROWS, 3, 2, TINY_FLOW.num_observation_tokens, *heads)
    assert TINY_FLOW.num_context_tokens == 16 + 2 * 4 + 1


def test_the_shipped_sizes_fit_the_page_budget() -> None:
    config = tiny_flow().policy.config
    assert config.num_context_tokens <= 80


def test_a_view_encoded_alone_equals_its_part_of_all_views(tiny: FlowCheckpoint) -> None:
    images, _, _ = inputs()
    together = tiny.policy.encode_views(images)
    alone = [tiny.policy.encode_view(index, images[:, index]) for index in range(2)]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("row", range(ROWS))
def test_a_row_does_not_depend_on_its_batch(tiny: FlowCheckpoint, row: int) -> None:
    together, alone = run(tiny), run(tiny, slice(row, row + 1))
    assert (together[row] - alone[0]).abs().max() < 1e-5


def test_every_input_matters(tiny: FlowCheckpoint) -> None:
    images, state, noise = inputs()
    tokens = tiny.processor.tokens(TINY_PROMPTS)
    tau, dtau = torch.zeros(ROWS, TINY_FLOW.horizon), torch.full((ROWS,), 0.2)

    def actions(images: Tensor, state: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
        context = context_of(tiny.policy, images, state, tokens)
        return tiny.policy.denoise(noise, tau, dtau, context, 5)

    base = actions(images, state, tokens, noise)
    for view in range(2):
        other = images.clone()
        other[:, view] = 255 - other[:, view]
        assert (actions(other, state, tokens, noise) - base).abs().max() > 1e-4
    assert (actions(images, state + 1, tokens, noise) - base).abs().max() > 1e-4
    assert (actions(images, state, tokens.flip(0), noise) - base)[0].abs().max() > 1e-4
    assert (actions(images, state, tokens, -noise) - base).abs().max() > 1e-4


def test_denoise_is_euler_on_velocity(tiny: FlowCheckpoint) -> None:
    images, state, noise = inputs()
    context = context_of(tiny.policy, images, state, tiny.processor.tokens(TINY_PROMPTS))
    tau = torch.zeros(ROWS, TINY_FLOW.horizon)
    x = noise
    with torch.enable_grad():  # the training form of attention
        for step in range(4):
            x = x + 0.25 * tiny.policy.velocity(x, tau + step * 0.25, context)
    fast = tiny.policy.denoise(noise, tau, torch.full((ROWS,), 0.25), context, 4)
    assert (fast - x).abs().max() < 1e-5


def test_steps_may_be_cut_anywhere_and_rows_may_stand_at_different_times(
    tiny: FlowCheckpoint,
) -> None:
    whole = run(tiny)
    images, state, noise = inputs()
    context = context_of(tiny.policy, images, state, tiny.processor.tokens(TINY_PROMPTS))
    # row 0 has done two steps, row 1 one, row 2 none: one batch takes all of them two further
    steps_done = (2, 1, 0)
    x = noise.clone()
    tau = torch.zeros(ROWS, TINY_FLOW.horizon)
    for row, num_steps in enumerate(steps_done):
        if num_steps:
            one = slice(row, row + 1)
            x[one] = tiny.policy.denoise(
                x[one], tau[one], torch.tensor([0.2]), context[one], num_steps
            )
            tau[one] = 0.2 * num_steps
    x = tiny.policy.denoise(x, tau, torch.full((ROWS,), 0.2), context, 2).clone()
    tau = tau + 0.4
    for row, num_steps in enumerate(steps_done):
        one, num_left = slice(row, row + 1), 5 - 2 - num_steps
        if num_left:
            x[one] = tiny.policy.denoise(
                x[one], tau[one], torch.tensor([0.2]), context[one], num_left
            )
    assert (x - whole).abs().max() < 1e-5


def test_committed_actions_stay_and_steer_the_rest(tiny: FlowCheckpoint) -> None:
    images, state, noise = inputs()
    context = context_of(tiny.policy, images, state, tiny.processor.tokens(TINY_PROMPTS))
    dtau = torch.full((ROWS,), 0.2)
    tau = torch.zeros(ROWS, TINY_FLOW.horizon)
    tau[:, :3] = 1.0
    results = []
    for value in (0.5, -0.5):
        x = noise.clone()
        x[:, :3] = value
        out = tiny.policy.denoise(x, tau, dtau, context, 5)
        assert torch.equal(out[:, :3], x[:, :3])
        results.append(out[:, 3:])
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_bfloat16_stays_near_float32() -> None:
    exact = run(tiny_flow(seed=1))
    fast = run_bfloat16()
    assert fast.dtype == torch.float32
    assert (exact - fast).abs().max() < 0.1
    assert (exact - fast).abs().mean() < 0.02


def run_bfloat16() -> Tensor:
    tiny = tiny_flow(seed=1, dtype=torch.bfloat16)
    images, state, noise = inputs()
    context = context_of(tiny.policy, images, state.bfloat16(), tiny.processor.tokens(TINY_PROMPTS))
    assert context.dtype == torch.bfloat16
    tau = torch.zeros(ROWS, TINY_FLOW.horizon)
    return tiny.policy.denoise(noise, tau, torch.full((ROWS,), 0.2), context, 5)


def test_seeds_repeat_and_differ() -> None:
    assert torch.equal(run(tiny_flow(seed=4)), run(tiny_flow(seed=4)))
    assert not torch.equal(run(tiny_flow(seed=4)), run(tiny_flow(seed=5)))
