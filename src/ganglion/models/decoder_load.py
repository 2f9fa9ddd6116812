"""Decoder loading: a Hugging Face folder (config.json, safetensors in one file or in shards) -> a LanguageModel.

A Decoder where the family is native, else a module of transformers through `models.hf`.

Called by the CLI's composition root, benches and tests. Reads numbers and names only: no code from a folder ever runs.
Everything is checked from headers before a weight is mapped. What needs neither another dtype nor a neighbour stays a view
of the mapped file.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.kernels.cpu import PackedLinear
from ganglion.models.decoder import Decoder
from ganglion.models.decoder_spec import DecoderSpec, read_decoder_spec
from ganglion.models.decoder_targets import Target, decoder_targets
from ganglion.models.families import ServedBy, served_by
from ganglion.models.language import LanguageModel
from ganglion.models.moe import Moe
from ganglion.models.moe_load import Part, moe_parts
from ganglion.models.vision_spec import is_vision
from ganglion.models.weights import give_back_freed, promised, read_header
from ganglion.plan.headers import STORED_BYTES, read_config, read_object, weight_files

_MAX_MAPPED_BYTES = 32 << 20
_NUM_RANDOM = 4_194_301  # prime: no two rows of a weight are equal
_HASHED_BYTES = 1 << 16  # of the head, the middle and the tail of a shard

_FLOATS = ("F32", "F16", "BF16")

Header = Mapping[str, tuple[str, tuple[int, ...]]]
Progress = Callable[[int, int], None]  # bytes loaded, bytes in all


def load_language(
    folder: Path,
    *,
    dtype: torch.dtype,
    name: str,
    max_page_bytes: int = 1 << 20,
    on_progress: Progress | None = None,
) -> LanguageModel:
    """The language model in `folder`, computing in `dtype`, its pages called after `name`.

    Raises CheckpointError for a folder that cannot be served: the file or key, what was expected, what is there.
    """
    if is_vision(read_config(folder)):
        from ganglion.models.vision_load import load_vision_language

        return load_vision_language(
            folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes, on_progress=on_progress
        )
    if _is_served_by_transformers(folder):
        from ganglion.models.hf.folder import load_folder

        return load_folder(
            folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes, on_progress=on_progress
        )
    outline = _outline(folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes)
    reader = TensorReader(outline.places, outline.headers, on_progress)
    fill_decoder(outline.model, outline.targets, outline.experts, reader)
    return outline.model.eval().requires_grad_(requires_grad=False)


def outline_language(
    folder: Path, *, dtype: torch.dtype, name: str, max_page_bytes: int = 1 << 20
) -> LanguageModel:
    """The same model, checked as far as headers go, its weights only promised: for its `spec` and `groups`."""
    if is_vision(read_config(folder)):
        from ganglion.models.vision_load import outline_vision_language

        return outline_vision_language(
            folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes
        )
    if _is_served_by_transformers(folder):
        from ganglion.models.hf.folder import outline_folder

        return outline_folder(folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes)
    return _outline(folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes).model


def _is_served_by_transformers(folder: Path) -> bool:
    source = str(folder / "config.json")
    return served_by(read_config(folder), source=source) is ServedBy.TRANSFORMERS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outline:
    """A decoder whose weights are promised, and where they are."""

    model: Decoder
    targets: Mapping[str, Target]
    experts: Mapping[int, tuple[Part, ...]]
    places: Mapping[str, Path]
    headers: Mapping[Path, Header]


def _outline(folder: Path, *, dtype: torch.dtype, name: str, max_page_bytes: int) -> _Outline:
    config = read_config(folder)
    spec = read_decoder_spec(
        config, source=str(folder / "config.json"), eos_ids=generation_eos(folder)
    )
    shards = weight_files(folder)
    headers = {path: read_header(path) for path in shards}
    names = frozenset(name for header in headers.values() for name in header)
    targets, experts = decoder_targets(spec), _expert_parts(spec, names)
    places = match_tensors(folder, spec, _expected(targets, experts), headers)
    with promised():
        model = Decoder(
            spec,
            name=name,
            version=folder_version(folder, shards),
            dtype=dtype,
            max_page_bytes=max_page_bytes,
        )
    return _Outline(model=model, targets=targets, experts=experts, places=places, headers=headers)


def random_language(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    name: str,
    seed: int = 0,
    max_page_bytes: int = 1 << 20,
) -> LanguageModel:
    """A model of this config.json's shape with random weights, and no file: for benches and tests.

    Within a weight numbers repeat every 4,194,301, which takes a tenth of the time of drawing them all.
    Raises CheckpointError for a config that cannot be served.
    """
    spec = read_decoder_spec(config)
    with promised():
        model = Decoder(
            spec, name=name, version=f"random-{seed}", dtype=dtype, max_page_bytes=max_page_bytes
        )
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(_NUM_RANDOM, generator=generator).to(dtype)
    for part in (*model.layers, model.embedding, model.norm, model.head):
        _randomise(part.to_empty(device="cpu"), numbers, generator)
        model.pack(part)  # at once: no more than one layer is in memory twice
    model.tie()
    model.pack(model)
    return model.eval().requires_grad_(requires_grad=False)


def _randomise(part: nn.Module, numbers: Tensor, generator: torch.Generator) -> None:
    """Norms 1, biases 0, weights such that hidden states keep their size whatever the width."""
    for name, value in (*part.named_parameters(), *part.named_buffers()):
        if value.ndim == 1:
            value.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        flat = value.data.view(-1)
        shift = int(torch.randint(len(numbers), (), generator=generator))
        source = numbers.roll(shift) * value.shape[-1] ** -0.5
        for chunk in torch.split(flat, len(numbers)):
            chunk.copy_(source[: len(chunk)])


def _expert_parts(spec: DecoderSpec, names: Collection[str]) -> dict[int, tuple[Part, ...]]:
    """Layer -> the tensors of its experts and router."""
    parts: dict[int, tuple[Part, ...]] = {}
    below: dict[str, set[str]] = {}
    for name in names:
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        below.setdefault(head, set()).add(rest)
    for layer, layer_spec in enumerate(spec.layers):
        if layer_spec.moe is not None:
            parts[layer] = moe_parts(layer_spec.moe, below.get(str(layer), ()))
    return parts


def _expected(
    targets: Mapping[str, Target], experts: Mapping[int, tuple[Part, ...]]
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Tensor name -> its shape, and whether it may hold packed bytes."""
    expected = {s.name: (s.shape, False) for target in targets.values() for s in target.sources}
    for layer, parts in experts.items():
        for part in parts:
            expected[f"model.layers.{layer}.{part.name}"] = (part.shape, True)
    return expected


