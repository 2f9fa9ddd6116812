"""Packing: the served network is the loaded one, its weights laid out for this CPU."""

import pytest
import torch
from torch import Tensor, nn

from ganglion.kernels.cpu import PackedHalve, PackedLinear, why_not_packed
from ganglion.models.packing import pack
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.tiny import TINY_FLOW, TINY_PROMPTS, tiny_flow

needs_bfloat16 = pytest.mark.skipif(
    bool(why_not_packed(torch.bfloat16)), reason="this CPU lays out no bfloat16 weights"
)


def actions(checkpoint: FlowCheckpoint) -> Tensor:
    """Three robots' chunks before normalisation is undone."""
    generator = torch.Generator().manual_seed(0)
    rows, config, policy = 3, TINY_FLOW, checkpoint.policy
    size = (rows, 2, config.view_height_px, config.view_width_px, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    state = torch.randn(rows, config.state_dim, generator=generator)
    noise = torch.randn(rows, config.horizon, config.action_dim, generator=generator)
    with torch.inference_mode():
        text = policy.prefill_text(checkpoint.processor.tokens(TINY_PROMPTS))
        seen = policy.prefill_observation(policy.encode_views(images), state, text)
        tau = torch.zeros(rows, config.horizon)
        context = torch.cat([text, seen], dim=3)
        return policy.denoise(noise, tau, torch.full((rows,), 0.2), context, 5)


@needs_bfloat16
def test_packed_is_as_near_to_float32_as_unpacked() -> None:
    torch.set_num_threads(1)
    exact = actions(tiny_flow())
    plain, packed = tiny_flow(dtype=torch.bfloat16), tiny_flow(dtype=torch.bfloat16)
    assert pack(packed.policy) > 0
    plain_error = (actions(plain) - exact).abs().mean().item()
    packed_error = (actions(packed) - exact).abs().mean().item()
    assert packed_error < 1.5 * plain_error, f"packed {packed_error}, plain {plain_error}"


@needs_bfloat16
def test_every_wide_layer_is_packed_and_narrow_ones_stay() -> None:
    policy = tiny_flow(dtype=torch.bfloat16).policy
    wide = [
        layer
        for layer in policy.modules()
        if isinstance(layer, nn.Linear) and min(layer.weight.shape) >= 16
    ]
    num_convs = sum(isinstance(layer, nn.Conv2d) for layer in policy.modules())
    assert pack(policy) == len(wide) + num_convs
    left = [layer for layer in policy.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert {min(layer.weight.shape) for layer in left} == {4}
    assert sum(isinstance(layer, PackedLinear) for layer in policy.modules()) == len(wide)
    assert sum(isinstance(layer, PackedHalve) for layer in policy.modules()) == num_convs
    assert pack(policy) == 0, "packed layers stay as they are"
    assert policy.dtype == torch.bfloat16


def test_float32_stays_as_it_is() -> None:
    policy = tiny_flow().policy
    before = list(policy.modules())
    assert pack(policy) == 0
    assert all(old is new for old, new in zip(before, policy.modules(), strict=True))


@needs_bfloat16
def test_other_convolutions_stay_as_they_are() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 5, stride=2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
    ).bfloat16()
    assert pack(network) == 0


@needs_bfloat16
def test_linear_layers_are_packed_with_and_without_bias() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 32)).bfloat16()
    x = torch.randn(5, 32).bfloat16()
    with torch.inference_mode():
        plain = network(x)
        assert pack(network) == 2
        torch.testing.assert_close(network(x), plain, atol=2e-2, rtol=2e-2)
