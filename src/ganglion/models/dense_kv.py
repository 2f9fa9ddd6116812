"""Dense keys and values: one contiguous buffer per layer, rows of one batch side by side.

The plain KvSpace: for tests (the truth that pages are held to), evaluation while training, and drafts. Called by whoever
drives a LanguageModel without an engine. Knows no page. Dimension names: token, row, key, head, kv, dim.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from ganglion.models.language import KvGroup, RecurrentStep, StateGroup


class DenseKv:
    """Room for `max_tokens` in each of `num_rows` rows. Call `extend` before the runs that make new tokens' values."""

    def __init__(
        self,
        groups: Sequence[KvGroup | StateGroup],
        *,
        num_rows: int,
        max_tokens: int,
        device: str = "cpu",
    ) -> None:
        self._max_tokens = max_tokens
        self._groups = {
            layer: group for group in groups if isinstance(group, KvGroup) for layer in group.layers
        }
        self._states = _states(groups, num_rows, device)
        self._layers: dict[
            int, Tensor
        ] = {}  # "2 row token kv dim", or 1 where keys hold the values
        for layer, group in self._groups.items():
            _, num_halves, _, num_kv, dim = group.layout.shape
            self._layers[layer] = torch.zeros(
                (num_halves, num_rows, max_tokens, num_kv, dim),
                dtype=getattr(torch, group.layout.dtype),
                device=device,
            )
        self._starts = [0] * num_rows
        self._ends = [0] * num_rows

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, those of the current runs among them."""
        return tuple(self._ends)

    def extend(self, num_tokens: Sequence[int]) -> None:
        """From now on runs hold so many new tokens of each row, rows one after the other."""
        ends = [end + count for end, count in zip(self._ends, num_tokens, strict=True)]
        if max(ends) > self._max_tokens:
            raise ValueError(f"{max(ends)} tokens in a row, there is room for {self._max_tokens}")
        self._starts, self._ends = self._ends, ends

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what stands behind: rejected drafts. Raises ValueError where recurrent layers went over it already."""
        if self._states and any(
            length < end for end, length in zip(self._ends, lengths, strict=True)
        ):
            raise ValueError("a recurrent state cannot be taken back")
        self._ends = [min(end, length) for end, length in zip(self._ends, lengths, strict=True)]
        self._starts = list(self._ends)

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
        """As `KvSpace.attend`."""
        group, store = self._groups[layer], self._layers[layer]
        outs: list[Tensor] = []
        first = 0
        for row, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            tokens = slice(first, first + end - start)
            first = tokens.stop
            store[0, row, start:end] = key[tokens]
            if value is not None:
                store[1, row, start:end] = value[tokens]
            oldest = 0 if group.window is None else max(0, start - group.window + 1)
            keys = store[0, row, oldest:end]
            values = keys[..., : group.value_dim] if value is None else store[1, row, oldest:end]
            mask = None  # one token sees all that is left
            if end - start > 1:
                mask = _mask(start - oldest, end - start, group.window, keys.device)
            outs.append(_attend(query[tokens], keys, values, mask, scale, sinks, softcap))
        return torch.cat(outs)

    def recur(
        self, layer: int, inputs: Float[Tensor, "token width"], step: RecurrentStep
    ) -> Float[Tensor, "token width"]:
        """As `KvSpace.recur`."""
        outs: list[Tensor] = []
        first = 0
        for row, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end > start:
                state = self._states[layer][row, None]
                made, after = step(inputs[None, first : first + end - start], state.clone())
                state.copy_(after)
                outs.append(made[0])
            first += end - start
        return torch.cat(outs) if outs else inputs


def _states(
    groups: Sequence[KvGroup | StateGroup], num_rows: int, device: str
) -> dict[int, Float[Tensor, "row number"]]:
    """Layer -> zeros for its state."""
    spans = [span for group in groups if isinstance(group, StateGroup) for span in group.spans]
    sizes = {span.layer: 0 for span in spans}
    for span in spans:
        sizes[span.layer] = max(sizes[span.layer], span.stop)
    return {layer: torch.zeros(num_rows, size, device=device) for layer, size in sizes.items()}


def _mask(
    num_before: int, num_tokens: int, window: int | None, device: torch.device
) -> Bool[Tensor, "token key"]:
    """True where a token sees a key; `num_before` keys stand before the first token's own."""
    own = num_before + torch.arange(num_tokens, device=device)[:, None]
    keys = torch.arange(num_before + num_tokens, device=device)
    seen = keys <= own
    return seen if window is None else seen & (keys > own - window)


def _attend(
    query: Float[Tensor, "token head dim"],
    key: Float[Tensor, "key kv dim"],
    value: Float[Tensor, "key kv value_dim"],
    mask: Bool[Tensor, "token key"] | None,
    scale: float,
    sinks: Float[Tensor, " head"] | None,
    softcap: float | None,
) -> Float[Tensor, "token head value_dim"]:
    num_tokens, num_heads, num_kv = query.shape[0], query.shape[1], key.shape[1]
    num_shared = num_heads // num_kv
    if num_tokens == 1 and num_shared > 1 and sinks is None:
        # heads that share a key ask it like tokens of one head: an eighth of the time of copying keys
        grouped = query.view(num_kv, num_shared, -1).transpose(0, 1)
        out = _attend(grouped, key, value, mask, scale, sinks, softcap)
        return out.transpose(0, 1).reshape(1, num_heads, -1)
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    if num_shared > 1:
        key, value = key.repeat_interleave(num_shared, 0), value.repeat_interleave(num_shared, 0)
    if sinks is None and softcap is None and key.shape[-1] == value.shape[-1]:
        out = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=scale
        )
        return out[0].transpose(0, 1)
    scores = torch.matmul(query, key.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.matmul(weights.to(value.dtype), value).transpose(0, 1)
