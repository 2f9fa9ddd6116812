"""HfLanguage: a LanguageModel over a transformers module. Made by `hf.load`, driven by the engine.

The module's own forward runs, with only some layers computing (`run`) or with none, from the last layer's output on
(`logits`). So whatever a family does before, between and after its layers is done by its own code. Attention and recurrent states go to pages. Dimension names: as in `models.language`.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ganglion.generation import LanguageSpec
from ganglion.models.hf.seat import Seat
from ganglion.models.language import KvGroup, KvSpace, StateGroup


def hand_through(layers: Sequence[nn.Module], seat: Seat) -> None:
    """From now on only layers that the seat names compute; the others hand on what the seat holds."""
    for index, layer in enumerate(layers):
        _wrap(layer, index, seat)


def _wrap(layer: nn.Module, index: int, seat: Seat) -> None:
    original: Callable[..., Any] = layer.forward
    tuple_size = 0  # of what it returns; 0: hidden states and no tuple

    def forward(*args: Any, **options: Any) -> Any:
        nonlocal tuple_size
        given: Tensor = args[0] if args else options.pop("hidden_states")
        if seat.hidden is None:
            seat.hidden = given
        if index not in seat.layers:
            return (seat.hidden, *[None] * (tuple_size - 1)) if tuple_size else seat.hidden
        seat.layer = index
        out = original(seat.hidden, *args[1:], **options)
        tuple_size = len(out) if isinstance(out, tuple) else 0
        seat.hidden = out[0] if tuple_size else out
        return out

    layer.forward = forward


class PagedAttention:
    """Attention of one pass: a `hf.seat.Attend` over the seat's pages."""

    def __init__(self, seat: Seat, dims: dict[int, int]) -> None:
        """`dims`: of each layer's pages."""
        self._seat, self._dims = seat, dims

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        kv, layer = self._seat.kv, self._seat.layer
        assert kv is not None, f"{type(module).__name__} attends outside of a pass"
        dim, value_dim = self._dims[layer], value.shape[-1]
        scale = options.get("scaling")
        out = kv.attend(
            layer,
            _filled(query, dim),
            _filled(key, dim),
            _filled(value, dim),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            sinks=options.get("s_aux"),
            softcap=options.get("softcap"),
        )
        return out[None, ..., :value_dim]


def _filled(x: Tensor, dim: int) -> Tensor:
    """[1, head, token, <= dim] -> [token, head, dim]: zeros change no score."""
    num_missing = dim - x.shape[-1]
    by_token = x[0].transpose(0, 1)
    return functional.pad(by_token, (0, num_missing)) if num_missing else by_token


class HfLanguage:
    """`module` is what has a head, `decoder` what has the layers; both have taken `seat`."""

    def __init__(
        self,
        module: nn.Module,
        decoder: nn.Module,
        seat: Seat,
        *,
        spec: LanguageSpec,
        groups: Sequence[KvGroup | StateGroup],
    ) -> None:
        self._module, self._decoder, self._seat = module, decoder, seat
        self._lock = threading.Lock()  # one pass at a time: a model may draft on another thread
        self._spec, self._groups = spec, tuple(groups)
        dims = {
            layer: group.layout.shape[-1]
            for group in groups
            if isinstance(group, KvGroup)
            for layer in group.layers
        }
        self._attend = PagedAttention(seat, dims)

    @property
    def spec(self) -> LanguageSpec:
        """As LanguageModel.spec."""
        return self._spec

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        """As LanguageModel.groups."""
        return self._groups

    def embed(self, token_ids: Int[Tensor, " token"]) -> Float[Tensor, "token width"]:
        """As LanguageModel.embed."""
        embedding: Any = self._module
        hidden: Tensor = embedding.get_input_embeddings()(token_ids)
        return hidden

    def run(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
    ) -> Float[Tensor, "token width"]:
        """As LanguageModel.run."""
        # what comes before the first layer (scales, learned positions) is the module's own business
        before = None if layers.start == 0 else hidden[None]
        with self._lock:
            self._call(self._decoder, hidden, positions, before, kv, layers)
            out, self._seat.hidden = self._seat.hidden, None
        assert out is not None, f"{self._spec.family} ran without its layers"
        return out[0]

    def logits(self, hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token vocab"]:
        """As LanguageModel.logits."""
        positions = hidden.new_zeros(len(hidden)).long()
        with self._lock:
            made = self._call(self._module, hidden, positions, hidden[None], None, range(0))
            self._seat.hidden = None
        scores: Tensor = made.logits[0].float()
        return scores

    def _call(
        self,
        module: nn.Module,
        hidden: Tensor,
        positions: Tensor,
        before: Tensor | None,
        kv: KvSpace | None,
        layers: range,
    ) -> Any:
        """One forward. `before`: goes into the first of `layers` instead of what the module makes of `hidden`."""
        seat = self._seat
        seat.attend, seat.kv, seat.layers, seat.hidden = self._attend, kv, layers, before
        try:
            return module(inputs_embeds=hidden[None], position_ids=positions[None], use_cache=False)
        finally:
            seat.attend = seat.kv = None
            seat.layers = range(0)
