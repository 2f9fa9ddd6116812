"""Footprint: a language model's sizes, its weights by part, and what one token keeps. Called by cli's plan. Pure.

From config.json and tensor headers alone (`plan.headers`); any decoder that follows Hugging Face's names can be
planned, whether it can be served or not. Knows no machine.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.layout import DTYPE_BYTES
from ganglion.plan.headers import TensorHeader
from ganglion.units import MIB

MAX_PAGE_SLOTS = 16
MAX_PAGE_BYTES = 1 * MIB
_LARGEST = 1 << 24  # of any size in a config: far above every model, far below trouble


class Part(StrEnum):
    """What weights are for."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    FEED_FORWARD = "feed-forward"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared experts"
    ROUTER = "router"
    NORMS = "norms"
    HEAD = "output head"
    VISION = "vision"
    OTHER = "other"


# The first that is found in a tensor's name says what it is for.
_PARTS: tuple[tuple[str, Part], ...] = (
    (r"vision|visual|image|multi_modal|connector", Part.VISION),
    (r"shared_expert", Part.SHARED_EXPERTS),
    (r"\.experts\.", Part.EXPERTS),
    (r"(mlp|moe|feed_forward)\.(gate|router)\.|\.router\.", Part.ROUTER),
    (r"norm", Part.NORMS),
    (r"attn|attention", Part.ATTENTION),
    (r"mlp|feed_forward|\.ffn", Part.FEED_FORWARD),
    (r"embed|\bwte\b", Part.EMBEDDING),
    (r"lm_head|output\.weight", Part.HEAD),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageShape:
    """Sizes that decide cost. `window`: of the layers in `windowed`. `latent_dim`, `latent_value_dim`: MLA, else 0."""

    family: str
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_tokens: int
    ffn_width: int
    windowed: tuple[int, ...] = ()
    window: int = 0
    num_experts: int = 0
    num_active_experts: int = 0
    expert_width: int = 0
    num_moe_layers: int = 0
    latent_dim: int = 0
    latent_value_dim: int = 0
    is_head_tied: bool = False

    def kv_groups(self, dtype: str) -> tuple["KvGroupPlan", ...]:
        """Layers that keep the same bytes per token and drop them alike."""
        value_bytes = DTYPE_BYTES[dtype]
        numbers = self.latent_dim or 2 * self.num_kv_heads * self.head_dim
        full = self.num_layers - len(self.windowed)
        groups = (
            ("latent" if self.latent_dim else "kv", full, 0),
            ("kv-window", len(self.windowed), self.window),
        )
        return tuple(
            KvGroupPlan(
                name=name, num_layers=layers, layer_bytes=numbers * value_bytes, window=window
            )
            for name, layers, window in groups
            if layers
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroupPlan:
    """What one token keeps in one group of layers. `window` 0: for ever."""

    name: str
    num_layers: int
    layer_bytes: int
    window: int

    @property
    def token_bytes(self) -> int:
        """Of one token, all layers of the group."""
        return self.num_layers * self.layer_bytes

    @property
    def layers_per_page(self) -> int:
        """All, unless a single slot of all would not fit into a page."""
        return max(1, min(self.num_layers, MAX_PAGE_BYTES // self.layer_bytes))

    @property
    def slots(self) -> int:
        """Tokens of a page: the largest power of two that fits."""
        room = max(1, MAX_PAGE_BYTES // (self.layers_per_page * self.layer_bytes))
        return min(MAX_PAGE_SLOTS, 1 << (room.bit_length() - 1))

    @property
    def page_bytes(self) -> int:
        """Of one page."""
        return self.slots * self.layers_per_page * self.layer_bytes

    def held_tokens(self, num_tokens: int) -> int:
        """Of a sequence of `num_tokens`, those still kept."""
        return min(num_tokens, self.window) if self.window else num_tokens

    def num_pages(self, num_tokens: int) -> int:
        """Pages of one sequence. A window lies across one page more than it fills."""
        spans = -(-self.num_layers // self.layers_per_page)
        held = self.held_tokens(num_tokens)
        pages = -(-held // self.slots) + (1 if held < num_tokens else 0)
        return pages * spans

    def row_bytes(self, num_tokens: int, large_page_bytes: int) -> int:
        """Bytes of the arena that one sequence takes: pages are cut out of large ones, whose rest is lost."""
        per_large = max(1, large_page_bytes // self.page_bytes)
        return self.num_pages(num_tokens) * max(self.page_bytes, large_page_bytes // per_large)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWeights:
    """Weights of one part: `file_bytes` as stored, `served_bytes` in the dtype that they are computed in."""

    part: Part
    num_values: int
    file_bytes: int
    served_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All weights, by part, largest first."""

    parts: tuple[PartWeights, ...]

    @property
    def num_values(self) -> int:
        """Parameters."""
        return sum(part.num_values for part in self.parts)

    @property
    def file_bytes(self) -> int:
        """On disk."""
        return sum(part.file_bytes for part in self.parts)

    @property
    def served_bytes(self) -> int:
        """In memory."""
        return sum(part.served_bytes for part in self.parts)

    def values_of(self, part: Part) -> int:
        """Parameters of one part."""
        return sum(entry.num_values for entry in self.parts if entry.part is part)


def weigh(tensors: Iterable[TensorHeader], *, dtype: str) -> Weights:
    """Weights by part, served as `dtype`. Scales of quantised weights are bytes, not parameters."""
    totals: dict[Part, list[int]] = {}
    for tensor in tensors:
        total = totals.setdefault(part_of(tensor.name), [0, 0])
        total[0] += num_parameters(tensor)
        total[1] += tensor.num_bytes
    parts = [
        PartWeights(
            part=part,
            num_values=values,
            file_bytes=file_bytes,
            served_bytes=values * DTYPE_BYTES[dtype],
        )
        for part, (values, file_bytes) in totals.items()
    ]
    return Weights(parts=tuple(sorted(parts, key=lambda entry: -entry.served_bytes)))


def with_head_apart(weights: Weights) -> Weights:
    """A tied head that is laid out for the machine's matrix units is a second copy of the embedding."""
    (embedding,) = (part for part in weights.parts if part.part is Part.EMBEDDING)
    head = PartWeights(
        part=Part.HEAD, num_values=0, file_bytes=0, served_bytes=embedding.served_bytes
    )
    return Weights(parts=(*(part for part in weights.parts if part.part is not Part.HEAD), head))


def num_parameters(tensor: TensorHeader) -> int:
    """Parameters that a tensor stands for: two in a byte of 4-bit blocks, none in scales."""
    if tensor.name.endswith(("_scales", "weight_scale", "weight_scale_inv")):
        return 0
    return tensor.num_values * (2 if tensor.name.endswith("_blocks") else 1)


def part_of(name: str) -> Part:
    """What the tensor `name` is for."""
    for pattern, part in _PARTS:
        if re.search(pattern, name):
            return part
    return Part.OTHER


def read_shape(config: Mapping[str, Any], *, where: str) -> LanguageShape:
    """Sizes of a decoder from its config.json; of a multimodal one, its `text_config`.

    Raises CheckpointError naming the first size that is missing or no size. `where` stands in front.
    """
    inner = config.get("text_config")
    fields = _Fields({**config, **inner} if isinstance(inner, Mapping) else config, where)
    num_layers = fields.size("num_hidden_layers")
    width, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    rank = fields.size("kv_lora_rank", 0)
    window, windowed = _windows(fields, num_layers)
    num_experts = fields.size("num_local_experts", 0) or fields.size("num_experts", 0)
    num_experts = num_experts or fields.size("n_routed_experts", 0)
    ffn_width = fields.size("intermediate_size")
    return LanguageShape(
        family=str(config.get("model_type", "unknown")),
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", num_heads),
        head_dim=fields.size("head_dim", max(1, width // num_heads)),
        vocab_size=fields.size("vocab_size"),
        max_tokens=fields.size("max_position_embeddings", 2048),
        ffn_width=ffn_width,
        windowed=windowed,
        window=window,
        num_experts=num_experts,
        num_active_experts=fields.size("num_experts_per_tok") if num_experts else 0,
        expert_width=fields.size("moe_intermediate_size", ffn_width) if num_experts else 0,
        num_moe_layers=_num_moe_layers(fields, num_layers) if num_experts else 0,
        latent_dim=rank + fields.size("qk_rope_head_dim") if rank else 0,
        latent_value_dim=rank,
        is_head_tied=bool(config.get("tie_word_embeddings", fields.flag("tie_word_embeddings"))),
    )


class _Fields:
    """Checked access to a config's sizes."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where
        self.family = values.get("model_type")

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number; a missing one or null is the default, if there is one."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value <= _LARGEST or (default is None and not value):
            raise CheckpointError(
                f"{self._where}: {name}: expected a whole number up to {_LARGEST}, got {value!r}",
                next_step="name the folder of a decoder language model",
            )
        return value

    def flag(self, name: str) -> bool:
        """False where it is missing."""
        return bool(self._values.get(name, False))

    def sizes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; none where it is missing."""
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise CheckpointError(f"{self._where}: {name}: expected a list of whole numbers")
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of text; None where it is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{self._where}: {name}: expected a list of text")
        return tuple(value)


def _windows(fields: _Fields, num_layers: int) -> tuple[int, tuple[int, ...]]:
    """The window and the layers that have it: as `layer_types` says, else as the family's rule says."""
    window = fields.size("sliding_window", 0)
    kinds = fields.texts("layer_types")
    if not window:
        return 0, ()
    if kinds is not None:
        if len(kinds) != num_layers:
            raise CheckpointError(
                f"layer_types: expected {num_layers} entries, got {len(kinds)}",
                next_step="num_hidden_layers and layer_types must agree",
            )
        windowed = [at for at, kind in enumerate(kinds) if kind == "sliding_attention"]
    elif fields.family in ("mistral", "mixtral"):
        windowed = list(range(num_layers))
    elif fields.family in ("gemma2", "gpt_oss"):
        windowed = list(range(0, num_layers, 2))
    elif fields.family in ("gemma3", "gemma3_text"):
        cycle = max(1, fields.size("sliding_window_pattern", 6))
        windowed = [at for at in range(num_layers) if (at + 1) % cycle]
    elif fields.flag("use_sliding_window"):
        windowed = list(range(min(num_layers, fields.size("max_window_layers", 28)), num_layers))
    else:
        windowed = []
    return (window if windowed else 0), tuple(windowed)


def _num_moe_layers(fields: _Fields, num_layers: int) -> int:
    step = max(1, fields.size("decoder_sparse_step", 1))
    dense = set(fields.sizes("mlp_only_layers")) | set(
        range(fields.size("first_k_dense_replace", 0))
    )
    return sum(1 for at in range(num_layers) if at not in dense and (at + 1) % step == 0)
