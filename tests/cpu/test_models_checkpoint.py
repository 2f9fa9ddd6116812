"""Checkpoint folders: a round trip is exact, and whatever is wrong with one is named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ganglion.errors import CheckpointError, FieldError
from ganglion.models.policies.flow_checkpoint import (
    FlowCheckpoint,
    load_flow_checkpoint,
    save_flow_checkpoint,
)
from ganglion.models.policies.transforms import MeanStd, Processor
from ganglion.models.registry import SHIPPED, load_policy, policy_folder
from ganglion.models.tiny import TINY_PROMPTS, tiny_flow
from ganglion.models.tokenizer import PAD, UNKNOWN, WordTokenizer
from ganglion.models.weights import load_into, read_header, save_tensors


@pytest.fixture
def tiny() -> FlowCheckpoint:
    return tiny_flow(seed=2)


@pytest.fixture
def folder(tiny: FlowCheckpoint, tmp_path: Path) -> Path:
    save_flow_checkpoint(
        tmp_path / "tiny",
        tiny.policy,
        tiny.processor,
        control_hz=80.0,
        action_low=tiny.spec.action_low,
        action_high=tiny.spec.action_high,
    )
    return tmp_path / "tiny"


def edited(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_round_trip_keeps_weights_and_processing(tiny: FlowCheckpoint, folder: Path) -> None:
    loaded = load_flow_checkpoint(folder, dtype=torch.float32)
    for name, value in tiny.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value.bfloat16().float()), name
    state = np.array([[0.1, 0.6, 0.2, 1.0]], np.float32)
    latents = torch.randn(1, 12, 4)
    assert torch.equal(loaded.processor.state(state), tiny.processor.state(state))
    assert np.array_equal(loaded.processor.actions(latents), tiny.processor.actions(latents))
    assert torch.equal(loaded.processor.tokens(TINY_PROMPTS), tiny.processor.tokens(TINY_PROMPTS))
    assert loaded.spec.views == tiny.spec.views
    assert loaded.spec.control_hz == 80.0


def test_the_layout_is_lerobots(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "ganglion_flow"
    assert config["input_features"]["observation.images.corner"] == {
        "type": "VISUAL",
        "shape": [3, 32, 32],
    }
    assert config["output_features"]["action"] == {"type": "ACTION", "shape": [4]}
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    names = [step["registry_name"] for step in steps]
    assert names[0] == "rename_observations_processor"
    assert names[-1] == "normalizer_processor"
    header = read_header(folder / steps[-1]["state_file"])
    assert header["observation.state.mean"] == ("F32", (4,))
    assert {dtype for dtype, _ in read_header(folder / "model.safetensors").values()} == {"BF16"}


def test_the_version_is_the_content(folder: Path) -> None:
    before = load_flow_checkpoint(folder).spec.version
    assert load_flow_checkpoint(folder).spec.version == before
    edited(folder / "config.json", lambda content: content.update(num_flow_steps=4))
    assert load_flow_checkpoint(folder).spec.version != before


def test_the_registry_loads_by_type_and_counts_flow_steps(folder: Path) -> None:
    assert load_policy(folder).spec.num_flow_steps == 5
    assert load_policy(folder, num_flow_steps=3).spec.num_flow_steps == 3
    with pytest.raises(FieldError, match=r"num_flow_steps: expected 1\.\.10, got 11"):
        load_policy(folder, num_flow_steps=11)
    with pytest.raises(FieldError, match="dtype"):
        load_policy(folder, dtype="int3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(type="act"),
            "type: expected one of ganglion_flow, ganglion_flow_grown, ganglion_temporal, got 'act'",
        ),
        (lambda c: c.pop("horizon"), "horizon: expected a value"),
        (lambda c: c.update(horizon=-1), "horizon: expected a positive whole number, got -1"),
        (lambda c: c.update(horizon="many"), "horizon: expected a positive whole number"),
        (lambda c: c.update(horizon=13), "action_position: shape expected"),
        (lambda c: c.update(view_height_px=64), "input_features.observation.images.corner.shape"),
        (lambda c: c.update(action_low=[-1.0]), "action_low: expected 4 numbers"),
    ],
)
def test_a_wrong_config_is_named(
    folder: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    edited(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_policy(folder)


def test_missing_and_unknown_weights_are_named(folder: Path, tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    path = tmp_path / "weights.safetensors"
    save_tensors({"weight": torch.zeros(3, 2)}, path)
    with pytest.raises(CheckpointError, match="bias: expected in Linear"):
        load_into(module, path)
    save_tensors({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="x: unknown key of Linear"):
        load_into(module, path)
    save_tensors({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"weight: shape expected \(3, 2\), got \(2, 3\)"):
        load_into(module, path)


def damaged(path: Path, header: object, num_data_bytes: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_data_bytes))


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    damaged(path, {"a": entry}, 8)
    assert read_header(path) == {"a": ("F32", (2,))}
    for header, num_data_bytes, message in (
        ({"a": entry}, 7, "describes 8 bytes of data, the file has 7"),
        ({"a": entry | {"dtype": "F128"}}, 16, "dtype: expected one of"),
        ({"a": entry | {"shape": [3]}}, 8, "does not fill bytes"),
        ({"a": entry | {"shape": [-2]}}, 8, "expected whole numbers"),
        ({"a": entry | {"shape": 2}}, 8, "expected whole numbers"),
        ({"a": entry, "b": entry}, 8, "b starts at byte 0, expected 8"),
        ({"a": entry | {"data_offsets": [8, 16]}}, 16, "a starts at byte 8, expected 0"),
        ([], 0, "header: expected an object"),
    ):
        damaged(path, header, num_data_bytes)
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header of 1152921504606846976 bytes"):
        read_header(path)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError):
        read_header(path)


def test_an_unknown_processor_step_is_named(folder: Path) -> None:
    path = folder / "policy_preprocessor.json"

    def insert(content: dict[str, object]) -> None:
        steps = content["steps"]
        assert isinstance(steps, list)
        steps.insert(0, {"registry_name": "smolvla_new_line_processor", "config": {}})

    edited(path, insert)
    with pytest.raises(CheckpointError, match="step 'smolvla_new_line_processor' is not one of"):
        load_policy(folder)


def test_a_missing_statistic_is_named(folder: Path) -> None:
    path = folder / "policy_postprocessor.json"
    edited(path, lambda content: content.update(steps=[]))
    with pytest.raises(CheckpointError, match=r"action\.mean: expected a vector"):
        load_policy(folder)


def test_actions_are_clipped_and_nan_is_kept() -> None:
    tokenizer = WordTokenizer(words=(PAD, UNKNOWN), num_tokens=2)
    unit = MeanStd(mean=torch.zeros(1), std=torch.ones(1))
    processor = Processor(
        tokenizer=tokenizer, state=unit, action=unit, action_low=[-1.0], action_high=[1.0]
    )
    actions = processor.actions(torch.tensor([[[3.0], [-3.0], [0.5], [float("nan")]]]))
    assert actions[0, :3, 0].tolist() == [1.0, -1.0, pytest.approx(0.5)]
    assert np.isnan(actions[0, 3, 0])


def test_a_prefix_is_the_inverse_of_actions(tiny: FlowCheckpoint) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4)).astype(np.float32)
    restored = tiny.processor.actions(tiny.processor.prefix(actions))
    assert np.abs(restored - actions).max() < 1e-6


def test_words_become_ids_in_order() -> None:
    tokenizer = WordTokenizer.from_prompts(["open the drawer"], num_tokens=4, vocab_size=6)
    assert tokenizer.words == (PAD, UNKNOWN, "drawer", "open", "the", "<unused 0>")
    assert tokenizer.encode("Open THE, drawer!").tolist() == [3, 4, 2, 0]
    assert tokenizer.encode("shut the drawer").tolist() == [1, 4, 2, 0]
    assert tokenizer.encode("").tolist() == [0, 0, 0, 0]
    with pytest.raises(FieldError, match="prompt: expected at most 4 words, got 5 words"):
        tokenizer.encode("a b c d e")


@pytest.mark.parametrize("text", ["", "[]", '{"words": 3, "num_tokens": 2}', '{"words": []}'])
def test_a_broken_vocabulary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError):
        WordTokenizer.load(tmp_path)


def test_a_policy_is_a_shipped_name_or_a_folder(folder: Path) -> None:
    assert policy_folder(str(folder)) == folder
    with pytest.raises(FieldError, match="metaworld-ten"):
        policy_folder("no such policy")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_policies_are_small_files_with_a_card(name: str) -> None:
    folder = policy_folder(name)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert num_bytes <= 20_000_000
    assert (folder / "README.md").exists()


def test_the_shipped_policy_loads_and_is_small() -> None:
    name = SHIPPED[0]
    checkpoint = load_flow_checkpoint(policy_folder(name))
    assert checkpoint.spec.name == name
    assert 40 <= checkpoint.spec.horizon <= 50
    assert checkpoint.spec.num_flow_steps <= 10
    assert checkpoint.policy.config.num_context_tokens <= 80
    num_parameters = sum(value.numel() for value in checkpoint.policy.parameters())
    assert 2_000_000 <= num_parameters <= 8_000_000
