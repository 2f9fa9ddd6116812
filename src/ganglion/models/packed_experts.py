"""Packed experts: a layer's experts with their weights laid out for this CPU's matrix units. Called by `decoder`.

An `ExpertBackend` made from `ResidentExperts`, for serving: can neither be trained nor saved. A SiLU or GELU runs inside
the product that makes its input, and the product with `up` inside the one that makes `up`. Dimension names: `moe`.

oneDNN makes a kernel for every number of rows that it meets (half a millisecond each, and it remembers about a thousand),
and in a prompt every expert gets another number: rows are filled up to few sizes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ganglion.kernels.cpu import PACK_NUM_ROWS, why_not_packed
from ganglion.models.moe import Moe, ResidentExperts, gate, run_experts
from ganglion.models.moe_spec import Activation, MoeSpec

MIN_WIDTH = 16  # below it the matrix units stand still
_SIZES_PER_OCTAVE = 16  # of row counts above 32: at most a sixteenth too many, 2% on average

_FUSED = {  # of torch.ops.mkldnn._linear_pointwise: an activation, and how it is approximated
    Activation.SILU: ("swish", ""),
    Activation.GELU: ("gelu", "none"),
    Activation.GELU_TANH: ("gelu", "tanh"),
}


class _Expert(NamedTuple):
    """Opaque layouts. A clamped gate is not fused: `up` is None and `gate` is the weight of both."""

    gate: Tensor
    up: Tensor | None
    down: Tensor


class PackedExperts(nn.Module):
    """All experts of one layer, bfloat16."""

    def __init__(self, experts: ResidentExperts) -> None:
        super().__init__()
        self.spec: MoeSpec = experts.spec
        is_fused = self.spec.gate.limit is None and not self.spec.has_expert_bias
        self._experts: list[_Expert] = []
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            if is_fused:
                gated, up = gate_up.chunk(2)
                packed = _Expert(_pack(gated), _pack(up), _pack(down))
            else:
                packed = _Expert(_pack(gate_up), None, _pack(down))
            self._experts.append(packed)
        self._gate_up_bias = _detached(experts.gate_up_bias)
        self._down_bias = _detached(experts.down_bias)

    def experts(
        self,
        x: Float[Tensor, "token width"],
        indices: Int[Tensor, "token k"],
        weights: Float[Tensor, "token k"],
        layer: int,
    ) -> Float[Tensor, "token width"]:
        """As `ExpertBackend.experts`; a token's result has the same bits in any batch."""
        return run_experts(self, x, indices, weights, layer)

    def expert(self, index: int, x: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        num_rows = x.shape[0]
        num_extra = filled_up(num_rows) - num_rows
        x = functional.pad(x, (0, 0, 0, num_extra)) if num_extra else x
        linear = torch.ops.mkldnn._linear_pointwise
        weight = self._experts[index]
        if weight.up is None:
            gate_bias = None if self._gate_up_bias is None else self._gate_up_bias[index]
            gate_up = linear.default(x, weight.gate, gate_bias, "none", [], "")
            inner = gate(self.spec.gate, gate_up)
        else:
            name, how = _FUSED[self.spec.gate.activation]
            gated = linear.default(x, weight.gate, None, name, [], how)
            inner = linear.binary(x, gated, weight.up, None, "mul")
        down_bias = None if self._down_bias is None else self._down_bias[index]
        out: Tensor = linear.default(inner, weight.down, down_bias, "none", [], "")
        return out[:num_rows]


def filled_up(num_rows: int) -> int:
    """The smallest size that holds so many rows: 16 sizes from one power of two to the next, all up to 32."""
    step = 1 << max(0, (num_rows - 1).bit_length() - _SIZES_PER_OCTAVE.bit_length())
    return -(-num_rows // step) * step


def pack_experts(moe: Moe) -> bool:
    """Swap resident experts for packed ones, in place; False where nothing would be gained: they stay as they are."""
    resident = moe.experts
    if not isinstance(resident, ResidentExperts) or resident.gate_up_proj.device.type != "cpu":
        return False
    is_narrow = min(moe.spec.width, moe.spec.inner) < MIN_WIDTH
    if is_narrow or why_not_packed(resident.gate_up_proj.dtype):
        return False
    moe.experts = PackedExperts(resident)
    return True


def _pack(weight: Float[Tensor, "high low"]) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), PACK_NUM_ROWS
    )
    return packed


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
