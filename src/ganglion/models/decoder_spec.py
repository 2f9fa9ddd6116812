"""Decoder spec: what a Hugging Face config.json says of a decoder, as switches that the model reads.

Called by `decoder_load` before a weight is touched, and by `decoder`. Knows the families' config keys and defaults (old
spellings and those of transformers 5); knows no tensor names.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.models.mla import MlaSpec, mla_spec
from ganglion.models.moe_spec import ACTIVATIONS, NUM_EXPERTS, Activation, MoeSpec, moe_spec
from ganglion.models.rotary import RopeKind, RopeSpec, yarn_amplitude

_MAX_SIZE = 1 << 24  # above it a number in a config is damage, not a size
_MAX_COUNT = 4096  # the same of layers, and of experts in one


class QkNorm(StrEnum):
    """Over what queries and keys are normalised before they are rotated."""

    NONE = "none"
    HEAD = "head"  # each head by itself
    ALL = "all"  # all heads side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs from layer to layer. `rope` None: positions are not seen here. `moe` None: dense."""

    window: int | None
    rope: RopeSpec | None
    moe: MoeSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """One decoder."""

    family: str
    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    layers: tuple[LayerSpec, ...]
    max_tokens: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    eos_ids: tuple[int, ...]
    is_tied: bool
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_sinks: bool = False
    has_post_norms: bool = False  # a norm after attention and after the feed-forward layer too
    qk_norm: QkNorm = QkNorm.NONE
    qkv_clip: float | None = None
    norm_shift: float = 0.0  # Gemma stores weights of norms minus one
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    mla: MlaSpec | None = None  # latent attention; then sizes of heads and the scale are its own
    num_extra_layers: int = 0  # stored behind the last; they predict further tokens: not served

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)


def read_decoder_spec(
    config: Mapping[str, Any], *, source: str = "config.json", eos_ids: tuple[int, ...] = ()
) -> DecoderSpec:
    """The spec of a config.json; `eos_ids` (from generation_config.json) win over the config's own.

    Raises CheckpointError for an architecture that is not supported, naming the nearest that is, and for a key that is
    missing or has a senseless value.
    """
    reader = ConfigReader(config, source)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise unsupported(
            source, config, next_step=f"serve a model of one of: {', '.join(FAMILIES)}"
        )
    for key in NUM_EXPERTS:
        if config.get(key) is not None:
            reader.size(key, limit=_MAX_COUNT)
    quantised = config.get("quantization_config")
    is_packed_fp4 = isinstance(quantised, Mapping) and quantised.get("quant_method") == "mxfp4"
    if quantised is not None and not (family == "gpt_oss" and is_packed_fp4):
        raise CheckpointError(
            f"{source}: quantization_config: expected none, got weights stored as "
            f"{_named(quantised)}",
            next_step="use the folder with the unquantised weights (bfloat16 or float32)",
        )
    spec = FAMILIES[str(family)](reader, _read_common(str(family), reader, eos_ids))
    layers = tuple(
        replace(layer, moe=moe_spec(config, index)) for index, layer in enumerate(spec.layers)
    )
    spec = replace(spec, layers=layers)
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"{source}: num_attention_heads: expected a multiple of num_key_value_heads = "
            f"{spec.num_kv_heads}, got {spec.num_heads}"
        )
    return spec


