"""Vision loading: a Hugging Face folder of a model that sees -> a VisionLanguage and how it reads pictures.

Called where `decoder_load` is, for the families of `vision_spec`. As there: no code from a folder runs, and everything is
checked from headers before a weight is mapped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ganglion.errors import CheckpointError
from ganglion.models.decoder import Decoder
from ganglion.models.decoder_load import (
    Header,
    Progress,
    TensorReader,
    fill_decoder,
    folder_version,
    generation_eos,
    match_tensors,
)
from ganglion.models.decoder_targets import Source, Target, decoder_targets
from ganglion.models.vision import VisionLanguage
from ganglion.models.vision_pixels import RULES_FILE, PixelRules, read_pixel_rules
from ganglion.models.vision_spec import VisionSpec, read_text_spec, read_vision_spec
from ganglion.models.vision_text import Sight, VisionTokenizer
from ganglion.models.vision_tower import VisionTower, num_tile_tokens
from ganglion.models.weights import promised, read_header
from ganglion.plan.headers import CONFIG_FILE, read_config, weight_files

_TEXT, _VISION = "model.text_model.", "model.vision_model."
_LAYER = {  # ours -> theirs; query, key and value are one of ours
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "out": "self_attn.out_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}


def load_vision_language(
    folder: Path,
    *,
    dtype: torch.dtype,
    name: str,
    max_page_bytes: int = 1 << 20,
    on_progress: Progress | None = None,
) -> VisionLanguage:
    """The model in `folder`, computing in `dtype`, its pages called after `name`.

    Raises CheckpointError for a folder that cannot be served: the file or key, what was expected, what is there.
    """
    outline = _outline(folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes)
    reader = TensorReader(outline.places, outline.headers, on_progress)
    _fill_tower(outline.tower, outline.tower_targets, reader)
    fill_decoder(outline.decoder, outline.text_targets, {}, reader)
    for part in (outline.tower, outline.decoder):
        part.eval().requires_grad_(requires_grad=False)
    return outline.model


def outline_vision_language(
    folder: Path, *, dtype: torch.dtype, name: str, max_page_bytes: int = 1 << 20
) -> VisionLanguage:
    """The same model, checked as far as headers go, its weights only promised."""
    return _outline(folder, dtype=dtype, name=name, max_page_bytes=max_page_bytes).model


def read_sight(folder: Path) -> Sight:
    """How the model in `folder` reads pictures. Raises CheckpointError for rules that do not fit its tower."""
    spec = read_vision_spec(read_config(folder), source=str(folder / CONFIG_FILE))
    rules = read_pixel_rules(folder)
    _check_tiles(folder, spec, rules)
    return Sight(
        rules,
        tile_tokens=num_tile_tokens(spec, rules.tile_px),
        image_token_id=spec.image_token_id,
    )


def read_vision_tokenizer(folder: Path, *, vocab_size: int) -> VisionTokenizer:
    """The tokenizer of a model of `vocab_size` tokens that sees. Raises CheckpointError for files that do not fit it."""
    text = read_text_spec(read_config(folder), source=str(folder / CONFIG_FILE))
    return VisionTokenizer.load(
        folder, read_sight(folder), vocab_size=vocab_size, max_tokens=text.max_tokens
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outline:
    """Decoder and tower whose weights are promised, and where they are."""

    decoder: Decoder
    tower: VisionTower
    model: VisionLanguage
    text_targets: Mapping[str, Target]
    tower_targets: Mapping[str, Target]
    places: Mapping[str, Path]
    headers: Mapping[Path, Header]


def _outline(folder: Path, *, dtype: torch.dtype, name: str, max_page_bytes: int) -> _Outline:
    config, source = read_config(folder), str(folder / CONFIG_FILE)
    text = read_text_spec(config, source=source, eos_ids=generation_eos(folder))
    spec, rules = read_vision_spec(config, source=source), read_pixel_rules(folder)
    _check_tiles(folder, spec, rules)
    shards = weight_files(folder)
    headers = {path: read_header(path) for path in shards}
    text_targets = {ours: _renamed(target) for ours, target in decoder_targets(text).items()}
    tower_targets = _tower_targets(spec)
    expected = {
        tensor.name: (tensor.shape, False)
        for targets in (text_targets, tower_targets)
        for target in targets.values()
        for tensor in target.sources
    }
    places = match_tensors(folder, text, expected, headers)
    with promised():
        decoder = Decoder(
            text,
            name=name,
            version=folder_version(folder, shards),
            dtype=dtype,
            max_page_bytes=max_page_bytes,
        )
        tower = VisionTower(
            spec,
            torch.from_numpy(rules.levels()),
            tile_px=rules.tile_px,
            name=name,
            dtype=dtype,
            max_page_bytes=max_page_bytes,
        )
    served = replace(decoder.spec, family=spec.family, has_vision=True)
    return _Outline(
        decoder=decoder,
        tower=tower,
        model=VisionLanguage(decoder, tower, spec=served),
        text_targets=text_targets,
        tower_targets=tower_targets,
        places=places,
        headers=headers,
    )


def _check_tiles(folder: Path, spec: VisionSpec, rules: PixelRules) -> None:
    square_px = spec.patch_px * spec.shuffle
    if rules.tile_px % square_px:
        raise CheckpointError(
            f"{folder / RULES_FILE}: max_image_size: expected a multiple of {square_px}, which is "
            f"patch_size {spec.patch_px} x scale_factor {spec.shuffle}, got {rules.tile_px}",
            next_step="take config.json and preprocessor_config.json from the same model",
        )


def _renamed(target: Target) -> Target:
    """The decoder's tensors stand below `model.text_model` here; its head where it always does."""
    sources = tuple(
        Source(_TEXT + source.name.removeprefix("model."), source.shape)
        if source.name.startswith("model.")
        else source
        for source in target.sources
    )
    return Target(sources, target.shift)


