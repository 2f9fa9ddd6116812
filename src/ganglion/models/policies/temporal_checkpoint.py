"""Temporal checkpoints: what a memory adds to a flow checkpoint, and the name of that checkpoint.

| file | content |
|---|---|
| config.json | type, `base` (folder of the flow checkpoint, relative), `base_version`, the memory's sizes |
| model.safetensors | the memory, and the action expert that learned to read it |

Trunk, stems, words and normalisation are the base's, so a page of theirs means the same to both policies. Called by
`models.registry` and by `train`. Knows no engine.
"""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ganglion.errors import CheckpointError
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint, load_flow_checkpoint
from ganglion.models.policies.temporal import TemporalConfig, TemporalPolicy
from ganglion.models.policies.transforms import Processor
from ganglion.models.weights import load_tensors, read_header, save_tensors
from ganglion.spec import PolicySpec

TEMPORAL_TYPE = "ganglion_temporal"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_MAX_PAST = 64  # observations; a longer past is the recurrent state's affair


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalCheckpoint:
    """Everything that one folder holds, and its base."""

    policy: TemporalPolicy
    processor: Processor
    spec: PolicySpec


def save_temporal_checkpoint(
    folder: Path, policy: TemporalPolicy, base: FlowCheckpoint, *, base_dir: str
) -> None:
    """Write a checkpoint folder, weights in bfloat16. `base_dir`: where `base` lies, relative to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "type": TEMPORAL_TYPE,
        "base": base_dir,
        "base_version": base.spec.version,
        "memory": policy.sizes(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.to(torch.bfloat16) for name, value in policy.trained().items()}
    save_tensors(weights, folder / WEIGHTS_FILE)


def load_temporal_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> TemporalCheckpoint:
    """Read a checkpoint folder and its base. Raises CheckpointError naming the file and key that does not fit."""
    path, content = folder / CONFIG_FILE, _content(folder)
    base = load_base(folder, dtype=dtype)
    policy = TemporalPolicy.from_flow(base.policy, _memory_config(path, content)).to(dtype)
    _load_trained(policy, folder / WEIGHTS_FILE)
    policy.eval().requires_grad_(requires_grad=False)
    digest = hashlib.blake2b(base.spec.version.encode(), digest_size=8)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / name).read_bytes())
    spec = replace(base.spec, name=folder.name, family=TEMPORAL_TYPE, version=digest.hexdigest())
    return TemporalCheckpoint(policy=policy, processor=base.processor, spec=spec)


def load_base(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> FlowCheckpoint:
    """The flow checkpoint that the one in `folder` rests on. Raises CheckpointError when it is another."""
    path, content = folder / CONFIG_FILE, _content(folder)
    base_dir, version = content.get("base"), content.get("base_version")
    if not isinstance(base_dir, str) or not base_dir:
        raise CheckpointError(f"{path}: base: expected a folder, got {base_dir!r}")
    base = load_flow_checkpoint(folder / base_dir, dtype=dtype)
    if base.spec.version != version:
        raise CheckpointError(
            f"{path}: base_version: expected {version!r}, {base_dir} has {base.spec.version!r}",
            next_step="the memory was trained for other weights: train it again for this base",
        )
    return base


def _content(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable config: {error}") from error
    if not isinstance(content, dict) or content.get("type") != TEMPORAL_TYPE:
        got = content.get("type") if isinstance(content, dict) else content
        raise CheckpointError(f"{path}: type: expected {TEMPORAL_TYPE!r}, got {got!r}")
    return content


def _memory_config(path: Path, content: dict[str, Any]) -> TemporalConfig:
    sizes = content.get("memory")
    names = sorted(field.name for field in fields(TemporalConfig))
    if not isinstance(sizes, dict) or sorted(sizes) != names:
        got = sorted(sizes) if isinstance(sizes, dict) else sizes
        raise CheckpointError(f"{path}: memory: expected the keys {names}, got {got}")
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{path}: memory.{name}: expected a positive whole number, got {value!r}"
            )
    if sizes["num_past"] > _MAX_PAST:
        raise CheckpointError(
            f"{path}: memory.num_past: expected at most {_MAX_PAST}, got {sizes['num_past']}"
        )
    return TemporalConfig(**sizes)


def _load_trained(policy: TemporalPolicy, path: Path) -> None:
    header, expected = read_header(path), policy.trained()
    missing, unknown = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected)
    if missing or unknown:
        problem = f"{missing[0]}: expected in" if missing else f"{unknown[0]}: unknown key of"
        raise CheckpointError(
            f"{path}: {problem} TemporalPolicy ({len(missing)} keys missing, {len(unknown)} unknown)",
            next_step="config.json and the weights must come from the same training run",
        )
    for name, (_, shape) in header.items():
        if shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{path}: {name}: shape expected {tuple(expected[name].shape)}, got {shape}",
                next_step="config.json and the weights must come from the same training run",
            )
    policy.load_state_dict(load_tensors(path), strict=False)
