"""Flow checkpoints: a FlowPolicy with its processor, in LeRobot's folder layout.

| file | content |
|---|---|
| config.json | type, features, normalisation, sizes, bounds, rate |
| model.safetensors | weights |
| policy_preprocessor.json, policy_postprocessor.json, *.safetensors | normalisation |
| tokenizer.json | vocabulary |

Called by `models.registry` and by `train`. Knows no engine.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ganglion.errors import CheckpointError
from ganglion.models.policies.flow import FlowConfig, FlowPolicy
from ganglion.models.policies.transforms import ACTION_KEY, STATE_KEY, Processor
from ganglion.models.weights import load_into, save_module
from ganglion.spec import PolicySpec, ViewSpec

TYPE = "ganglion_flow"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_NOT_CONTENT = ("evaluation.json",)  # measured afterwards: it does not change what the policy does


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowCheckpoint:
    """Everything that one folder holds."""

    policy: FlowPolicy
    processor: Processor
    spec: PolicySpec


def save_flow_checkpoint(
    folder: Path,
    policy: FlowPolicy,
    processor: Processor,
    *,
    control_hz: float,
    action_low: tuple[float, ...],
    action_high: tuple[float, ...],
) -> None:
    """Write a checkpoint folder, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = policy.config
    shape = [3, config.view_height_px, config.view_width_px]
    sizes = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()
    }
    content = {
        "type": TYPE,
        "n_obs_steps": 1,
        "input_features": {
            STATE_KEY: {"type": "STATE", "shape": [config.state_dim]},
            **{key: {"type": "VISUAL", "shape": shape} for key in config.view_keys},
        },
        "output_features": {ACTION_KEY: {"type": "ACTION", "shape": [config.action_dim]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "chunk_size": config.horizon,
        "control_hz": control_hz,
        "action_low": list(action_low),
        "action_high": list(action_high),
        **sizes,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_module(policy, folder / WEIGHTS_FILE, dtype=torch.bfloat16)
    processor.save(folder)


def load_flow_checkpoint(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> FlowCheckpoint:
    """Read a checkpoint folder. Raises CheckpointError naming the file and key that does not fit."""
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable config: {error}") from error
    if content.get("type") != TYPE:
        raise CheckpointError(f"{path}: type: expected {TYPE!r}, got {content.get('type')!r}")
    config = _config(path, content)
    low = _bounds(path, content, "action_low", config.action_dim)
    high = _bounds(path, content, "action_high", config.action_dim)
    policy = FlowPolicy(config).to(dtype).eval().requires_grad_(requires_grad=False)
    load_into(policy, folder / WEIGHTS_FILE)
    spec = PolicySpec(
        name=folder.name,
        family=TYPE,
        version=_content_hash(folder),
        views=tuple(
            ViewSpec(
                key=key,
                height=config.view_height_px,
                width=config.view_width_px,
                patch_px=config.patch_px,
            )
            for key in config.view_keys
        ),
        state_key=STATE_KEY,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        horizon=config.horizon,
        num_flow_steps=config.num_flow_steps,
        control_hz=float(content.get("control_hz", 0.0)),
        action_low=low,
        action_high=high,
        max_prefix=config.max_prefix,
        late_context_steps=config.num_flow_steps,
    )
    return FlowCheckpoint(
        policy=policy, processor=Processor.load(folder, action_low=low, action_high=high), spec=spec
    )


def with_flow_steps(checkpoint: FlowCheckpoint, num_flow_steps: int) -> FlowCheckpoint:
    """The same weights with another number of Euler steps."""
    spec = replace(
        checkpoint.spec, num_flow_steps=num_flow_steps, late_context_steps=num_flow_steps
    )
    return replace(checkpoint, spec=spec)


def _config(path: Path, content: dict[str, Any]) -> FlowConfig:
    values: dict[str, Any] = {}
    for field in fields(FlowConfig):
        if field.name not in content:
            raise CheckpointError(f"{path}: {field.name}: expected a value, got nothing")
        value = content[field.name]
        values[field.name] = tuple(value) if isinstance(value, list) else value
    for name, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        is_text = name == "view_keys"
        if not parts or not all(_is_text(part) if is_text else _is_size(part) for part in parts):
            expected = "view keys" if is_text else "a positive whole number"
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {value!r}")
    config = FlowConfig(**values)
    for key in config.view_keys:
        shape = [3, config.view_height_px, config.view_width_px]
        got = content.get("input_features", {}).get(key, {}).get("shape")
        if got != shape:
            raise CheckpointError(
                f"{path}: input_features.{key}.shape: expected {shape}, got {got}"
            )
    return config


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _bounds(path: Path, content: dict[str, Any], key: str, action_dim: int) -> tuple[float, ...]:
    values = content.get(key)
    if not isinstance(values, list) or len(values) != action_dim:
        raise CheckpointError(f"{path}: {key}: expected {action_dim} numbers, got {values!r}")
    return tuple(float(value) for value in values)


def _content_hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".json", ".safetensors") and path.name not in _NOT_CONTENT
    ):
        digest.update(name.encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
