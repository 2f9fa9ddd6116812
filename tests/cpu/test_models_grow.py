"""A grown policy computes what the small one does, with about ten times the work, through pages and engine as well."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ganglion.config import EngineConfig, MemoryConfig
from ganglion.errors import CheckpointError, FieldError
from ganglion.kernels.cpu import why_not_packed
from ganglion.models.packing import pack
from ganglion.models.policies.flow import FlowConfig, FlowPolicy
from ganglion.models.policies.flow_checkpoint import load_flow_checkpoint, save_flow_checkpoint
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.policies.grow import TYPE, Growth, grow, load_checkpoint, load_grown_checkpoint
from ganglion.models.registry import load_policy, policy_folder
from ganglion.models.tiny import tiny_flow
from ganglion.pipeline.local import LocalService
from ganglion.service import Outcome
from ganglion.types import ActionChunk, Observation, RobotId, SessionId

SMALL, LARGE = policy_folder("metaworld-ten"), policy_folder("metaworld-ten-large")
GROWTH = Growth(
    num_layers=5, num_heads=3, trunk_mlp_width=96, expert_mlp_width=80, stem_factor=2, seed=3
)


def glance(config: FlowConfig, rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, token ids, state and noise."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, config.num_views, config.view_height_px, config.view_width_px, 3)
    return (
        torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        torch.randint(0, config.vocab_size, (rows, config.num_text_tokens), generator=generator),
        torch.randn(rows, config.state_dim, generator=generator),
        torch.randn(rows, config.horizon, config.action_dim, generator=generator),
    )


def actions(policy: FlowPolicy) -> Tensor:
    config = policy.config
    images, ids, state, noise = glance(config)
    with torch.inference_mode():
        text = policy.prefill_text(ids)
        features = policy.encode_views(images)
        seen = policy.prefill_observation(features, state.to(policy.dtype), text)
        tau = torch.zeros(noise.shape[:2])
        context = torch.cat([text, seen], dim=3)
        return policy.denoise(noise, tau, torch.full((len(noise),), 0.2), context, 5)


def num_flops(policy: FlowPolicy) -> int:
    """Of one chunk: views, observation, every flow step; the instruction is shared and not counted."""
    images, ids, state, noise = glance(policy.config, rows=1)
    text = policy.prefill_text(ids)
    # with gradients on, attention is products that the counter knows
    with torch.enable_grad(), FlopCounterMode(display=False) as perceive:
        seen = policy.prefill_observation(policy.encode_views(images), state, text)
    with torch.enable_grad(), FlopCounterMode(display=False) as step:
        policy.velocity(noise, torch.zeros(noise.shape[:2]), torch.cat([text, seen], dim=3))
    num_steps = policy.config.num_flow_steps
    return int(perceive.get_total_flops() + num_steps * step.get_total_flops())


def test_the_large_policy_is_the_small_one_with_ten_times_the_work() -> None:
    torch.set_num_threads(1)
    small = load_flow_checkpoint(SMALL, dtype=torch.float32)
    large = load_grown_checkpoint(LARGE, dtype=torch.float32)
    exact = actions(small.policy)
    torch.testing.assert_close(actions(large.policy), exact, rtol=0, atol=1e-4)
    ratio = num_flops(large.policy) / num_flops(small.policy)
    assert 8 <= ratio <= 12, ratio
    assert large.spec.name == "metaworld-ten-large"
    assert large.spec.version != small.spec.version
    assert replace(large.spec, name=small.spec.name, version=small.spec.version) == small.spec


@pytest.mark.skipif(bool(why_not_packed(torch.bfloat16)), reason="this CPU packs no bfloat16")
def test_packed_bfloat16_is_as_near_to_float32_as_the_small_one() -> None:
    torch.set_num_threads(1)
    exact = actions(load_flow_checkpoint(SMALL, dtype=torch.float32).policy)
    small, large = load_flow_checkpoint(SMALL).policy, load_grown_checkpoint(LARGE).policy
    assert pack(large) > pack(small) > 0
    small_error = (actions(small) - exact).abs().mean().item()
    large_error = (actions(large) - exact).abs().mean().item()
    assert large_error < 1.5 * small_error, f"large {large_error}, small {small_error}"


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(0, 4),
    heads=st.integers(0, 3),
    trunk=st.integers(0, 40),
    expert=st.integers(0, 40),
    factor=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_any_growth_keeps_the_function(
    layers: int, heads: int, trunk: int, expert: int, factor: int, seed: int
) -> None:
    small = tiny_flow(seed=1).policy
    config = small.config
    growth = Growth(
        num_layers=config.num_layers + layers,
        num_heads=config.num_heads + heads,
        trunk_mlp_width=config.trunk_mlp_width + trunk,
        expert_mlp_width=config.expert_mlp_width + expert,
        stem_factor=factor,
        seed=seed,
    )
    torch.testing.assert_close(actions(grow(small, growth)), actions(small), rtol=0, atol=1e-4)


def test_what_is_added_reads_at_random_and_the_same_everywhere() -> None:
    small = tiny_flow(seed=1).policy
    before = torch.random.get_rng_state()
    first, second = grow(small, GROWTH), grow(small, GROWTH)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = grow(small, replace(GROWTH, seed=4))
    num_different = 0
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
        num_different += not torch.equal(other.state_dict()[name], value)
    assert num_different > 10
    for name, layer in first.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith(("attention_out", "mlp_out")):
            assert (layer.weight != 0).float().mean() > 0.99, f"{name} would be idle"


@pytest.mark.parametrize(
    "change", [{"num_layers": 1}, {"num_heads": 0}, {"trunk_mlp_width": 1}, {"stem_factor": 0}]
)
def test_no_part_shrinks(change: dict[str, int]) -> None:
    (name,) = change
    with pytest.raises(FieldError, match=rf"growth\.{name}: expected at least"):
        grow(tiny_flow().policy, replace(GROWTH, **change))


def grown_folder(tmp_path: Path) -> Path:
    tiny = tiny_flow(seed=2)
    bounds = {"action_low": tiny.spec.action_low, "action_high": tiny.spec.action_high}
    save_flow_checkpoint(tmp_path / "tiny", tiny.policy, tiny.processor, control_hz=80.0, **bounds)
    folder = tmp_path / "tiny-large"
    folder.mkdir()
    content = {"type": TYPE, "base": "../tiny", "growth": asdict(GROWTH)}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_a_version_follows_base_and_growth(tmp_path: Path) -> None:
    folder = grown_folder(tmp_path)
    versions = {
        load_grown_checkpoint(folder).spec.version,
        load_grown_checkpoint(folder).spec.version,
    }
    assert len(versions) == 1
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 5'))
    versions.add(load_grown_checkpoint(folder).spec.version)
    base = tmp_path / "tiny" / "config.json"
    base.write_text(base.read_text() + "\n")
    versions.add(load_grown_checkpoint(folder).spec.version)
    assert len(versions) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(base="../none"), "base: expected a checkpoint folder"),
        (lambda content: content.update(base=3), "base: expected a checkpoint folder"),
        (lambda content: content.pop("growth"), "growth: expected sizes by name"),
        (lambda content: content["growth"].pop("seed"), r"growth\.seed: expected exactly the keys"),
        (lambda content: content["growth"].update(width=3), r"growth\.width: expected exactly"),
        (lambda content: content["growth"].update(seed=-1), r"growth\.seed: expected a whole"),
        (lambda content: content["growth"].update(num_heads=1), r"growth\.num_heads: expected at"),
        (lambda content: content.update(type="ganglion_flow"), "type: expected"),
    ],
)
def test_a_broken_config_is_named(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    folder = grown_folder(tmp_path)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_grown_checkpoint(folder)
    for text, problem in (("{", "not a readable config"), ("[]", "expected an object, got list")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            load_checkpoint(folder)


def test_one_call_loads_both_kinds(tmp_path: Path) -> None:
    folder = grown_folder(tmp_path)
    assert load_checkpoint(folder).policy.config.num_layers == GROWTH.num_layers
    small = load_checkpoint(tmp_path / "tiny")
    assert small.policy.config == tiny_flow(seed=2).policy.config


def test_it_is_served_from_pages_of_its_own_size() -> None:
    torch.set_num_threads(1)
    model = load_policy(LARGE)
    assert isinstance(model, FlowModel)
    kv = {layout.name: layout for layout in model.layouts}["kv"]
    assert kv.shape == (4, 12, 2, 8, 64)
    spec, rng = model.spec, np.random.default_rng(5)
    outcomes: dict[str, Outcome] = {}
    done = threading.Semaphore(0)

    def keep(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        done.release()

    seen = [
        Observation(
            session_id=SessionId(f"arm-{at}"),
            robot_id=RobotId(f"arm-{at}"),
            seq=0,
            images={
                view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
                for view in spec.views
            },
            state=np.array([0.0, 0.6, 0.2, 1.0], np.float32),
            prompt="open the drawer",
            seed=at,
        )
        for at in range(3)
    ]
    with LocalService(model, engine=EngineConfig(), memory=MemoryConfig()) as service:
        for item in seen:
            service.submit(item, lambda outcome, name=item.session_id: keep(name, outcome))  # type: ignore[misc]
        for _ in seen:
            assert done.acquire(timeout=30.0)
    small = load_policy(SMALL)
    with LocalService(small, engine=EngineConfig(), memory=MemoryConfig()) as service:
        for item in seen:
            large_chunk = outcomes.pop(item.session_id)
            assert isinstance(large_chunk, ActionChunk), large_chunk
            service.submit(item, lambda outcome, name=item.session_id: keep(name, outcome))  # type: ignore[misc]
            assert done.acquire(timeout=30.0)
            small_chunk = outcomes[item.session_id]
            assert isinstance(small_chunk, ActionChunk), small_chunk
            error = np.abs(large_chunk.actions - small_chunk.actions)
            assert error.mean() < 0.02, error.max()
