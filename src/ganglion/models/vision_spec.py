"""Vision spec: what a Hugging Face config.json says of a model that sees (Idefics3, SmolVLM), as sizes of its tower.

Called by `vision_load` before a weight is touched, and by `vision_tower`. The decoder's part is `decoder_spec`'s. Knows no
tensor names and no picture files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.models.decoder_spec import ConfigReader, DecoderSpec, read_decoder_spec
from ganglion.models.moe_spec import Activation

FAMILIES = ("idefics3", "smolvlm")
_MAX_LAYERS = 4096
# What transformers means by a key that is left out: older folders write only what differs.
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSpec:
    """A SigLIP tower, and how its patches become tokens: `shuffle` x `shuffle` of them side by side, one linear map.

    `side`: patches in a row of the square picture that positions were trained for.
    """

    family: str
    width: int
    num_heads: int
    mlp_width: int
    num_layers: int
    norm_eps: float
    activation: Activation
    patch_px: int
    side: int
    shuffle: int
    out_width: int
    image_token_id: int

    @property
    def patch_values(self) -> int:
        """Numbers of one patch."""
        return 3 * self.patch_px**2


def is_vision(config: Mapping[str, Any]) -> bool:
    """Is this the config.json of a model that sees, of a family that is served natively?"""
    return config.get("model_type") in FAMILIES


def read_text_spec(
    config: Mapping[str, Any], *, source: str = "config.json", eos_ids: tuple[int, ...] = ()
) -> DecoderSpec:
    """The decoder inside. Raises CheckpointError as `read_decoder_spec`."""
    text = _part(config, "text_config", source)
    is_tied = config.get("tie_word_embeddings", False)
    given = {key: value for key, value in text.items() if value is not None}
    whole = {**_TEXT_DEFAULTS, **given, "tie_word_embeddings": is_tied}
    return read_decoder_spec(whole, source=f"{source}: text_config", eos_ids=eos_ids)


def read_vision_spec(config: Mapping[str, Any], *, source: str = "config.json") -> VisionSpec:
    """The tower. Raises CheckpointError for a key that has a senseless value, and for sizes that do not fit together."""
    top = ConfigReader(config, source)
    text = ConfigReader(_part(config, "text_config", source), f"{source}: text_config")
    reader = ConfigReader(_part(config, "vision_config", source), f"{source}: vision_config")
    image_px, patch_px = reader.size("image_size", 224), reader.size("patch_size", 32)
    spec = VisionSpec(
        family=str(config.get("model_type")),
        width=reader.size("hidden_size", 1152),
        num_heads=reader.size("num_attention_heads", 16),
        mlp_width=reader.size("intermediate_size", 3072),
        num_layers=reader.size("num_hidden_layers", 12, limit=_MAX_LAYERS),
        norm_eps=reader.number("layer_norm_eps", 1e-6),
        activation=reader.activation("hidden_act", "gelu_pytorch_tanh"),
        patch_px=patch_px,
        side=image_px // patch_px,
        shuffle=top.size("scale_factor", 2),
        out_width=text.size("hidden_size", _TEXT_DEFAULTS["hidden_size"]),
        image_token_id=top.integer("image_token_id", 128257),
    )
    if spec.width % spec.num_heads:
        raise CheckpointError(
            f"{reader.source}: hidden_size: expected a multiple of num_attention_heads = "
            f"{spec.num_heads}, got {spec.width}"
        )
    if reader.integer("num_channels", 3) != 3 or not spec.side:
        raise CheckpointError(
            f"{reader.source}: expected pictures of 3 channels and at least one patch, got "
            f"num_channels {reader.integer('num_channels', 3)}, image_size {image_px}, "
            f"patch_size {patch_px}"
        )
    return spec


def _part(config: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{source}: {key}: expected an object, got {type(value).__name__}",
            next_step="copy config.json again from where the model came from",
        )
    return value
