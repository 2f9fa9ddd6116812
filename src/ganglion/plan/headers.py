"""Headers: what a checkpoint folder says about itself, without a byte of its weights. Pure.

config.json, model.safetensors or its shards with their index. Everything is checked before it is believed. Called by
cli's plan, and by the loaders of `models` before they map a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.units import MIB

MAX_HEADER_BYTES = 100 * MIB  # the limit of the safetensors format itself
MAX_JSON_BYTES = 64 * MIB
MAX_SHARDS = 4096
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_DAMAGED = "the file is truncated or damaged: copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor of a file; `dtype` in the format's spelling ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.num_values * STORED_BYTES[self.dtype]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises CheckpointError when there is none, or it is no JSON object."""
    return read_object(folder / CONFIG_FILE)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, at most {MAX_JSON_BYTES}")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: not readable JSON: {reason}",
            next_step="name a folder in Hugging Face layout: config.json and *.safetensors",
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(document).__name__}")
    return document


def read_folder(folder: Path) -> tuple[TensorHeader, ...]:
    """Every tensor of the folder's weights, by name.

    Raises CheckpointError for files that are missing or damaged, and for an index that does not say what they hold.
    """
    if not (folder / INDEX_FILE).exists():
        (file,) = weight_files(folder)
        return read_header(file)
    weight_map, path = _read_index(folder), folder / INDEX_FILE
    found: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        for tensor in read_header(file):
            if weight_map.get(tensor.name) != file.name:
                raise CheckpointError(
                    f"{path}: {tensor.name} is in {file.name}, the index says "
                    f"{weight_map.get(tensor.name)!r}"
                )
            found[tensor.name] = tensor
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]}: lacks {missing[0]}, which the index names "
            f"({len(missing)} tensors missing)",
            next_step=_DAMAGED,
        )
    return tuple(found[name] for name in sorted(found))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """model.safetensors, or the shards that the index names, all of them there. Raises CheckpointError otherwise."""
    if not (folder / INDEX_FILE).exists():
        if (folder / WEIGHTS_FILE).is_file():
            return (folder / WEIGHTS_FILE,)
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found "
            f"{', '.join(others[:3]) if others else 'neither'}",
            next_step="download or save the model as safetensors: pickled weights are never read",
        )
    files = sorted(set(_read_index(folder).values()))
    if len(files) > MAX_SHARDS:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: {len(files)} files, at most {MAX_SHARDS} are read"
        )
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder}: {file} is missing, the index names {len(files)} files",
                next_step=f"copy {file} beside {INDEX_FILE}",
            )
    return tuple(folder / file for file in files)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file. An index is from a stranger: its files are in its own folder or nowhere."""
    path = folder / INDEX_FILE
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: expected an object of tensors and files")
    for name, file in weight_map.items():
        is_plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
        if not is_plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {name[:80]}: expected the name of a .safetensors file beside it, "
                f"got {str(file)[:80]!r}"
            )
    return weight_map


def read_header(path: Path) -> tuple[TensorHeader, ...]:
    """Every tensor of one safetensors file, by name; its data must fill the file to the last byte.

    Raises CheckpointError when it is not such a file.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 10 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: header of {header_bytes} bytes in a file of {file_bytes}",
                    next_step=_DAMAGED,
                )
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header: expected an object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors, extents = [], []
    for name in sorted(header):
        tensor, start = _entry(path, name, header[name])
        tensors.append(tensor)
        extents.append((start, start + tensor.num_bytes, name))
    end = 0
    for start, stop, name in sorted(extents):
        if start != end:
            raise CheckpointError(f"{path}: {name} starts at byte {start}, expected {end}")
        end = stop
    if end != file_bytes - 8 - header_bytes:
        raise CheckpointError(
            f"{path}: header describes {end} bytes of data, the file has {file_bytes - 8 - header_bytes}",
            next_step=_DAMAGED,
        )
    return tuple(tensors)


def _entry(path: Path, name: str, entry: object) -> tuple[TensorHeader, int]:
    """The tensor, and where its data starts."""
    fields = entry if isinstance(entry, Mapping) else {}
    dtype, shape, extent = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in STORED_BYTES:
        raise CheckpointError(
            f"{path}: {name}: dtype: expected one of {', '.join(STORED_BYTES)}, got {dtype!r}"
        )
    sizes, offsets = _counts(shape), _counts(extent)
    if sizes is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: {name}: expected whole numbers, got shape {shape!r} and data_offsets {extent!r}"
        )
    tensor = TensorHeader(name=name, dtype=dtype, shape=sizes)
    start, stop = offsets
    if stop - start != tensor.num_bytes:
        raise CheckpointError(
            f"{path}: {name}: shape {sizes} of {dtype} does not fill bytes {start}..{stop}"
        )
    return tensor, start


def _counts(value: object) -> tuple[int, ...] | None:
    """A list of whole numbers; None for anything else."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return None
    return tuple(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found
