"""Decoder loading: a Hugging Face folder (config.json, safetensors in one file or in shards) -> a Decoder.

Called by the CLI's composition root, benches and tests. Reads numbers and names only: no code from a folder ever runs.
Everything is checked from headers before a weight is mapped. What needs neither another dtype nor a neighbour stays a view
of the mapped file.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.models.decoder import Decoder
from ganglion.models.decoder_spec import DecoderSpec, QkNorm, read_decoder_spec
from ganglion.models.language import LanguageModel
from ganglion.models.weights import read_header

_MAX_JSON_BYTES = 64 << 20
_HASHED_BYTES = 1 << 16  # of the head, the middle and the tail of a shard
_INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]  # bytes loaded, bytes in all


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """One of our parameters: sources one below the other (along dim 0), plus `shift`."""

    sources: tuple[Source, ...]
    shift: float = 0.0


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
    config = read_config(folder)
    spec = read_decoder_spec(
        config, source=str(folder / "config.json"), eos_ids=_generation_eos(folder)
    )
    shards = _shards(folder)
    headers = {path: read_header(path) for path in shards}
    targets = decoder_targets(spec)
    places = _match(folder, spec, targets, headers)
    with torch.device("meta"):
        model = Decoder(
            spec,
            name=name,
            version=_version(folder, shards),
            dtype=dtype,
            max_page_bytes=max_page_bytes,
        )
    _fill(model, targets, places, dtype, on_progress)
    return model.eval()


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a folder, parsed. Raises CheckpointError where there is none or it is no JSON object."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: expected, but there is no such file",
            next_step="name a folder in Hugging Face layout: config.json and *.safetensors",
        )
    return config


def decoder_targets(spec: DecoderSpec) -> dict[str, Target]:
    """Parameter name in Decoder -> what fills it, in a checkpoint of this spec's family."""
    width, shift = spec.width, spec.norm_shift
    table = Source("model.embed_tokens.weight", (spec.vocab_size, width))
    targets = {
        "embedding.weight": Target((table,)),
        "norm.weight": Target((Source("model.norm.weight", (width,)),), shift),
    }
    if not spec.is_tied:
        targets["head.weight"] = Target((Source("lm_head.weight", (spec.vocab_size, width)),))
    for layer in range(spec.num_layers):
        source, ours = f"model.layers.{layer}", f"layers.{layer}"
        for part in (_norm_targets(spec), _attention_targets(spec), _mlp_targets(spec)):
            for key, target in part.items():
                sources = tuple(Source(f"{source}.{s.name}", s.shape) for s in target.sources)
                targets[f"{ours}.{key}"] = Target(sources, target.shift)
    return targets


def _norm_targets(spec: DecoderSpec) -> dict[str, Target]:
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if spec.has_post_norms:
        names |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    return {
        f"{ours}.weight": Target((Source(f"{theirs}.weight", (spec.width,)),), spec.norm_shift)
        for ours, theirs in names.items()
    }


def _attention_targets(spec: DecoderSpec) -> dict[str, Target]:
    inner, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    heights = {"q_proj": inner, "k_proj": narrow, "v_proj": narrow}
    targets = _affine("attention.qkv", "self_attn", heights, spec.width, has_bias=spec.has_qkv_bias)
    targets |= _affine(
        "attention.out", "self_attn", {"o_proj": spec.width}, inner, has_bias=spec.has_out_bias
    )
    if spec.qk_norm != QkNorm.NONE:
        is_per_head = spec.qk_norm == QkNorm.HEAD
        for key, size in (("q_norm", inner), ("k_norm", narrow)):
            shape = (spec.head_dim if is_per_head else size,)
            targets[f"attention.{key}.weight"] = Target(
                (Source(f"self_attn.{key}.weight", shape),), spec.norm_shift
            )
    if spec.has_sinks:
        targets["attention.sinks"] = Target((Source("self_attn.sinks", (spec.num_heads,)),))
    return targets


def _mlp_targets(spec: DecoderSpec) -> dict[str, Target]:
    heights = {"gate_proj": spec.mlp_width, "up_proj": spec.mlp_width}
    targets = _affine("mlp.gate_up", "mlp", heights, spec.width, has_bias=spec.has_mlp_bias)
    return targets | _affine(
        "mlp.down", "mlp", {"down_proj": spec.width}, spec.mlp_width, has_bias=spec.has_mlp_bias
    )


