"""Evaluate: held-out loss of a trained language model, and how its routers behave. Called by the CLI after `fit_lm`.

Measures the weights as they are shipped (rounded to bfloat16), computed with in float32. Knows no files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ganglion.train.lm_corpus import END_OF_TEXT, Corpus
from ganglion.train.lm_model import Routing, TrainedLm

PROMPT = "Return a list of"
_ROWS_BYTES = 8192  # tokens in one forward


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFigures:
    """Of one layer, over held-out text."""

    hottest_quarter_share: float  # of all choices; the experts are ranked on the same text
    reuse_share: float  # of a token's experts that the token before it had chosen
    chance_reuse_share: float
    peak_load: float  # busiest expert over the mean


@dataclass(frozen=True, slots=True, kw_only=True)
class LmFigures:
    """What was measured. Losses in nats per byte (END_OF_TEXT counts as one)."""

    loss: float
    loss_by_kind: dict[str, float]
    num_tokens_by_kind: dict[str, int]
    loss_by_position: dict[str, float]  # "0-255": nats per byte at these places of a window
    length: int  # bytes in a window: what a byte can look back on
    routers: tuple[RouterFigures, ...]  # layer by layer; empty when dense
    continuation: str  # greedy, of PROMPT


def evaluate_lm(
    model: TrainedLm,
    corpus: Corpus,
    *,
    length: int = 2048,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LmFigures:
    """Measure on all held-out text, or on the first `max_tokens` of each kind, in windows of `length`.

    `on_progress`: windows done and windows in all.
    """
    shipped = TrainedLm(model.config)
    rounded = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    shipped.load_state_dict(rounded)
    shipped.eval()
    windows = {
        kind: _windows(tokens[:max_tokens], min(length, shipped.config.max_tokens))
        for kind, tokens in corpus.held_out.items()
    }
    num_all = sum(len(parts) for parts in windows.values())
    sums, routers = _Sums(length), _RouterCounts(shipped)
    loss_by_kind: dict[str, float] = {}
    num_tokens: dict[str, int] = {}
    num_done = 0
    for kind, parts in windows.items():
        kind_sums = _Sums(length)
        for rows in _batches(parts):
            losses, routings = _losses(shipped, rows)
            routers.add(routings, rows_length=rows.shape[1] - 1)
            kind_sums.add(losses)
            num_done += len(rows)
            on_progress(num_done, num_all)
        sums.merge(kind_sums)
        loss_by_kind[kind] = kind_sums.mean()
        num_tokens[kind] = kind_sums.num_tokens()
    return LmFigures(
        loss=sums.mean(),
        loss_by_kind=loss_by_kind,
        num_tokens_by_kind=num_tokens,
        loss_by_position=sums.by_position(),
        length=length,
        routers=routers.figures(),
        continuation=continuation(shipped, PROMPT, num_tokens=120),
    )


def continuation(model: TrainedLm, prompt: str, *, num_tokens: int) -> str:
    """What the model finds likeliest after `prompt`, token by token; ends at END_OF_TEXT."""
    tokens = [END_OF_TEXT, *prompt.encode()]
    num_given = len(tokens)
    for _ in range(num_tokens):
        with torch.no_grad():
            scores, _ = model(torch.tensor([tokens]))
        token = int(scores[0, -1].argmax())
        if token == END_OF_TEXT:
            break
        tokens.append(token)
    return bytes(tokens[num_given:]).decode(errors="replace")


def _windows(tokens: NDArray[np.uint16], length: int) -> list[Tensor]:
    """Pieces of at most `length` + 1 tokens that overlap by one, so that every token but the first is asked for once."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    starts = range(0, len(ids) - 1, length)
    return [ids[start : start + length + 1] for start in starts]


def _batches(parts: list[Tensor]) -> list[Tensor]:
    """Rows of equal length side by side; the last piece is a row of its own when it is shorter."""
    full = [part for part in parts if len(part) == len(parts[0])]
    num_rows = max(1, _ROWS_BYTES // len(parts[0]))
    batches = [torch.stack(full[i : i + num_rows]) for i in range(0, len(full), num_rows)]
    return batches + [part[None] for part in parts if len(part) != len(parts[0])]


def _losses(model: TrainedLm, rows: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
    with torch.no_grad():
        scores, routings = model(rows[:, :-1])
        losses = functional.cross_entropy(scores.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses, routings


class _Sums:
    """Losses added up place by place of a window."""

    def __init__(self, length: int) -> None:
        self._sums = torch.zeros(length, dtype=torch.float64)
        self._counts = torch.zeros(length, dtype=torch.int64)

    def add(self, losses: Tensor) -> None:
        """Losses [row, place]."""
        self._sums[: losses.shape[1]] += losses.double().sum(0)
        self._counts[: losses.shape[1]] += len(losses)

    def merge(self, other: "_Sums") -> None:
        self._sums += other._sums
        self._counts += other._counts

    def num_tokens(self) -> int:
        return int(self._counts.sum())

    def mean(self) -> float:
        return float(self._sums.sum() / self._counts.sum())

    def by_position(self) -> dict[str, float]:
        means, start, end = {}, 0, 64
        while start < len(self._sums):
            end = min(end, len(self._sums))
            count = int(self._counts[start:end].sum())
            if count:
                means[f"{start}-{end - 1}"] = float(self._sums[start:end].sum() / count)
            start, end = end, end * 2
        return means


class _RouterCounts:
    """Choices of every layer's router, counted."""

    def __init__(self, model: TrainedLm) -> None:
        config = model.config
        self._num_experts, self._num_choices = config.num_experts, config.num_experts_per_token
        num_routers = config.num_layers if config.is_moe else 0
        self._loads = torch.zeros(num_routers, config.num_experts, dtype=torch.int64)
        self._num_reused = torch.zeros(num_routers, dtype=torch.int64)
        self._num_followers = 0

    def add(self, routings: tuple[Routing, ...], *, rows_length: int) -> None:
        for layer, routing in enumerate(routings):
            is_chosen = torch.zeros(len(routing.experts), self._num_experts, dtype=torch.bool)
            is_chosen.scatter_(1, routing.experts, value=True)
            self._loads[layer] += is_chosen.sum(0)
            rows = is_chosen.view(-1, rows_length, self._num_experts)
            self._num_reused[layer] += (rows[:, 1:] & rows[:, :-1]).sum()
        if routings:
            num_rows = len(routings[0].experts) // rows_length
            self._num_followers += num_rows * (rows_length - 1)

    def figures(self) -> tuple[RouterFigures, ...]:
        num_hot = max(1, self._num_experts // 4)
        figures = []
        for loads, num_reused in zip(self._loads, self._num_reused, strict=True):
            ranked = loads.sort(descending=True).values.double()
            figures.append(
                RouterFigures(
                    hottest_quarter_share=float(ranked[:num_hot].sum() / ranked.sum()),
                    reuse_share=int(num_reused) / (self._num_followers * self._num_choices),
                    chance_reuse_share=self._num_choices / self._num_experts,
                    peak_load=float(ranked[0] / ranked.mean()),
                )
            )
        return tuple(figures)
