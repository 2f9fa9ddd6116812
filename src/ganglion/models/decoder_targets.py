"""Decoder targets: which tensors of a checkpoint fill which parameter of Decoder. Called by `decoder_load`. Reads no file.

Names are those of Hugging Face's decoders; experts' are in `moe_load`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ganglion.models.decoder_spec import DecoderSpec, QkNorm
from ganglion.models.mla import MlaSpec


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


def decoder_targets(spec: DecoderSpec) -> dict[str, Target]:
    """Parameter name in Decoder -> what fills it, in a checkpoint of this spec's family; all but experts."""
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
        attention = _attention_targets(spec) if spec.mla is None else _latent_targets(spec.mla)
        parts = [_norm_targets(spec), attention]
        if spec.layers[layer].moe is None:
            parts.append(_mlp_targets(spec))
        for part in parts:
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


def _latent_targets(mla: MlaSpec) -> dict[str, Target]:
    """Names below `self_attn` are ours too."""
    query = mla.num_heads * (mla.nope_dim + mla.rope_dim)
    sizes = {  # name -> (high, low, has bias)
        "kv_a_proj_with_mqa": (mla.key_dim, mla.width, mla.has_bias),
        "kv_b_proj": (mla.num_heads * (mla.nope_dim + mla.value_dim), mla.kv_rank, False),
        "o_proj": (mla.width, mla.num_heads * mla.value_dim, mla.has_bias),
    }
    norms = {"kv_a_layernorm": mla.kv_rank}
    if mla.q_rank is None:
        sizes["q_proj"] = (query, mla.width, False)
    else:
        sizes["q_a_proj"] = (mla.q_rank, mla.width, mla.has_bias)
        sizes["q_b_proj"] = (query, mla.q_rank, False)
        norms["q_a_layernorm"] = mla.q_rank
    targets: dict[str, Target] = {}
    for key, (high, low, has_bias) in sizes.items():
        targets |= _affine(f"attention.{key}", "self_attn", {key: high}, low, has_bias=has_bias)
    for key, size in norms.items():
        targets[f"attention.{key}.weight"] = Target((Source(f"self_attn.{key}.weight", (size,)),))
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