def _tower_targets(spec: VisionSpec) -> dict[str, Target]:
    """Parameter name in VisionTower -> the tensors that fill it."""
    width, patch_px = spec.width, spec.patch_px
    embeddings = f"{_VISION}embeddings"
    patches = Source(f"{embeddings}.patch_embedding.weight", (width, 3, patch_px, patch_px))
    positions = Source(f"{embeddings}.position_embedding.weight", (spec.side**2, width))
    shuffled = width * spec.shuffle**2
    targets = {
        "patches.weight": Target((patches,)),
        "patches.bias": Target((Source(f"{embeddings}.patch_embedding.bias", (width,)),)),
        "positions": Target((positions,)),
        "connector.weight": Target(
            (Source("model.connector.modality_projection.proj.weight", (spec.out_width, shuffled)),)
        ),
    }
    for kind in ("weight", "bias"):
        targets[f"norm.{kind}"] = Target((Source(f"{_VISION}post_layernorm.{kind}", (width,)),))
    for layer in range(spec.num_layers):
        theirs = f"{_VISION}encoder.layers.{layer}"
        shapes: Mapping[str, tuple[int, ...]] = {
            "out": (width, width),
            "mlp_in": (spec.mlp_width, width),
            "mlp_out": (width, spec.mlp_width),
        }
        for ours, name in _LAYER.items():
            shape = shapes.get(ours, (width,))
            for kind, of_kind in (("weight", shape), ("bias", shape[:1])):
                targets[f"layers.{layer}.{ours}.{kind}"] = Target(
                    (Source(f"{theirs}.{name}.{kind}", of_kind),)
                )
        for kind, of_kind in (("weight", (width, width)), ("bias", (width,))):
            targets[f"layers.{layer}.qkv.{kind}"] = Target(
                tuple(Source(f"{theirs}.self_attn.{part}_proj.{kind}", of_kind) for part in "qkv")
            )
    return targets


def _fill_tower(tower: VisionTower, targets: Mapping[str, Target], reader: TensorReader) -> None:
    dtype = tower.positions.dtype
    for name, target in targets.items():
        owner, _, key = name.rpartition(".")
        module = tower.get_submodule(owner)
        parts = [reader.read(source.name) for source in target.sources]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if value.ndim == 4:  # a convolution whose steps are as wide as its kernel
            value = value.flatten(1)
        setattr(module, key, nn.Parameter(value.to(dtype), requires_grad=False))
        reader.report()
    left = [name for name, value in tower.named_parameters() if value.is_meta]
    assert not left, f"nothing fills {left}"
    tower.pack()