def match_tensors(
    folder: Path,
    spec: DecoderSpec,
    expected: Mapping[str, tuple[tuple[int, ...], bool]],
    headers: Mapping[Path, Header],
) -> dict[str, Path]:
    """Tensor name -> shard, of all that will be read. Raises one error that counts all that differ."""
    got = {name: entry for header in headers.values() for name, entry in header.items()}
    problems = [f"{name}: expected, but missing" for name in expected if name not in got]
    for name, (dtype, shape) in got.items():
        if name not in expected:
            if not _is_ignored(name, spec):
                problems.append(f"{name}: unexpected")
            continue
        wanted, may_be_bytes = expected[name]
        if shape != wanted:
            problems.append(f"{name}: shape expected {wanted}, got {shape}")
        elif dtype not in _FLOATS and not (may_be_bytes and dtype == "U8"):
            problems.append(f"{name}: dtype expected one of {', '.join(_FLOATS)}, got {dtype}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder}: weights do not fit config.json as {spec.family}: "
            f"{'; '.join(problems[:3])}{more}",
            next_step="config.json and the weights must come from the same model: copy both again",
        )
    return {name: path for path, header in headers.items() for name in header if name in expected}


def _is_ignored(name: str, spec: DecoderSpec) -> bool:
    """Tensors that old checkpoints hold although they follow from others, and layers that predict further tokens."""
    is_tied_head = spec.is_tied and name == "lm_head.weight"
    head, _, _ = name.removeprefix("model.layers.").partition(".")
    is_beyond = head.isdecimal() and int(head) >= spec.num_layers and spec.num_extra_layers > 0
    return is_tied_head or is_beyond or name.endswith("rotary_emb.inv_freq")


