"""LoRA folders as PEFT writes them: what adapter_config.json and the header of adapter_model.safetensors say.

Called by `lora_load` before a weight is mapped. What would change the model in a way that is not served is refused by
name. No code from a folder ever runs. Knows no page.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.models.decoder_spec import DecoderSpec
from ganglion.models.decoder_targets import decoder_targets
from ganglion.models.weights import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 4096
_HASH_CHUNK_BYTES = 1 << 20
_PREFIX = "base_model.model."
_FLOATS = ("F32", "F16", "BF16")
# keys that change nothing of what is computed, or that are read here
_KNOWN = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
        *("revision", "inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "bias"),
        *("init_lora_weights", "eva_config", "corda_config", "qalora_group_size"),
    )
)
# ways to begin a training that leave the base model as it was; others put a part of it into the adapter
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSite:
    """One linear layer of a checkpoint: columns [start, start + num_outputs) of what our product `product` makes."""

    layer: int
    product: str  # below the layer: "attention.qkv"
    start: int
    num_outputs: int
    num_inputs: int


def lora_sites(spec: DecoderSpec) -> dict[str, LoraSite]:
    """Name of a linear layer in a checkpoint ("model.layers.0.self_attn.q_proj") -> what it is here; no experts."""
    sites: dict[str, LoraSite] = {}
    for ours, target in decoder_targets(spec).items():
        if not ours.startswith("layers.") or not ours.endswith(".weight"):
            continue
        head, _, rest = ours.removeprefix("layers.").partition(".")
        start = 0
        for source in target.sources:
            if len(source.shape) == 2:
                high, low = source.shape
                sites[source.name.removesuffix(".weight")] = LoraSite(
                    layer=int(head),
                    product=rest.removesuffix(".weight"),
                    start=start,
                    num_outputs=high,
                    num_inputs=low,
                )
            start += source.shape[0]
    return sites


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """A and B of one linear layer; `scale` goes into B."""

    module: str  # in the file
    site: LoraSite
    rank: int
    scale: float


class LoraFolder:
    """One checked folder. Its weights are neither mapped nor read."""

    def __init__(self, folder: Path, spec: DecoderSpec) -> None:
        """`spec`: of the model that it is for. Raises CheckpointError: the file or key, what was expected and got."""
        self.path = folder / WEIGHTS
        config = _read_config(folder)
        if not self.path.is_file():
            others = sorted(path.name for path in folder.glob("adapter_model*"))
            raise CheckpointError(
                f"{folder}: expected {WEIGHTS}, found {', '.join(others) if others else 'none'}",
                next_step="save the adapter with safe_serialization=True: pickled weights are never read",
            )
        self.pairs = _pairs(self.path, config, read_header(self.path), spec)
        self._stamp = _stamp(self.path)
        self.version = _digest(folder / CONFIG, self.path)
        self.max_rank = max(pair.rank for pair in self.pairs)

    def check_unchanged(self) -> None:
        """Raise CheckpointError where the file is not the one that was checked."""
        if _stamp(self.path) != self._stamp:
            raise CheckpointError(
                f"{self.path}: changed since the server started", next_step="restart the server"
            )


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        size = path.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes, got {size}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not readable JSON: {error}",
            next_step=f"name a folder that PEFT wrote: {CONFIG} and {WEIGHTS}",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type: expected LORA, got {_shown(kind)}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias: expected none, got {_shown(config['bias'])}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights: expected one of {', '.join(map(str, _PLAIN_STARTS))}, got "
            f"{_shown(start)}: it was trained beside a changed base model",
            next_step="export it with PEFT's path_initial_model_for_weight_conversion",
        )
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"{path}: {key}: {_shown(value)} is not served: only plain LoRA is",
                next_step="merge the adapter into its model, or train one without it",
            )
    return config


def _pairs(
    path: Path,
    config: Mapping[str, Any],
    header: Mapping[str, tuple[str, tuple[int, ...]]],
    spec: DecoderSpec,
) -> tuple[LoraPair, ...]:
    """In the order of layers and products. Raises one CheckpointError that counts all that does not fit."""
    sites = lora_sites(spec)
    scales = _Scales(path.parent / CONFIG, config)
    problems: list[str] = []
    modules: dict[str, str] = {}  # name in a checkpoint -> in this file
    for name, (dtype, _) in header.items():
        key = DOWN if name.endswith(DOWN) else UP
        module = name.removesuffix(key)
        ours = module.removeprefix(_PREFIX)
        if not name.endswith(key) or ours == module:
            problems.append(f"{name}: expected {_PREFIX}...{DOWN} or {UP}")
        elif ours not in sites:
            problems.append(f"{name}: {_why_not(ours, spec)}")
        elif dtype not in _FLOATS:
            problems.append(f"{name}: dtype expected one of {', '.join(_FLOATS)}, got {dtype}")
        else:
            modules[ours] = module
    pairs: list[LoraPair] = []
    for name, site in sites.items():
        if name in modules:
            rank = _rank(modules[name], site, header, problems)
            scale = scales.of(name, rank, problems) if rank else 0.0
            pairs.append(LoraPair(module=modules[name], site=site, rank=rank, scale=scale))
    if not pairs and not problems:
        problems.append("no tensor at all")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: does not fit a {spec.family} of {spec.num_layers} layers: {'; '.join(problems[:3])}{more}",
            next_step="name an adapter that was trained for this very model, on its attention or dense layers",
        )
    return tuple(pairs)


def _rank(
    module: str,
    site: LoraSite,
    header: Mapping[str, tuple[str, tuple[int, ...]]],
    problems: list[str],
) -> int:
    """Of a pair whose shapes fit; 0: they do not."""
    if module + DOWN not in header or module + UP not in header:
        problems.append(f"{module}: expected lora_A and lora_B, one is missing")
        return 0
    down, up = header[module + DOWN][1], header[module + UP][1]
    rank = down[0] if len(down) == 2 else 0
    if (
        not 1 <= rank <= _MAX_RANK
        or down != (rank, site.num_inputs)
        or up != (site.num_outputs, rank)
    ):
        problems.append(
            f"{module}: shapes expected (r, {site.num_inputs}) and ({site.num_outputs}, r) with r of 1 to "
            f"{_MAX_RANK}, got {down} and {up}"
        )
        return 0
    return rank


class _Scales:
    """alpha / r of each layer, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); patterns name layers by their ends."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._rank, self._alpha = config.get("r"), config.get("lora_alpha")
        if type(self._rank) is not int or not 1 <= self._rank <= _MAX_RANK:
            raise CheckpointError(
                f"{path}: r: expected a number of 1 to {_MAX_RANK}, got {_shown(self._rank)}"
            )
        self._check_alpha("lora_alpha", self._alpha)
        is_root = config.get("use_rslora", False)
        if is_root is not None and not isinstance(is_root, bool):
            raise CheckpointError(f"{path}: use_rslora: expected a bool, got {_shown(is_root)}")
        self._is_root = bool(is_root)
        self._ranks = self._pattern("rank_pattern", config)
        self._alphas = self._pattern("alpha_pattern", config)
        for name, alpha in self._alphas.items():
            self._check_alpha(f"alpha_pattern of {name}", alpha)

    def of(self, name: str, rank: int, problems: list[str]) -> float:
        wanted = _by_end(self._ranks, name, self._rank)
        if rank != wanted:
            problems.append(f"{name}: rank expected {_shown(wanted)} from {CONFIG}, got {rank}")
        alpha = float(_by_end(self._alphas, name, self._alpha))
        return alpha / (math.sqrt(rank) if self._is_root else rank)

    def _check_alpha(self, key: str, alpha: object) -> None:
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(float(alpha)) < 1e9:  # type: ignore[arg-type]
            raise CheckpointError(f"{self._path}: {key}: expected a number, got {_shown(alpha)}")

    def _pattern(self, key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{self._path}: {key}: expected an object, got {_shown(pattern)}")
        for name in pattern:
            if not name.replace(".", "_").isidentifier():
                raise CheckpointError(
                    f"{self._path}: {key}: expected names of layers, got {_shown(name)}",
                    next_step="write each layer's name instead of a regular expression",
                )
        return pattern


def _by_end(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Of the first key that is the name or its end, in whole words: as PEFT's `(.*\\.)?key$`."""
    return next(
        (value for key, value in pattern.items() if f".{name}".endswith(f".{key}")), default
    )


def _why_not(name: str, spec: DecoderSpec) -> str:
    last = name.rpartition(".")[2]
    head, _, rest = name.removeprefix("model.layers.").partition(".")
    if head.isdecimal() and int(head) >= spec.num_layers:
        return f"expected layers of 0 to {spec.num_layers - 1}, got {head}"
    if "expert" in rest or rest.startswith("block_sparse_moe"):
        return "adapters of experts are not served"
    if rest == "mlp.gate" or last == "router":
        return "adapters of routers are not served"
    if last in ("embed_tokens", "lm_head"):
        return "adapters of embeddings and heads are not served"
    return "this model has no such layer"


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _shown(value: object) -> str:
    return repr(value)[:80]