def _read_common(family: str, reader: "ConfigReader", eos_ids: tuple[int, ...]) -> DecoderSpec:
    width, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.size("head_dim", width // num_heads)
    max_tokens = reader.size("max_position_embeddings")
    rope = read_rope(reader, reader.rope_parameters(), head_dim, max_tokens)
    return DecoderSpec(
        family=family,
        vocab_size=reader.size("vocab_size"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=reader.size("num_key_value_heads", num_heads),
        head_dim=head_dim,
        mlp_width=reader.size("intermediate_size"),
        layers=(LayerSpec(window=None, rope=rope),)
        * reader.size("num_hidden_layers", limit=_MAX_COUNT),
        max_tokens=max_tokens,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=reader.activation("hidden_act", "silu"),
        attention_scale=head_dim**-0.5,
        eos_ids=eos_ids or reader.token_ids("eos_token_id"),
        is_tied=reader.flag("tie_word_embeddings", default=False),
    )


def _llama(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    has_bias = reader.flag("attention_bias", default=False)
    return replace(
        spec,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=reader.flag("mlp_bias", default=False),
    )


def _mistral(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    # configs of transformers before 4.34 leave the key out and mean its default then
    return _windowed(spec, [True] * spec.num_layers, reader.window("sliding_window", 4096))


def _qwen2(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    return replace(_qwen_windows(reader, spec), has_qkv_bias=True)


def _qwen3(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    spec = _llama(reader, _qwen_windows(reader, spec))
    return replace(spec, has_mlp_bias=False, qk_norm=QkNorm.HEAD)


def _qwen_windows(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    if not reader.flag("use_sliding_window", default=False):
        return spec
    first = reader.integer("max_window_layers", 28)
    is_windowed = reader.windowed_layers([layer >= first for layer in range(spec.num_layers)])
    return _windowed(spec, is_windowed, reader.window("sliding_window", 4096))


def _gemma2(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    is_windowed = reader.windowed_layers([layer % 2 == 0 for layer in range(spec.num_layers)])
    return _gemma(reader, _windowed(spec, is_windowed, reader.window("sliding_window", 4096)))


def _gemma3(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    cycle = reader.size("sliding_window_pattern", reader.size("_sliding_window_pattern", 6))
    is_windowed = reader.windowed_layers(
        [(layer + 1) % cycle != 0 for layer in range(spec.num_layers)]
    )
    nested = reader.config.get("rope_parameters")
    if isinstance(nested, Mapping) and "full_attention" in nested:
        full, local = nested["full_attention"], nested.get("sliding_attention") or {}
    else:
        full = {**reader.rope_parameters(), "rope_theta": reader.number("rope_theta", 1e6)}
        local = {"rope_theta": reader.number("rope_local_base_freq", 1e4)}
    ropes = [
        read_rope(reader, parameters, spec.head_dim, spec.max_tokens)
        for parameters in (full, local)
    ]
    spec = _windowed(spec, is_windowed, reader.window("sliding_window", 4096))
    layers = tuple(
        replace(layer, rope=ropes[is_local])
        for layer, is_local in zip(spec.layers, is_windowed, strict=True)
    )
    # attention here has no softcap, whatever the config says: neither has the model it was read from
    spec = _gemma(reader, replace(spec, layers=layers))
    return replace(spec, qk_norm=QkNorm.HEAD, attention_softcap=None)


def _gemma(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    if reader.config.get("use_bidirectional_attention"):
        raise CheckpointError(
            f"{reader.source}: use_bidirectional_attention: expected false, got true",
            next_step="only causal decoders are served: use the folder of the text model",
        )
    has_bias = reader.flag("attention_bias", default=False)
    is_gemma2 = spec.family == "gemma2"
    return replace(
        spec,
        activation=reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        is_tied=reader.flag("tie_word_embeddings", default=True),
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_post_norms=True,
        norm_shift=1.0,
        embedding_scale=math.sqrt(spec.width),
        attention_softcap=reader.optional("attn_logit_softcapping", 50.0 if is_gemma2 else None),
        logit_softcap=reader.optional("final_logit_softcapping", 30.0 if is_gemma2 else None),
    )


def _mixtral(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    window = reader.window("sliding_window", 4096) if "sliding_window" in reader.config else None
    return _windowed(spec, [True] * spec.num_layers, window)


def _qwen2_moe(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    has_bias = reader.flag("qkv_bias", default=True)
    if reader.flag("use_sliding_window", default=False):
        last = reader.integer("max_window_layers", 28)
        is_windowed = reader.windowed_layers(
            [layer % 2 == 0 and layer < last for layer in range(spec.num_layers)]
        )
        spec = _windowed(spec, is_windowed, reader.window("sliding_window", 4096))
    return replace(spec, has_qkv_bias=has_bias)


def _qwen3_moe(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    if reader.flag("use_sliding_window", default=False):
        window = reader.window("sliding_window", 4096)
        spec = _windowed(spec, [True] * spec.num_layers, window)
    return replace(_llama(reader, spec), has_mlp_bias=False, qk_norm=QkNorm.HEAD)


def _olmoe(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    return replace(
        _llama(reader, spec),
        has_mlp_bias=False,
        qk_norm=QkNorm.ALL,
        qkv_clip=reader.optional("clip_qkv", None),
    )


def _gpt_oss(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    is_windowed = reader.windowed_layers([layer % 2 == 0 for layer in range(spec.num_layers)])
    spec = _windowed(spec, is_windowed, reader.window("sliding_window", 128))
    has_bias = reader.flag("attention_bias", default=True)
    return replace(spec, has_qkv_bias=has_bias, has_out_bias=has_bias, has_sinks=True)


def _deepseek(reader: "ConfigReader", spec: DecoderSpec) -> DecoderSpec:
    mla = mla_spec(reader.config)
    assert mla is not None, f"{spec.family} has latent attention"
    rope = read_rope(reader, reader.rope_parameters(), mla.rope_dim, spec.max_tokens)
    return replace(
        spec,
        layers=tuple(replace(layer, rope=rope) for layer in spec.layers),
        mla=mla,
        num_kv_heads=1,
        head_dim=mla.nope_dim + mla.rope_dim,
        attention_scale=mla.scale,
        has_mlp_bias=reader.flag("mlp_bias", default=False),
        num_extra_layers=reader.integer("num_nextn_predict_layers", 0),
    )


def _windowed(spec: DecoderSpec, is_windowed: list[bool], window: int | None) -> DecoderSpec:
    layers = tuple(
        replace(layer, window=window if flag else None)
        for layer, flag in zip(spec.layers, is_windowed, strict=True)
    )
    return replace(spec, layers=layers)


FAMILIES: dict[str, Callable[["ConfigReader", DecoderSpec], DecoderSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}


def read_rope(
    reader: "ConfigReader", parameters: Mapping[str, Any], head_dim: int, max_tokens: int
) -> RopeSpec:
    """One set of rotary parameters, as config.json has them."""
    own = ConfigReader(parameters, f"{reader.source}: rope_parameters")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    share = own.number("partial_rotary_factor", reader.number("partial_rotary_factor", 1.0))
    rope = RopeSpec(
        dim=int(head_dim * share),
        theta=own.number("rope_theta", reader.number("rope_theta", 10000.0)),
    )
    # "dynamic" stretches only beyond max_position_embeddings, and no request is longer than that
    if kind in ("default", "dynamic", "mrope"):
        return rope
    if kind not in list(RopeKind):
        raise CheckpointError(
            f"{own.source}: rope_type: expected one of {', '.join(RopeKind)}, dynamic, got {kind!r}",
            next_step="serve a model of the family whose positions are of a supported type",
        )
    original = own.size("original_max_position_embeddings", max_tokens)
    factor = own.number("factor", max_tokens / original)
    rope = replace(rope, kind=RopeKind(kind), factor=factor, original_max_tokens=original)
    if kind == RopeKind.LLAMA3:
        return replace(
            rope,
            low_freq_factor=own.number("low_freq_factor", 1.0),
            high_freq_factor=own.number("high_freq_factor", 4.0),
        )
    if kind == RopeKind.LINEAR:
        return rope
    mscale, mscale_all = own.optional("mscale", None), own.optional("mscale_all_dim", None)
    if mscale and mscale_all:
        amplitude = yarn_amplitude(factor, mscale) / yarn_amplitude(factor, mscale_all)
    else:
        amplitude = yarn_amplitude(factor)
    return replace(
        rope,
        beta_fast=own.number("beta_fast", 32.0),
        beta_slow=own.number("beta_slow", 1.0),
        is_truncated=own.flag("truncate", default=True),
        amplitude=own.number("attention_factor", amplitude),
    )


class ConfigReader:
    """Typed look-ups in a config; a null counts as absent."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def size(self, key: str, default: int | None = None, *, limit: int = _MAX_SIZE) -> int:
        value = self.integer(key, default)
        if not 1 <= value <= limit:
            raise self._wrong(key, f"1..{limit}", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise self._wrong(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self._wrong(key, "a positive number", value)
        return float(value)

    def optional(self, key: str, default: float | None) -> float | None:
        """A number where null means that there is none; `default` where the key is absent."""
        if key in self.config and self.config[key] is None:
            return None
        return self.number(key, default) if key in self.config or default is not None else None

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self._wrong(key, "true or false", value)
        return value

    def window(self, key: str, default: int) -> int | None:
        if key in self.config and self.config[key] is None:
            return None
        return self.size(key, default)

    def windowed_layers(self, default: list[bool]) -> list[bool]:
        kinds = self.config.get("layer_types")
        if kinds is None:
            return default
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != len(default):
            raise self._wrong("layer_types", f"a list of {len(default)}", kinds)
        for kind in kinds:
            if kind not in known:
                raise self._wrong("layer_types", f"only {', '.join(known)}", kind)
        return [kind == known[0] for kind in kinds]

    def activation(self, key: str, default: str) -> Activation:
        value = self._value(key, default)
        if value not in ACTIVATIONS:
            raise self._wrong(key, f"one of {', '.join(ACTIVATIONS)}", value)
        return ACTIVATIONS[value]

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in ids):
            raise self._wrong(key, "a token id or a list of them", value)
        return tuple(ids)

    def rope_parameters(self) -> Mapping[str, Any]:
        value = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(value, Mapping):
            raise self._wrong("rope_parameters", "an object", value)
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self.source}: {key}: expected, but missing",
                next_step="copy config.json again from where the model came from",
            )
        return value

    def _wrong(self, key: str, expected: str, got: object) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key}: expected {expected}, got {_named(got)}")


def unsupported(source: str, config: Mapping[str, Any], *, next_step: str) -> CheckpointError:
    """The error for a family that nothing serves."""
    family = config.get("model_type")
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else family
    nearest = difflib.get_close_matches(str(family), FAMILIES, n=1, cutoff=0.0)[0]
    return CheckpointError(
        f"{source}: model_type: architecture {_named(architecture)} (model_type {_named(family)}) "
        f"is not supported; the nearest supported one is {nearest!r}",
        next_step=next_step,
    )


def _named(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