class TensorReader:
    """Tensors of the mapped shards by name; counts the bytes it hands out."""

    def __init__(
        self,
        places: Mapping[str, Path],
        headers: Mapping[Path, Header],
        on_progress: Progress | None,
    ) -> None:
        self._places, self._on_progress = places, on_progress
        self._mapped: dict[Path, Any] = {}
        self._mapped_bytes = 0
        self._left = set(places)
        self._loaded_bytes = 0
        self._total_bytes = sum(
            prod(headers[path][name][1]) * STORED_BYTES[headers[path][name][0]]
            for name, path in places.items()
        )

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored: a view of the file."""
        if self._mapped_bytes > _MAX_MAPPED_BYTES:
            self.forget()
        path = self._places[name]
        if path not in self._mapped:
            self._mapped[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._mapped[path].get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        if name in self._left:
            self._left.remove(name)
            self._loaded_bytes += tensor.nbytes
        return tensor

    def forget(self) -> None:
        """Map files anew: what was read counts as this process's memory until nobody maps it any more."""
        self._mapped, self._mapped_bytes = {}, 0
        give_back_freed()

    def report(self) -> None:
        """Tell who listens how many bytes are loaded."""
        if self._on_progress is not None:
            self._on_progress(self._loaded_bytes, self._total_bytes)


def fill_decoder(
    model: Decoder,
    targets: Mapping[str, Target],
    experts: Mapping[int, tuple[Part, ...]],
    reader: TensorReader,
) -> None:
    """Layer by layer, each packed as soon as it is there, so that no more than one is in memory twice."""
    for part, names in groupby(targets, key=_part_of):
        for name in names:
            _set(model, name, targets[name], reader)
            reader.report()
        if part == "embedding" and model.decoder_spec.is_tied:
            model.tie()
            model.pack(model)
            if isinstance(model.head, PackedLinear):
                # packing read the whole table; of a fresh view only rows that are asked for are read
                reader.forget()
                _set(model, "embedding.weight", targets["embedding.weight"], reader)
        if part.startswith("layers."):
            layer = int(part.removeprefix("layers."))
            if layer in experts:
                _place_experts(model, layer, experts[layer], reader)
            model.pack(model.get_submodule(part))
    left = [name for name, value in model.named_parameters() if value.is_meta]
    assert not left, f"nothing fills {left}"
    model.pack(model)
    give_back_freed()


def _set(model: Decoder, name: str, target: Target, reader: TensorReader) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    parts = [reader.read(source.name) for source in target.sources]
    value = _joined(parts, target, getattr(module, key).dtype)
    setattr(module, key, nn.Parameter(value, requires_grad=False))


def _part_of(name: str) -> str:
    """ "layers.3" of "layers.3.mlp.down.weight"; "head" of "head.weight"."""
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def _place_experts(
    model: Decoder, layer: int, parts: tuple[Part, ...], reader: TensorReader
) -> None:
    moe = model.get_submodule(f"layers.{layer}.mlp").to_empty(device="cpu")
    assert isinstance(moe, Moe)
    for part in parts:
        part.place(moe, reader.read(f"model.layers.{layer}.{part.name}"))
        reader.report()


def _joined(parts: list[Tensor], target: Target, dtype: torch.dtype) -> Tensor:
    """One below the other. A lone tensor of the right dtype stays a view of the file."""
    if target.shift:
        return (parts[0].float() + target.shift).to(dtype)
    if len(parts) == 1:
        return parts[0].to(dtype)
    out = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=dtype)
    first = 0
    for part in parts:
        out[first : first + len(part)] = part
        first += len(part)
    return out


def folder_version(folder: Path, shards: tuple[Path, ...]) -> str:
    """Hash of config.json, and of every shard's size, head (names and shapes), middle and tail.

    Not of every byte, which would take longer than mapping them; two trainings differ in all of these.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in shards:
        file_bytes = path.stat().st_size
        digest.update(file_bytes.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start in (0, file_bytes // 2, max(0, file_bytes - _HASHED_BYTES)):
                file.seek(start)
                digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]


def generation_eos(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    value = read_object(path).get("eos_token_id") if path.exists() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise CheckpointError(
            f"{path}: eos_token_id: expected a token id or a list of them, got {str(value)[:80]}"
        )
    return tuple(ids)
