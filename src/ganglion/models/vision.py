"""Vision: the ImageEncoder seam, and a decoder with an encoder as one LanguageModel.

Driven by the engine: pieces of encoding like pieces of a prompt, cut per tile of a picture and within layers. Knows
tensors; no page ids, no requests, no picture files. Dimension names: tile, patch, token, width, high, wide (pixels).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ganglion.generation import LanguageSpec
from ganglion.layout import PageLayout
from ganglion.models.language import KvGroup, KvSpace, LanguageModel, StateGroup


@dataclass(slots=True, kw_only=True)
class TileState:
    """Tiles on their way through a tower; what is in it is the tower's business."""

    hidden: Float[Tensor, "tile patch width"]
    rows: Float[Tensor, "tile patch qkv"]  # queries, keys and values of the layer under way


@runtime_checkable
class ImageEncoder(Protocol):
    """What the engine asks of a vision tower."""

    @property
    def layout(self) -> PageLayout:
        """Pages of features: shape (slots, width of the decoder)."""
        ...

    @property
    def num_units(self) -> int:
        """Encoding may be cut between any two; they take about as long as each other."""
        ...

    def begin(self, pixels: UInt8[Tensor, "tile high wide 3"]) -> TileState:
        """What goes into unit 0."""
        ...

    def run(self, state: TileState, units: range) -> None:
        """Advance the state through these units, the next ones."""
        ...

    def features(self, state: TileState) -> Float[Tensor, "token out_width"]:
        """What stands in the prompt's place for the tiles, of a state that went through all units."""
        ...


@runtime_checkable
class SeeingModel(LanguageModel, Protocol):
    """A language model that takes pictures."""

    @property
    def encoder(self) -> ImageEncoder:
        """Makes features of pictures."""
        ...


class VisionLanguage:
    """A SeeingModel: `decoder` reads hidden states, wherever they came from; `encoder` makes those of pictures."""

    def __init__(
        self, decoder: LanguageModel, encoder: ImageEncoder, *, spec: LanguageSpec
    ) -> None:
        self.decoder, self._encoder, self._spec = decoder, encoder, spec

    @property
    def spec(self) -> LanguageSpec:
        """As LanguageModel.spec."""
        return self._spec

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        """As LanguageModel.groups."""
        return self.decoder.groups

    @property
    def encoder(self) -> ImageEncoder:
        """As SeeingModel.encoder."""
        return self._encoder

    def embed(self, token_ids: Int[Tensor, " token"]) -> Float[Tensor, "token width"]:
        """As LanguageModel.embed. The places of pictures are the engine's to fill."""
        return self.decoder.embed(token_ids)

    def run(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
    ) -> Float[Tensor, "token width"]:
        """As LanguageModel.run."""
        return self.decoder.run(hidden, positions, kv, layers)

    def logits(self, hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token vocab"]:
        """As LanguageModel.logits."""
        return self.decoder.logits(hidden)


def encoder_of(model: LanguageModel) -> ImageEncoder | None:
    """The encoder of a model that sees."""
    return model.encoder if isinstance(model, SeeingModel) else None


def page_layouts(model: LanguageModel) -> tuple[PageLayout, ...]:
    """Everything that a model keeps in pages."""
    layouts = tuple(group.layout for group in model.groups)
    encoder = encoder_of(model)
    return layouts if encoder is None else (*layouts, encoder.layout)
