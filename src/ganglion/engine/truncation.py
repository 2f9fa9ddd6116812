"""Temperature, top-k, top-p and min-p, and one draw per row from what they leave. Called by engine.sampler.

Pure functions of logits and numbers. Knows no choices, tokens so far or grammars. Dimension names: row, vocab, span (of
_SPAN tokens), candidate.

Each rule is a floor under the scaled logits, so a vocabulary is never sorted where its few most likely tokens settle the
floor. Rules and order are those of transformers (temperature, top-k, top-p, min-p; ties with the last kept token are kept), to the rounding
of sums. A row's result is the same whatever rows are beside it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_CANDIDATES = 256  # most likely tokens that are looked at first
_SPAN = 64  # tokens that are summed, or whose largest is sought, as one
_CACHED_LOGITS = 1 << 19  # rows of so many logits at once stay in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Numbers per row: float64 [row] each, `top_k` int64 [row], on the logits' device.

    `top_k`: the vocabulary's size where there is none. `uniform` in [0, 1) decides the draw.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    def of(self, rows: Tensor | slice) -> "Truncation":
        """These rows only."""
        return Truncation(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            uniform=self.uniform[rows],
        )


def draw_rows(logits: Tensor, rules: Truncation) -> Tensor:
    """One token id per row of `logits` [row, vocab] float32, whose largest is finite: int64 [row]."""
    num_rows, vocab_size = logits.shape
    num_spans = -(-vocab_size // _SPAN)
    is_cpu = logits.device.type == "cpu"
    step = max(1, _CACHED_LOGITS // vocab_size) if is_cpu else num_rows
    parts = []
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        padded = logits.new_full((len(logits[rows]), num_spans * _SPAN), -torch.inf)
        scaled = padded[:, :vocab_size]
        torch.sub(logits[rows], logits[rows].amax(-1, keepdim=True), out=scaled)
        scaled /= rules.temperature[rows, None].float()
        parts.append(_draw_some(padded.view(-1, num_spans, _SPAN), vocab_size, rules.of(rows)))
    return torch.cat(parts)


def _draw_some(spans: Tensor, vocab_size: int, rules: Truncation) -> Tensor:
    """Token ids [row] of scaled logits [row, span, token of it], -inf past the vocabulary."""
    is_cut = (rules.top_k < vocab_size) | (rules.top_p < 1.0) | (rules.min_p > 0.0)
    if not bool(is_cut.any()):
        return _draw_whole(spans, rules.uniform)
    token_ids = torch.empty(len(spans), dtype=torch.int64, device=spans.device)
    is_open = ~is_cut
    rows = is_cut.nonzero()[:, 0]
    rules_cut = rules.of(rows)
    spans_cut = spans if len(rows) == len(spans) else spans[rows]
    top, top_ids = _candidates(spans_cut)
    floor = _floors(spans_cut, top, vocab_size, rules_cut)
    is_inside = top[:, -1] < floor
    inside = rows[is_inside]
    token_ids[inside] = _draw_among(
        top[is_inside], top_ids[is_inside], floor[is_inside], rules.uniform[inside]
    )
    for i in (~is_inside).nonzero()[:, 0].tolist():
        row = int(rows[i])
        spans[row].masked_fill_(spans[row] < floor[i], -torch.inf)
        is_open[row] = True
    rest = is_open.nonzero()[:, 0]
    if len(rest):
        token_ids[rest] = _draw_whole(spans[rest], rules.uniform[rest])
    return token_ids


def _candidates(spans: Tensor) -> tuple[Tensor, Tensor]:
    """The largest scaled logits [row, candidate] of each row, best first, and their ids.

    Only the spans with the largest maxima can hold them. Where the last one is tied, which of the ties are among them
    is arbitrary: a floor at their value must not be drawn from here.
    """
    num_rows, num_spans, _ = spans.shape
    num_best = min(NUM_CANDIDATES, num_spans)
    best = spans.amax(-1).topk(num_best, dim=-1, sorted=False).indices
    near = spans.gather(1, best[:, :, None].expand(-1, -1, _SPAN)).view(num_rows, -1)
    num_top = min(NUM_CANDIDATES, near.shape[-1])
    top, place = near.topk(num_top, dim=-1)
    return top, best.gather(-1, place // _SPAN) * _SPAN + place % _SPAN


def _floors(spans: Tensor, top: Tensor, vocab_size: int, rules: Truncation) -> Tensor:
    """The scaled logit from which on tokens are kept: float64 [row]."""
    num_top = top.shape[-1]
    has_k, has_p = rules.top_k < vocab_size, rules.top_p < 1.0
    kth = top.gather(-1, (rules.top_k.clamp(max=num_top) - 1)[:, None])[:, 0].double()
    floor = torch.where(has_k, kth, -torch.inf)
    # What is tied with the k-th is kept and counts, so that there must be something below it.
    is_settled = ~has_k | ((rules.top_k <= num_top) & (top[:, -1] < floor))
    weights = top.double().exp() * (top >= floor[:, None])
    mass = weights.sum(-1)
    whole = (~has_k & has_p).nonzero()[:, 0]
    if len(whole):
        mass[whole] = spans[whole].exp().sum(-1).double().sum(-1)
    num_short = (weights.cumsum(-1) < (rules.top_p * mass)[:, None]).sum(-1)
    nucleus = top.gather(-1, num_short.clamp(max=num_top - 1)[:, None])[:, 0].double()
    is_settled &= ~has_p | (num_short < num_top)
    floor = torch.where(has_p, torch.maximum(floor, nucleus), floor)
    for i in (~is_settled).nonzero()[:, 0].tolist():
        row = spans[i].view(-1)[:vocab_size].cpu().numpy()
        floor[i] = _floor_of_many(row, int(rules.top_k[i]), float(rules.top_p[i]))
    return torch.maximum(floor, rules.min_p.log())


def _floor_of_many(row: npt.NDArray[np.float32], top_k: int, top_p: float) -> float:
    """Top-k and top-p of scaled logits [vocab] whose candidates do not settle them: ever more of the row is sorted."""
    kept = row
    if top_k < len(row):
        kept = row[row >= np.partition(row, len(row) - top_k)[len(row) - top_k]]
    if top_p == 1.0:
        return float(kept.min())
    mass = np.exp(kept).sum(dtype=np.float64)
    num_sorted = min(16 * NUM_CANDIDATES, len(kept))
    while True:
        largest = np.partition(kept, len(kept) - num_sorted)[len(kept) - num_sorted :]
        largest = np.sort(largest)[::-1]
        num_short = int((np.exp(largest.astype(np.float64)).cumsum() < top_p * mass).sum())
        if num_short < num_sorted or num_sorted == len(kept):
            return float(largest[min(num_short, num_sorted - 1)])
        num_sorted = min(8 * num_sorted, len(kept))


def _draw_among(top: Tensor, top_ids: Tensor, floor: Tensor, uniform: Tensor) -> Tensor:
    """A token of `top_ids` [row, candidate] at or above the floor. By order of ids, which ties cannot change."""
    ids, order = top_ids.sort(dim=-1)
    scaled = top.gather(-1, order)
    weights = scaled.double().exp() * (scaled >= floor[:, None])
    sums = weights.cumsum(-1)
    target = _below(uniform * sums[:, -1], sums[:, -1])
    return ids.gather(-1, torch.searchsorted(sums, target[:, None], right=True))[:, 0]


def _draw_whole(spans: Tensor, uniform: Tensor) -> Tensor:
    """A token of scaled logits [row, span, token of it]: first the span, then the token in it."""
    weights = spans.exp()
    sums = weights.sum(-1).double().cumsum(-1)
    target = _below(uniform * sums[:, -1], sums[:, -1])
    span = torch.searchsorted(sums, target[:, None], right=True)
    before = torch.where(span > 0, sums.gather(-1, (span - 1).clamp(min=0)), 0.0)[:, 0]
    inner = weights[torch.arange(len(spans), device=spans.device), span[:, 0]].double().cumsum(-1)
    rest = _below((target - before).clamp(min=0.0), inner[:, -1])
    return span[:, 0] * _SPAN + torch.searchsorted(inner, rest[:, None], right=True)[:, 0]


def _below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, or the next number below `total`: rounding must not lead past the last token of any weight."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
