"""Weights: safetensors files into modules and back, with the header checked before a byte is believed.

Called by checkpoint loaders and by `train`. Knows no architecture: it matches names and shapes, and says which differ.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ganglion.errors import CheckpointError

_MAX_HEADER_BYTES = 16 * 1024 * 1024
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor.

    Raises CheckpointError when the file is not safetensors, has a forbidden dtype, or its offsets do not tile it.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: header of {header_bytes} bytes in a file of {file_bytes}"
                )
            header = json.loads(file.read(header_bytes))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header must be an object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    extents: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, extent = _checked_entry(path, name, entry)
        tensors[name] = (dtype, shape)
        extents.append(extent)
    end = 0
    for start, stop in sorted(extents):
        if start != end:
            raise CheckpointError(
                f"{path}: data has a gap or an overlap at byte {end}, next tensor is at {start}"
            )
        end = stop
    if end != file_bytes - 8 - header_bytes:
        raise CheckpointError(
            f"{path}: header describes {end} bytes of data, the file has {file_bytes - 8 - header_bytes}",
            next_step="the file is truncated or damaged: copy it again",
        )
    return tensors


def _checked_entry(
    path: Path, name: str, entry: object
) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    try:
        assert isinstance(entry, dict)
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        is_sane = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {name}: malformed header entry") from error
    if dtype not in _DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: {name}: dtype expected one of {', '.join(_DTYPE_BYTES)}, got {dtype!r}"
        )
    if not is_sane or stop - start != prod(shape) * _DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: {name}: shape {shape} of {dtype} does not fill bytes {start}..{stop}"
        )
    return dtype, shape, (start, stop)


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
