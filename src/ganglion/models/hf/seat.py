"""Seat: what the hooks of one module's attention, experts and layers share while it computes. Made by `hf.model`.

A hook is called from the middle of somebody else's forward, which passes nothing of ours through: it finds its seat on
the module that calls it.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ganglion.models.language import KvSpace

_ATTRIBUTE = "ganglion_seat"


@runtime_checkable
class Attend(Protocol):
    """How attention is computed now: [1, head, token, dim] asks [1, kv, token, dim]; out [1, token, head, dim]."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """`options`: what the family gives its attention besides, such as `scaling` and `sliding_window`."""
        ...


@dataclass(slots=True, kw_only=True)
class Seat:
    """The state of one pass. Between passes: no `attend`, no `kv`."""

    attend: Attend | None = None
    kv: KvSpace | None = None
    layers: range = field(default_factory=lambda: range(0))  # that compute; the others hand through
    layer: int = -1  # that computes now
    given: Tensor | None = None  # goes into the first of them: [1, token, width]
    hidden: Tensor | None = (
        None  # what the layers were given, and then what came out of the last one
    )


def take_seat(module: nn.Module, seat: Seat) -> None:
    """Every module below finds it."""
    for part in module.modules():
        part.__dict__[_ATTRIBUTE] = seat


def seat_of(module: nn.Module) -> Seat:
    """Where this module's hooks look."""
    seat = module.__dict__[_ATTRIBUTE]
    assert isinstance(seat, Seat), f"{type(module).__name__} has no seat"
    return seat
