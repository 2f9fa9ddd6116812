"""Survey: what a transformers module does between its layers, seen in one small plain pass. Called by `hf.load`.

The module runs as its authors wrote it, over a cache of transformers' own; hooks look on. What is found decides which
pages it needs, and its scores are what our passes are held to. Raises CheckpointError for what pages cannot stand for.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ganglion.errors import CheckpointError
from ganglion.models.hf.hooks import WINDOW
from ganglion.models.hf.seat import Seat

# what a module raises that does not bear its config, or a plain pass
ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    NotImplementedError,
    KeyError,
    IndexError,
)
_CACHE_NAMES = ("cache_params", "past_key_values", "past_key_value")
_UNDERSTOOD = {"scaling", "sliding_window", "softcap", "s_aux"}
_WITHOUT_EFFECT = {  # on what one token of a causal decoder sees, in a plain forward
    "dropout",
    "is_causal",
    "position_ids",
    "position_embeddings",
    "use_cache",
    "cache_position",
    "past_key_values",
    "layer_idx",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
    "input_ids",
    "is_first_iteration",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """One layer's attention. `dim`: of keys or values, whichever is more."""

    num_kv_heads: int
    dim: int
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """One tensor of a recurrent layer's state: `shape` without the row, and how its cache calls it."""

    is_conv: bool
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_numbers(self) -> int:
        """Of one row."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFacts:
    """One recurrent layer: the module that advances it, and how that one calls its cache."""

    mixer: nn.Module
    cache_name: str
    parts: tuple[StatePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """`logits`: [token, vocab], float32, of the tokens that it was made with. Facts by layer."""

    logits: Tensor
    attentions: dict[int, AttentionFacts]
    states: dict[int, StateFacts]


def survey(
    module: nn.Module, layers: Sequence[nn.Module], seat: Seat, token_ids: Tensor, *, source: str
) -> Survey:
    """Of a module whose layers and attention have their hooks in place. `source` names it in errors."""
    watch = _Watch(seat, source)
    config: Any = module.config
    cache = DynamicCache(config=config.get_text_config())
    seat.attend, seat.kv, seat.hidden = watch.attend, None, None
    seat.layers = range(len(layers))
    names = inspect.signature(module.forward).parameters
    cache_name = "cache_params" if "cache_params" in names else "past_key_values"
    try:
        made: Any = module(input_ids=token_ids[None], use_cache=True, **{cache_name: cache})
    except ERRORS as error:
        raise CheckpointError(
            f"{source}: {type(module).__name__} cannot be run over pages: {error}"
        ) from error
    finally:
        seat.attend = seat.hidden = None
        seat.layers = range(0)
    states: dict[int, StateFacts] = {}
    for index, of_layer in enumerate(cache.layers):
        if isinstance(of_layer, LinearAttentionCacheLayerMixin):
            parts = _parts(of_layer)
            if parts:
                states[index] = _state_facts(layers[index], watch.callers, parts, source)
    return Survey(logits=made.logits[0].float(), attentions=watch.facts, states=states)


class _Watch:
    """Attention computed plainly, and what was asked of it."""

    def __init__(self, seat: Seat, source: str) -> None:
        self._seat, self._source = seat, source
        self.facts: dict[int, AttentionFacts] = {}
        self.callers: set[int] = set()  # ids of modules

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """As `hf.seat.Attend`."""
        layer, name = self._seat.layer, type(module).__name__
        if layer in self.facts:
            raise CheckpointError(f"{self._source}: layer {layer} attends twice ({name})")
        unknown = sorted(
            key
            for key, option in options.items()
            if key not in _UNDERSTOOD | _WITHOUT_EFFECT and option is not None
        )
        if unknown:
            raise CheckpointError(
                f"{self._source}: {name} asks for attention with {', '.join(unknown)}, "
                "which pages do not know"
            )
        window = options.get("sliding_window") if mask is None else getattr(mask, WINDOW, None)
        self.callers.add(id(module))
        self.facts[layer] = AttentionFacts(
            num_kv_heads=key.shape[1], dim=max(key.shape[-1], value.shape[-1]), window=window
        )
        return _plain(query, key, value, mask, options)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    num_shared = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(num_shared, 1).float() for x in (key, value))
    scale, cap = options.get("scaling"), options.get("softcap")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = options.get("s_aux")
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = functional.softmax(scores, dim=-1)[..., : keys.shape[-2]]
    return (weights @ values).to(query.dtype).transpose(1, 2)


def _parts(of_layer: Any) -> tuple[StatePart, ...]:
    parts = []
    for is_conv, states in ((True, of_layer.conv_states), (False, of_layer.recurrent_states)):
        parts += [
            StatePart(is_conv=is_conv, index=index, shape=tuple(state.shape[1:]), dtype=state.dtype)
            for index, state in sorted(states.items())
            if state is not None
        ]
    return tuple(parts)


def _state_facts(
    layer: nn.Module, attending: set[int], parts: tuple[StatePart, ...], source: str
) -> StateFacts:
    """The module in `layer` that has the state: it takes a cache and does not attend."""
    found = []
    for part in layer.modules():
        if part is layer or id(part) in attending or not hasattr(part, "layer_idx"):
            continue
        names = inspect.signature(part.forward).parameters
        found += [(part, name) for name in _CACHE_NAMES if name in names][:1]
    # a module around the one that recurs takes the cache too
    found = [one for one in found if not any(_is_inside(other[0], one[0]) for other in found)]
    if len(found) != 1:
        raise CheckpointError(
            f"{source}: expected one recurrent module in {type(layer).__name__}, found {len(found)}"
        )
    return StateFacts(mixer=found[0][0], cache_name=found[0][1], parts=parts)


def _is_inside(part: nn.Module, whole: nn.Module) -> bool:
    return part is not whole and any(part is other for other in whole.modules())