def _affine(
    ours: str, parent: str, heights: Mapping[str, int], low: int, *, has_bias: bool
) -> dict[str, Target]:
    """Linear layers of a checkpoint, one below the other, as one of ours."""
    weights = tuple(Source(f"{parent}.{key}.weight", (high, low)) for key, high in heights.items())
    targets = {f"{ours}.weight": Target(weights)}
    if has_bias:
        biases = tuple(Source(f"{parent}.{key}.bias", (high,)) for key, high in heights.items())
        targets[f"{ours}.bias"] = Target(biases)
    return targets


def _match(
    folder: Path,
    spec: DecoderSpec,
    targets: Mapping[str, Target],
    headers: Mapping[Path, Mapping[str, tuple[str, tuple[int, ...]]]],
) -> dict[str, Path]:
    """Tensor name -> shard, of all that will be read. Raises one error that counts all that differ."""
    shapes = {name: shape for header in headers.values() for name, (_, shape) in header.items()}
    expected = {
        source.name: source.shape for target in targets.values() for source in target.sources
    }
    problems = [f"{name}: expected, but missing" for name in expected if name not in shapes]
    problems += [
        f"{name}: shape expected {shape}, got {shapes[name]}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems += [
        f"{name}: unexpected"
        for name in shapes
        if name not in expected and not _is_derived(name, spec)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder}: weights do not fit config.json as {spec.family}: "
            f"{'; '.join(problems[:3])}{more}",
            next_step="config.json and the weights must come from the same model: copy both again",
        )
    return {name: path for path, header in headers.items() for name in header if name in expected}


def _is_derived(name: str, spec: DecoderSpec) -> bool:
    """Tensors that old checkpoints hold although they follow from others."""
    is_tied_head = spec.is_tied and name == "lm_head.weight"
    return is_tied_head or name.endswith("rotary_emb.inv_freq")


def _fill(
    model: nn.Module,
    targets: Mapping[str, Target],
    places: Mapping[str, Path],
    dtype: torch.dtype,
    on_progress: Progress | None,
) -> None:
    item_bytes = dtype.itemsize
    total_bytes = sum(
        prod(source.shape) * item_bytes for target in targets.values() for source in target.sources
    )
    opened: dict[Path, Any] = {
        path: safe_open(path, framework="pt") for path in set(places.values())
    }
    loaded_bytes = 0
    for name, target in targets.items():
        parts = [opened[places[source.name]].get_tensor(source.name) for source in target.sources]
        value = _joined(parts, target.shift, dtype)
        _assign(model, name, value)
        loaded_bytes += value.numel() * item_bytes
        if on_progress is not None:
            on_progress(loaded_bytes, total_bytes)
    left = [name for name, value in model.named_parameters() if value.is_meta]
    assert not left, f"nothing fills {left}"


def _joined(parts: list[Tensor], shift: float, dtype: torch.dtype) -> Tensor:
    value = parts[0].to(dtype) if len(parts) == 1 else _stacked(parts, dtype)
    # shifted weights stay float32: one more than a small number does not fit into 8 bits
    return parts[0].float() + shift if shift else value


def _stacked(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    out = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=dtype)
    first = 0
    for part in parts:
        out[first : first + len(part)] = part
        first += len(part)
    return out


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, key)
    assert old.shape == value.shape, f"{name}: {tuple(old.shape)} filled with {tuple(value.shape)}"
    parameter = nn.Parameter(value, requires_grad=False)
    for other in model.modules():  # a tied parameter has two owners
        for other_key, other_value in list(other._parameters.items()):
            if other_value is old:
                other._parameters[other_key] = parameter


def _shards(folder: Path) -> tuple[Path, ...]:
    """All weight files. Raises CheckpointError where there are none, or the index names what is not there."""
    index = _read_json(folder / _INDEX)
    if index is None:
        single = folder / "model.safetensors"
        if single.is_file():
            return (single,)
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder}: expected model.safetensors or {_INDEX}, found "
            f"{', '.join(others[:3]) if others else 'neither'}",
            next_step="save the model with safe_serialization=True: pickled weights are never read",
        )
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / _INDEX}: weight_map: expected an object of file names")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / _INDEX}: weight_map: expected names of .safetensors files in the "
                f"folder itself, got {file[:80]!r}"
            )
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / file}: named in the index, but there is no such file",
                next_step=f"copy all {len(files)} shards",
            )
    return tuple(folder / file for file in files)


def _version(folder: Path, shards: tuple[Path, ...]) -> str:
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


def _generation_eos(folder: Path) -> tuple[int, ...]:
    config = _read_json(folder / "generation_config.json") or {}
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: eos_token_id: expected a token id or a list of "
            f"them, got {str(value)[:80]}"
        )
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file."""
    try:
        file_bytes = path.stat().st_size
    except FileNotFoundError:
        return None
    if file_bytes > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes, got {file_bytes}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(value).__name__}")
    return value
