"""Packed feed-forward: its weights laid out for this CPU's matrix units, the activation inside the products.

Made by `decoder` from GatedMlp when a model is served; can neither be trained nor saved. Dimension names: token, width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ganglion.kernels.cpu import PACK_NUM_ROWS, why_not_packed
from ganglion.models.lora import LayerDeltas
from ganglion.models.moe_spec import Activation

MIN_WIDTH = 16  # below it the matrix units stand still
_FUSED = {  # of torch.ops.mkldnn._linear_pointwise: an activation, and how it is approximated
    Activation.SILU: ("swish", ""),
    Activation.GELU: ("gelu", "none"),
    Activation.GELU_TANH: ("gelu", "tanh"),
}
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


class PackedGatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)) in three products and nothing between them, bfloat16."""

    def __init__(self, gate_up: nn.Linear, down: nn.Linear, activation: Activation) -> None:
        super().__init__()
        self._activation, self._activate = _FUSED[activation], ACTIVATIONS[activation]
        gate, up = gate_up.weight.detach().chunk(2)
        self._gate, self._up, self._down = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_NUM_ROWS)
            for weight in (gate, up, down.weight.detach())
        )
        biases = (None, None) if gate_up.bias is None else gate_up.bias.detach().chunk(2)
        self._gate_bias, self._up_bias = biases
        self._down_bias = None if down.bias is None else down.bias.detach()

    def forward(
        self, x: Float[Tensor, "token width"], deltas: LayerDeltas | None = None
    ) -> Float[Tensor, "token width"]:
        """`deltas`: added before the activation and behind it, which is then computed by itself."""
        linear = torch.ops.mkldnn._linear_pointwise
        if deltas is not None:
            return self._adapted(x, deltas)
        name, how = self._activation
        gated = linear.default(x, self._gate, self._gate_bias, name, [], how)
        inner = linear.binary(x, gated, self._up, self._up_bias, "mul")
        out: Tensor = linear.default(inner, self._down, self._down_bias, "none", [], "")
        return out

    def _adapted(
        self, x: Float[Tensor, "token width"], deltas: LayerDeltas
    ) -> Float[Tensor, "token width"]:
        linear = torch.ops.mkldnn._linear_pointwise.default
        gate_up = torch.cat(
            [
                linear(x, self._gate, self._gate_bias, "none", [], ""),
                linear(x, self._up, self._up_bias, "none", [], ""),
            ],
            dim=-1,
        )
        deltas.add("mlp.gate_up", x, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = self._activate(gate) * up
        out: Tensor = linear(inner, self._down, self._down_bias, "none", [], "")
        deltas.add("mlp.down", inner, out)
        return out


def packed_mlp(
    gate_up: nn.Linear, down: nn.Linear, activation: Activation
) -> PackedGatedMlp | None:
    """None where nothing would be gained."""
    is_narrow = min(down.weight.shape) < MIN_WIDTH
    if is_narrow or why_not_packed(down.weight.dtype) or down.weight.device.type != "cpu":
        return None
    return PackedGatedMlp(gate_up, down, activation)
