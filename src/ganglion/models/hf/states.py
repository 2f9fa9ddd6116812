"""States of recurrent layers of a transformers module, as flat numbers in pages. Called by `hf.model`.

A mixer reads and writes its state through a cache that it is given; ours holds one piece's rows of one layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ganglion.models.hf.seat import Seat
from ganglion.models.hf.survey import StateFacts, StatePart
from ganglion.models.language import RecurrentStep

_NUM_TRIED = 7


class StateCache:
    """What a mixer asks of transformers' cache, for its own layer: the state is there from the start, all zeros."""

    def __init__(self, parts: Sequence[StatePart], numbers: Tensor) -> None:
        """`numbers`: [row, number], not changed."""
        self._parts = parts
        self._states: dict[tuple[bool, int], Tensor] = {}
        sizes = [part.num_numbers for part in parts]
        for part, flat in zip(parts, torch.split(numbers, sizes, dim=-1), strict=True):
            state = flat.to(part.dtype, copy=True).view(-1, *part.shape)
            self._states[part.is_conv, part.index] = state

    def flat(self) -> Tensor:
        """[row, number], float32."""
        states = (self._states[part.is_conv, part.index] for part in self._parts)
        return torch.cat([state.flatten(1).float() for state in states], dim=-1)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """As transformers' cache; `layer_idx` is always this one."""
        return self._states[True, state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """As transformers' cache."""
        return self._states[False, state_idx]

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """As transformers' cache."""
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        """As transformers' cache: states are never taken back."""
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> Tensor:
        """Keeps the last columns; returns the old ones with the new ones behind them."""
        kept = self._states[True, state_idx]
        full = torch.cat([kept, conv_states], dim=-1)
        self._states[True, state_idx] = full[..., -kept.shape[-1] :]
        return full

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> Tensor:
        """Keeps it and returns it."""
        self._states[False, state_idx] = recurrent_states
        return recurrent_states


def recur_in_pages(facts: StateFacts, seat: Seat, *, width: int, dtype: torch.dtype) -> None:
    """From now on the mixer advances the states in the seat's `kv`, each row by itself; without one it is as before.

    `width`, `dtype`: of its inputs. Some mixers forget their state where several tokens come at once: those get them
    one by one.
    """
    original: Callable[..., Tensor] = facts.mixer.forward

    def advance(inputs: Tensor, numbers: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        cache = StateCache(facts.parts, numbers)
        out = original(inputs, **(options | {facts.cache_name: cache}))
        return out, cache.flat()

    def advance_singly(inputs: Tensor, numbers: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        outs = []
        for at in range(inputs.shape[1]):
            out, numbers = advance(inputs[:, at : at + 1], numbers, **options)
            outs.append(out)
        return torch.cat(outs, dim=1), numbers

    chosen = advance if _continues(advance, facts, width, dtype) else advance_singly

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        if seat.kv is None:
            return original(hidden_states, *args, **options)
        options = {name: value for name, value in options.items() if name != "attention_mask"}
        step = partial(chosen, **options)
        return seat.kv.recur(seat.layer, hidden_states[0], step)[None]

    facts.mixer.forward = forward


def _continues(advance: RecurrentStep, facts: StateFacts, width: int, dtype: torch.dtype) -> bool:
    """Do tokens after others see these? Tried with noise, cut and whole; the first part is heard through the state only."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((1, 2 * _NUM_TRIED, width), generator=generator).to(dtype)
    fresh = torch.zeros(1, sum(part.num_numbers for part in facts.parts))
    whole, at_end = advance(inputs, fresh)
    _, between = advance(inputs[:, :_NUM_TRIED], fresh)
    cut, cut_at_end = advance(inputs[:, _NUM_TRIED:], between)
    limit = 1e-3 if dtype == torch.float32 else 5e-2
    pairs = ((whole[:, _NUM_TRIED:].float(), cut.float()), (at_end, cut_at_end))
    return all(float((a - b).norm()) <= limit * float(a.norm()) for a, b in pairs)
