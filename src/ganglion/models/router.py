"""Router: which experts a token goes to, and with what weights. Called by `models.moe`. Knows no expert and no page.

Every family of mixture-of-experts models is one `RouterSpec`: the switches below, read left to right, are what `route` does.

| family | score | chosen by | groups | normalise | scale | softmax after |
|---|---|---|---|---|---|---|
| Mixtral | softmax | score | | yes | | |
| Qwen2-MoE, Qwen3-MoE, OLMoE | softmax | score | | config | | |
| DeepSeek-V2 | softmax | score | by their best | no | yes | |
| DeepSeek-V3, GLM4-MoE, dots1 | sigmoid | score + correction | by their best two | config | yes | |
| Granite-MoE | none | logit | | | | yes |
| GPT-OSS | none | logit, with a bias of its own | | | | yes |

Dimension names: token, width, expert (all of a layer), k (chosen), group (of experts).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional


class Score(StrEnum):
    """What becomes of a logit before the choice."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


class GroupScore(StrEnum):
    """What a group of experts is worth where only the best groups may be chosen from."""

    MAX = "max"  # DeepSeek-V2
    TOP2_SUM = "top2_sum"  # DeepSeek-V3


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """The switches. `normalise_epsilon` is added to the sum that weights are divided by.

    `has_correction`: a number per expert is added to the score for the choice, and not to the weight. `has_bias`: the
    projection has one. `is_float32`: the projection is computed in float32 whatever the model's dtype.
    """

    num_experts: int
    top_k: int
    score: Score = Score.SOFTMAX
    num_groups: int = 1
    num_top_groups: int = 1
    group_score: GroupScore = GroupScore.MAX
    is_normalised: bool = False
    normalise_epsilon: float = 0.0
    scale: float = 1.0
    is_softmax_after: bool = False
    has_correction: bool = False
    has_bias: bool = False
    is_float32: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"a token cannot go to {self.top_k} of {self.num_experts} experts: "
                "num_experts_per_tok must lie between 1 and their number"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"{self.num_experts} experts cannot be split into {self.num_groups} groups"
            )
        if not 1 <= self.num_top_groups <= self.num_groups:
            raise ValueError(
                f"cannot choose {self.num_top_groups} of {self.num_groups} groups of experts"
            )
        if self.top_k > self.num_top_groups * self.group_size:
            raise ValueError(
                f"{self.num_top_groups} groups of {self.group_size} experts hold fewer than the "
                f"{self.top_k} that a token goes to"
            )
        if self.is_limited and self.group_score is GroupScore.TOP2_SUM and self.group_size < 2:
            raise ValueError("a group of 1 expert has no best two")

    @property
    def group_size(self) -> int:
        """Experts in a group."""
        return self.num_experts // self.num_groups

    @property
    def is_limited(self) -> bool:
        """Whether some groups are out of the choice."""
        return self.num_top_groups < self.num_groups


class Routes(NamedTuple):
    """Where tokens go: `weights` are float32, `indices` int64, best first."""

    weights: Float[Tensor, "token k"]
    indices: Int[Tensor, "token k"]


def route(
    spec: RouterSpec,
    logits: Float[Tensor, "token expert"],
    correction: Float[Tensor, " expert"] | None = None,
) -> Routes:
    """Choose experts. `correction` is there exactly if `spec.has_correction`."""
    assert (correction is not None) == spec.has_correction, (spec.has_correction, correction)
    scores = _scores(spec.score, logits.float())
    chances = scores if correction is None else scores + correction
    if spec.is_limited:
        chances = chances.masked_fill(~_allowed(spec, chances), -torch.inf)
    best, indices = chances.topk(spec.top_k, dim=-1)
    weights = best if correction is None else scores.gather(-1, indices)
    if spec.is_softmax_after:
        weights = weights.softmax(dim=-1)
    if spec.is_normalised:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.normalise_epsilon)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return Routes(weights, indices)


def _scores(score: Score, logits: Float[Tensor, "token expert"]) -> Float[Tensor, "token expert"]:
    if score is Score.SOFTMAX:
        return logits.softmax(dim=-1)
    return logits.sigmoid() if score is Score.SIGMOID else logits


def _allowed(
    spec: RouterSpec, chances: Float[Tensor, "token expert"]
) -> Bool[Tensor, "token expert"]:
    """True for the experts of the best groups."""
    grouped = chances.view(-1, spec.num_groups, spec.group_size)
    if spec.group_score is GroupScore.MAX:
        worth = grouped.amax(dim=-1)
    else:
        worth = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = worth.topk(spec.num_top_groups, dim=-1).indices
    is_best = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, value=True)
    return is_best.repeat_interleave(spec.group_size, dim=-1)


class Router(nn.Module):
    """The projection and the choice. `correction` is float32 whatever the model's dtype."""

    def __init__(self, spec: RouterSpec, *, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        dtype = torch.float32 if spec.is_float32 else dtype
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, width, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.zeros(spec.num_experts, dtype=dtype)) if spec.has_bias else None
        )
        self.register_buffer(
            "correction", torch.zeros(spec.num_experts) if spec.has_correction else None
        )
        self.correction: Tensor | None
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token expert"]:
        """Before the choice: what losses, predictors and prefetchers read."""
        if self.spec.is_float32:
            return functional.linear(x.float(), self.weight.float())
        return functional.linear(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "token width"]) -> Routes:
        return route(self.spec, self.logits(x), self.correction)
