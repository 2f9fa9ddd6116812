"""Sizes and switches of one mixture-of-experts layer, and how a Hugging Face config says them. Called by `models.moe`.

Reads a mapping, no file. Knows no tensor but dtypes' names. A family that is not in `FAMILIES` is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.models.router import GroupScore, RouterSpec, Score

Config = Mapping[str, Any]  # config.json


class Activation(StrEnum):
    """What the gate of an expert goes through."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


ACTIVATIONS = {  # Hugging Face's `hidden_act`
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """How gate and up become one: activation(gate) * up.

    With `limit` (GPT-OSS): gate <= limit, |up| <= limit, and gate * sigmoid(alpha * gate) * (up + 1).
    """

    activation: Activation = Activation.SILU
    limit: float | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.limit is not None and self.activation is not Activation.SILU:
            raise ValueError(f"a clamped gate is a SiLU's, not a {self.activation}'s")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """One layer. `shared_inner` 0: no shared expert; `is_shared_gated`: a sigmoid says how much of it (Qwen2-MoE)."""

    family: str
    layer: int
    width: int
    inner: int
    router: RouterSpec
    gate: GateSpec = GateSpec()
    has_expert_bias: bool = False
    shared_inner: int = 0
    is_shared_gated: bool = False


def moe_spec(config: Config, layer: int) -> MoeSpec | None:
    """The layer's experts; None: it is dense, in a model with experts or without.

    Raises CheckpointError for experts that we do not know, and for sizes that do not fit together.
    """
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        names = [name for name in NUM_EXPERTS if config.get(name)]
        if names:
            raise CheckpointError(
                f"config.json: model_type {family!r} has {config[names[0]]} experts ({names[0]}), "
                f"and how it routes to them is not known here; known: {', '.join(FAMILIES)}",
                next_step="serve a model of one of these families",
            )
        return None
    if _is_dense(config, layer):
        return None
    try:
        return FAMILIES[family](config, layer)
    except ValueError as error:
        raise CheckpointError(
            f"config.json of {family}, layer {layer}: {error}",
            next_step="compare config.json with the one that the model was published with",
        ) from error


NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_REQUIRED = object()


def _is_dense(config: Config, layer: int) -> bool:
    """first_k_dense_replace is DeepSeek's way, the other two are Qwen's."""
    if layer < (config.get("first_k_dense_replace") or 0):
        return True
    if layer in (config.get("mlp_only_layers") or ()):
        return True
    if any(config.get(name) == 0 for name in NUM_EXPERTS):
        return True
    return bool((layer + 1) % (config.get("decoder_sparse_step") or 1))


def _int(config: Config, *names: str, default: int | None = None) -> int:
    """The first of these fields that is set."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a number >= 0, is {value!r}")
            return value
    if default is None:
        raise ValueError(f"{' or '.join(names)} is missing")
    return default


def _float(config: Config, name: str, *, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, is {value!r}")
    return float(value)


def _flag(config: Config, name: str, *, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, is {value!r}")
    return value


def _gate(config: Config) -> GateSpec:
    name = config.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return GateSpec(activation=ACTIVATIONS[name])


def _mixtral(config: Config, layer: int) -> MoeSpec:
    return MoeSpec(
        family="mixtral",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=_int(config, "intermediate_size"),
        gate=_gate(config),
        router=RouterSpec(
            num_experts=_int(config, *NUM_EXPERTS, default=8),
            top_k=_int(config, "num_experts_per_tok", default=2),
            is_normalised=True,
        ),
    )


def _softmax_router(config: Config, *, num_experts: int, top_k: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_int(config, *NUM_EXPERTS, default=num_experts),
        top_k=_int(config, "num_experts_per_tok", default=top_k),
        is_normalised=_flag(config, "norm_topk_prob", default=False),
    )


def _qwen2(config: Config, layer: int) -> MoeSpec:
    return MoeSpec(
        family="qwen2_moe",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=_int(config, "moe_intermediate_size", default=1408),
        gate=_gate(config),
        router=_softmax_router(config, num_experts=60, top_k=4),
        shared_inner=_int(config, "shared_expert_intermediate_size", default=5632),
        is_shared_gated=True,
    )


def _qwen3(config: Config, layer: int) -> MoeSpec:
    return MoeSpec(
        family="qwen3_moe",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=_int(config, "moe_intermediate_size", default=768),
        gate=_gate(config),
        router=_softmax_router(config, num_experts=128, top_k=8),
    )


def _olmoe(config: Config, layer: int) -> MoeSpec:
    return MoeSpec(
        family="olmoe",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=_int(config, "intermediate_size"),
        gate=_gate(config),
        router=_softmax_router(config, num_experts=64, top_k=8),
    )


def _deepseek_v2(config: Config, layer: int) -> MoeSpec:
    method = config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {method!r} is not greedy or group_limited_greedy")
    if _flag(config, "norm_topk_prob", default=False):
        # the published code normalises without scaling, transformers does neither: no model was published with it
        raise ValueError("norm_topk_prob true has no agreed meaning for deepseek_v2")
    is_grouped = method == "group_limited_greedy"
    inner = _int(config, "moe_intermediate_size")
    return MoeSpec(
        family="deepseek_v2",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=inner,
        gate=_gate(config),
        router=RouterSpec(
            num_experts=_int(config, *NUM_EXPERTS, default=64),
            top_k=_int(config, "num_experts_per_tok"),
            num_groups=_int(config, "n_group") if is_grouped else 1,
            num_top_groups=_int(config, "topk_group") if is_grouped else 1,
            scale=_float(config, "routed_scaling_factor", default=1.0),
            is_float32=True,
        ),
        shared_inner=inner * _int(config, "n_shared_experts", default=2),
    )


def _sigmoid(family: str) -> Callable[[Config, int], MoeSpec]:
    """DeepSeek-V3 and those that route as it does; what differs is what an absent field means."""
    groups, top_groups, scale, is_normalised = {
        "deepseek_v3": (8, 4, 2.5, True),
        "glm4_moe": (1, 1, 1.0, True),
        "dots1": (1, 1, 1.0, False),
    }[family]

    def read(config: Config, layer: int) -> MoeSpec:
        inner = _int(config, "moe_intermediate_size")
        return MoeSpec(
            family=family,
            layer=layer,
            width=_int(config, "hidden_size"),
            inner=inner,
            gate=_gate(config),
            router=RouterSpec(
                num_experts=_int(config, "n_routed_experts", "num_local_experts", "num_experts"),
                top_k=_int(config, "num_experts_per_tok", default=8),
                score=Score.SIGMOID,
                num_groups=_int(config, "n_group", default=groups),
                num_top_groups=_int(config, "topk_group", default=top_groups),
                group_score=GroupScore.TOP2_SUM,
                is_normalised=_flag(config, "norm_topk_prob", default=is_normalised),
                normalise_epsilon=1e-20,
                scale=_float(config, "routed_scaling_factor", default=scale),
                has_correction=True,
                is_float32=True,
            ),
            shared_inner=inner * _int(config, "n_shared_experts", default=1),
        )

    return read


def _gpt_oss(config: Config, layer: int) -> MoeSpec:
    limit = _float(config, "swiglu_limit", default=7.0)
    return MoeSpec(
        family="gpt_oss",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=_int(config, "intermediate_size"),
        gate=GateSpec(limit=limit, alpha=_float(config, "swiglu_alpha", default=1.702)),
        router=RouterSpec(
            num_experts=_int(config, *NUM_EXPERTS, default=128),
            top_k=_int(config, "num_experts_per_tok", "experts_per_token", default=4),
            score=Score.NONE,
            is_softmax_after=True,
            has_bias=True,
        ),
        has_expert_bias=True,
    )


def _granite(config: Config, layer: int) -> MoeSpec:
    return MoeSpec(
        family="granitemoe",
        layer=layer,
        width=_int(config, "hidden_size"),
        inner=_int(config, "intermediate_size"),
        gate=_gate(config),
        router=RouterSpec(
            num_experts=_int(config, *NUM_EXPERTS, default=8),
            top_k=_int(config, "num_experts_per_tok", default=2),
            score=Score.NONE,
            is_softmax_after=True,
        ),
    )


FAMILIES: Mapping[str, Callable[[Config, int], MoeSpec]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _sigmoid("deepseek_v3"),
    "glm4_moe": _sigmoid("glm4_moe"),
    "dots1": _sigmoid("dots1"),
    "gpt_oss": _gpt_oss,
    "granitemoe": _granite,
}
