"""The LanguageModel seam: a decoder as layers over pages. Driven by the engine, written by each family.

A model knows tensors and positions. It does not know page ids, requests, sessions or time. Dimension names: token (of
all rows of a batch, one after the other), width, head, kv (key and value heads), dim; row (one sequence), number (of a
recurrent layer's state).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from ganglion.generation import LanguageSpec
from ganglion.layout import PageLayout

# Some tokens of some rows and the state before them -> what comes out for them, and the state after the last.
RecurrentStep = Callable[
    [Float[Tensor, "row token width"], Float[Tensor, "row number"]],
    tuple[Float[Tensor, "row token width"], Float[Tensor, "row number"]],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    """Layers whose keys and values stand in the same pages.

    A page of `layout` has shape (layers, 2, slots, kv, dim); with `value_dim` (MLA: one latent for both) shape
    (layers, 1, slots, kv, dim), and values are the first `value_dim` numbers of keys. `window`: a token sees itself and
    the `window - 1` before it, so that pages further back can go; None: all.
    """

    layout: PageLayout
    layers: tuple[int, ...]  # of the model, in the order in which they stand in a page
    window: int | None = None
    value_dim: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpan:
    """Numbers [start, stop) of one layer's state; in a page they stand from `at` on."""

    layer: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateGroup:
    """Recurrent layers, or parts of their states, that stand in the same pages.

    A page of `layout` has shape (numbers,), float32. Page i holds the state after the tokens [0, (i + 1) * slots), or
    after as many of them as are computed: the last page of a row is its state, those before it are snapshots from
    which a prefix goes on. That is how a group with a window of two tokens pages: whoever pages needs no other rule.
    """

    layout: PageLayout
    spans: tuple[StateSpan, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the model, in the order in which they stand in a page."""
        return tuple(span.layer for span in self.spans)

    @property
    def window(self) -> int:
        """A token asks the page of the one before it, and writes its own."""
        return 2


@runtime_checkable
class KvSpace(Protocol):
    """The keys, values and states of all rows of one piece, wherever they are."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "token head dim"],
        key: Float[Tensor, "token kv dim"],
        value: Float[Tensor, "token kv dim"] | None,
        *,
        scale: float,
        sinks: Float[Tensor, " head"] | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "token head value_dim"]:
        """Keep the new keys and values, then let every token ask those of its row up to itself.

        Heads [i * head / kv, (i + 1) * head / kv) ask key head i. The group's window holds. `value`: None where the
        group has a `value_dim`. `sinks`: one more score per head in the softmax, with no value (GPT-OSS). `softcap`: scaled
        scores pass through softcap * tanh(score / softcap) before the mask (Gemma 2).
        """
        ...

    def recur(
        self, layer: int, inputs: Float[Tensor, "token width"], step: RecurrentStep
    ) -> Float[Tensor, "token width"]:
        """Advance the state of every row over its tokens, and keep it. Before a row's first token it is all zeros.

        `step` is called as often as it takes, each time with equally many tokens of each row.
        """
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """What the engine asks of a language model."""

    @property
    def spec(self) -> LanguageSpec:
        """Sizes and limits."""
        ...

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        """Every layer that keeps something is in one; in one of each sort where it attends and recurs."""
        ...

    def embed(self, token_ids: Int[Tensor, " token"]) -> Float[Tensor, "token width"]:
        """The hidden states that go into layer 0."""
        ...

    def run(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
    ) -> Float[Tensor, "token width"]:
        """Through these layers. Layers may be cut anywhere: what comes out of one call goes into the next."""
        ...

    def logits(self, hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token vocab"]:
        """float32 scores of the next token, of hidden states that went through all layers."""
        ...


@runtime_checkable
class EmbeddingModel(LanguageModel, Protocol):
    """One whose hidden states may be asked for."""

    def normed(self, hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Hidden states that went through all layers, behind the last norm."""
        ...


def can_rewind(model: LanguageModel) -> bool:
    """Can tokens be taken back, as drafts that were wrong are? A state that went over them has forgotten what was before."""
    return not any(isinstance(group, StateGroup) for group in model.groups)
