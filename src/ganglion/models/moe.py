"""Mixture-of-experts layers. Called by `models.decoder`. Knows no page, request or position.

`Moe` is the layer: a router, experts behind one hook (`ExpertBackend`), and the shared expert that some families have.
Where the weights of experts live is the backend's business: `ResidentExperts` holds them as parameters. Sizes:
`models.moe_spec`. Names in checkpoints: `models.moe_load`.

Dimension names: token, width, k (experts of a token), expert, inner (width inside an expert), gate_up (2 * inner: first
all of gate, then all of up), pair (token and one of its experts).
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ganglion.models.moe_spec import Activation, GateSpec, MoeSpec, moe_spec
from ganglion.models.router import Router

__all__ = [
    "ExpertBackend",
    "GateSpec",
    "GatedMlp",
    "LocalExperts",
    "Moe",
    "MoeSpec",
    "ResidentExperts",
    "gate",
    "moe_spec",
    "run_experts",
]


@runtime_checkable
class ExpertBackend(Protocol):
    """Computes experts, wherever their weights are. The one hook under every mixture-of-experts layer."""

    def experts(
        self,
        x: Float[Tensor, "token width"],
        indices: Int[Tensor, "token k"],
        weights: Float[Tensor, "token k"],
        layer: int,
    ) -> Float[Tensor, "token width"]:
        """For each token the sum over its experts of weight * expert(x), in x's dtype. A token's experts differ."""
        ...


def gate(spec: GateSpec, gate_up: Float[Tensor, "*b gate_up"]) -> Float[Tensor, "*b inner"]:
    """What goes into the projection down."""
    gated, up = gate_up.chunk(2, dim=-1)
    if spec.limit is not None:
        gated = gated.clamp(max=spec.limit)
        up = up.clamp(min=-spec.limit, max=spec.limit)
        return (up + 1) * (gated * torch.sigmoid(gated * spec.alpha))
    if spec.activation is Activation.SILU:
        return functional.silu(gated) * up
    approximation = "tanh" if spec.activation is Activation.GELU_TANH else "none"
    return functional.gelu(gated, approximate=approximation) * up


@runtime_checkable
class LocalExperts(Protocol):
    """All experts of one layer where they can be computed, one by one."""

    spec: MoeSpec

    def expert(self, index: int, x: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        """One of them, for all tokens that go to it."""
        ...


def run_experts(
    local: LocalExperts,
    x: Float[Tensor, "token width"],
    indices: Int[Tensor, "token k"],
    weights: Float[Tensor, "token k"],
    layer: int,
) -> Float[Tensor, "token width"]:
    """`ExpertBackend.experts` for whoever can compute one expert, which is done once for each that is used.

    Sums are float32 and in the order of experts, alone or in a batch: a token's result has the same bits in any batch
    as long as those of an expert do not depend on how many rows it gets.
    """
    assert layer == local.spec.layer, f"experts of layer {local.spec.layer}, asked for {layer}"
    expert = local.expert
    num_tokens, top_k = indices.shape
    if num_tokens == 1:  # nothing to sort or gather
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for index, rank in sorted(zip(indices[0].tolist(), range(top_k), strict=True)):
            total = total + expert(index, x) * weights[:, rank, None]
        return total.to(x.dtype)
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    tokens = order // top_k
    pairs, weights_P = x[tokens], weights.flatten()[order, None]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for index, count in enumerate(flat.bincount().tolist()):
        if count:
            rows = slice(start, start + count)
            total.index_add_(0, tokens[rows], expert(index, pairs[rows]) * weights_P[rows])
            start += count
    return total.to(x.dtype)


class GatedMlp(nn.Module):
    """An expert that every token goes to."""

    def __init__(self, spec: GateSpec, *, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(inner, width, bias=False, dtype=dtype)

    def forward(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        out: Tensor = self.down_proj(gate(self.spec, self.gate_up_proj(x)))
        return out


class ResidentExperts(nn.Module):
    """All experts of one layer as parameters."""

    def __init__(self, spec: MoeSpec, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        num_experts, width, inner = spec.router.num_experts, spec.width, spec.inner
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner, dtype=dtype))
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if spec.has_expert_bias:
            self.gate_up_bias = nn.Parameter(torch.zeros(num_experts, 2 * inner, dtype=dtype))
            self.down_bias = nn.Parameter(torch.zeros(num_experts, width, dtype=dtype))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def experts(
        self,
        x: Float[Tensor, "token width"],
        indices: Int[Tensor, "token k"],
        weights: Float[Tensor, "token k"],
        layer: int,
    ) -> Float[Tensor, "token width"]:
        return run_experts(self, x, indices, weights, layer)

    def expert(self, index: int, x: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        up_bias = None if self.gate_up_bias is None else self.gate_up_bias[index]
        down_bias = None if self.down_bias is None else self.down_bias[index]
        gate_up = functional.linear(x, self.gate_up_proj[index], up_bias)
        return functional.linear(gate(self.spec.gate, gate_up), self.down_proj[index], down_bias)


class Moe(nn.Module):
    """One layer: route, experts, shared expert. `experts`: where the weights are; None: `ResidentExperts` of its own.

    `nn.Module.to(dtype)` is not needed: parameters are made in `dtype`, but those that the family keeps in float32.
    """

    def __init__(
        self,
        spec: MoeSpec,
        *,
        dtype: torch.dtype = torch.float32,
        experts: ExpertBackend | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(spec.router, width=spec.width, dtype=dtype)
        self.experts: ExpertBackend = experts or ResidentExperts(spec, dtype=dtype)
        self.shared: GatedMlp | None = None
        self.shared_gate: nn.Linear | None = None
        if spec.shared_inner:
            self.shared = GatedMlp(
                spec.gate, width=spec.width, inner=spec.shared_inner, dtype=dtype
            )
        if spec.is_shared_gated:
            self.shared_gate = nn.Linear(spec.width, 1, bias=False, dtype=dtype)

    def forward(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        weights, indices = self.router(x)
        out = self.experts.experts(x, indices, weights, self.spec.layer)
        if self.shared is None:
            return out
        shared: Tensor = self.shared(x)
        if self.shared_gate is not None:
            shared = self.shared_gate(x).sigmoid() * shared
        return out + shared
