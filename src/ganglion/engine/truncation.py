"""Temperature, top-k, top-p and min-p, and one draw per row from what they leave. Called by engine.sampler.

Pure functions of logits and numbers. Knows no choices, tokens so far or grammars. Dimension names: row, vocab.

Each rule is a floor under the scaled logits, so no row is sorted: the most likely tokens almost always settle the floor,
and a row that they do not settle is sorted alone. Rules and their order are those of transformers (temperature, top-k, top-p, min-p; ties
with the last kept token are kept), to the rounding of sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_CANDIDATES = 256  # most likely tokens that are looked at first
_SPAN = 64  # tokens summed as one in a draw over the whole vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Numbers per row, each float64 [row] or int64 [row] on the logits' device.

    `top_k`: the vocabulary's size where there is none. `uniform` in [0, 1) decides the draw.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    def of(self, rows: Tensor) -> "Truncation":
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
    vocab_size = logits.shape[-1]
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled /= rules.temperature.to(scaled.dtype)[:, None]
    floor = rules.min_p.log()
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    is_open = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    is_cut = (rules.top_k < vocab_size) | (rules.top_p < 1.0)
    if bool(is_cut.any()):
        rows = is_cut.nonzero()[:, 0]
        top, top_ids = scaled[rows].topk(min(NUM_CANDIDATES, vocab_size), dim=-1)
        cut, is_settled = _floors(scaled[rows], top, rules.of(rows))
        for i in (~is_settled).nonzero()[:, 0].tolist():
            row = rows[i : i + 1]
            ordered = scaled[row].sort(dim=-1, descending=True).values
            cut[i : i + 1] = _floors(scaled[row], ordered, rules.of(row))[0]
        floor[rows] = torch.maximum(floor[rows], cut)
        is_inside = top[:, -1] < floor[rows]
        inside = rows[is_inside]
        token_ids[inside] = _draw_among(
            top[is_inside], top_ids[is_inside], floor[inside], rules.uniform[inside]
        )
        is_open[inside] = False
    if bool(is_open.all()):
        return _draw_whole(scaled, floor, rules.uniform)
    rest = is_open.nonzero()[:, 0]
    if len(rest):
        token_ids[rest] = _draw_whole(scaled[rest], floor[rest], rules.uniform[rest])
    return token_ids


def _floors(scaled: Tensor, top: Tensor, rules: Truncation) -> tuple[Tensor, Tensor]:
    """The scaled logit from which on top-k and top-p keep tokens, per row, and whether `top` sufficed to find it.

    `top`: the largest of `scaled` [row, vocab], best first.
    """
    num_top, vocab_size = top.shape[-1], scaled.shape[-1]
    has_k = rules.top_k < vocab_size
    kth = top.gather(-1, (rules.top_k.clamp(max=num_top) - 1)[:, None])[:, 0].double()
    floor = torch.where(has_k, kth, -torch.inf)
    # Ties with the k-th are kept too, and count: below the candidates' last there must be no further one.
    is_settled = ~has_k | ((rules.top_k <= num_top) & (top[:, -1] < floor))
    if num_top == vocab_size:
        is_settled = torch.ones_like(is_settled)
    has_p = rules.top_p < 1.0
    if not bool(has_p.any()):
        return floor, is_settled
    weights = top.double().exp() * (top >= floor[:, None])
    mass = weights.sum(-1)
    whole = (~has_k & has_p).nonzero()[:, 0]
    if len(whole) and num_top < vocab_size:
        mass[whole] = scaled[whole].exp().sum(-1).double()
    num_short = (weights.cumsum(-1) < (rules.top_p * mass)[:, None]).sum(-1)
    last = num_short.clamp(max=num_top - 1)
    nucleus = top.gather(-1, last[:, None])[:, 0].double()
    if num_top < vocab_size:
        is_settled &= ~has_p | (num_short < num_top)
    return torch.where(has_p, torch.maximum(floor, nucleus), floor), is_settled


def _draw_among(top: Tensor, top_ids: Tensor, floor: Tensor, uniform: Tensor) -> Tensor:
    """A token of `top_ids` [row, candidate] at or above the floor. By order of ids, which ties cannot change."""
    ids, order = top_ids.sort(dim=-1)
    scaled = top.gather(-1, order)
    weights = scaled.double().exp() * (scaled >= floor[:, None])
    sums = weights.cumsum(-1)
    target = _below(uniform * sums[:, -1], sums[:, -1])
    return ids.gather(-1, torch.searchsorted(sums, target[:, None], right=True))[:, 0]


def _draw_whole(scaled: Tensor, floor: Tensor, uniform: Tensor) -> Tensor:
    """A token of the whole vocabulary at or above the floor: first the span of tokens, then the token in it."""
    num_rows, vocab_size = scaled.shape
    num_spans = -(-vocab_size // _SPAN)
    weights = scaled.new_zeros(num_rows, num_spans * _SPAN)
    torch.exp(scaled, out=weights[:, :vocab_size])
    if bool((floor > -torch.inf).any()):
        weights[:, :vocab_size] *= scaled >= floor[:, None]
    spans = weights.view(num_rows, num_spans, _SPAN)
    sums = spans.sum(-1).double().cumsum(-1)
    target = _below(uniform * sums[:, -1], sums[:, -1])
    span = torch.searchsorted(sums, target[:, None], right=True)
    before = torch.where(span > 0, sums.gather(-1, (span - 1).clamp(min=0)), 0.0)[:, 0]
    row = torch.arange(num_rows, device=scaled.device)
    inner = spans[row, span[:, 0]].double().cumsum(-1)
    rest = _below((target - before).clamp(min=0.0), inner[:, -1])
    return span[:, 0] * _SPAN + torch.searchsorted(inner, rest[:, None], right=True)[:, 0]


def _below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, or the next number below `total`: a sum's rounding must not lead past the last token of any weight."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
