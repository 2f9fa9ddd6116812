"""Weights: safetensors files into modules and back, with the header checked before a byte is believed (`plan.headers`).

Called by checkpoint loaders and by `train`. Knows no architecture: it matches names and shapes, and says which differ.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.plan import headers


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor. Raises CheckpointError as `plan.headers.read_header`."""
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in headers.read_header(path)}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checked file."""
    read_header(path)
    return load_file(path)


def load_into(module: nn.Module, path: Path) -> None:
    """Fill every parameter of `module`, keeping the module's dtype.

    Raises CheckpointError naming the first missing, unknown or misshaped key, with expected and got.
    """
    header = read_header(path)
    expected = module.state_dict()
    missing = sorted(expected.keys() - header.keys())
    unknown = sorted(header.keys() - expected.keys())
    if missing or unknown:
        problem = f"{missing[0]}: expected in" if missing else f"{unknown[0]}: unknown key of"
        raise CheckpointError(
            f"{path}: {problem} {type(module).__name__} ({len(missing)} keys missing, {len(unknown)} unknown)",
            next_step="the sizes in config.json and the weights must come from the same training run",
        )
    for name, (_, shape) in header.items():
        if shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{path}: {name}: shape expected {tuple(expected[name].shape)}, got {shape}",
                next_step="the sizes in config.json and the weights must come from the same training run",
            )
    module.load_state_dict(load_file(path))


def save_module(module: nn.Module, path: Path, *, dtype: torch.dtype) -> None:
    """Write every parameter of `module` as `dtype`."""
    save_tensors({name: value.to(dtype) for name, value in module.state_dict().items()}, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # the library writes files that only their owner can read
