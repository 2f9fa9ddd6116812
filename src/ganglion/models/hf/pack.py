"""Packing of a transformers module's linear layers for this CPU. Called by `hf.load`. Knows no family."""

import inspect
import re

from torch import nn

from ganglion.kernels.cpu import PackedLinear, why_not_packed
from ganglion.models.packing import MIN_WIDTH


def pack_linears(module: nn.Module) -> int:
    """Swap those that gain from it, in place; returns how many.

    One whose weight its parent's code reads itself stays: a packed one has none to show.
    """
    swaps: list[tuple[nn.Module, str, nn.Linear]] = []
    for parent in module.modules():
        found = [
            (parent, name, layer)
            for name, layer in parent.named_children()
            if type(layer) is nn.Linear
            and not why_not_packed(layer.weight.dtype)
            and min(layer.in_features, layer.out_features) >= MIN_WIDTH
        ]
        source = inspect.getsource(type(parent)) if found else ""
        swaps += [one for one in found if not re.search(rf"\b{one[1]}\.(weight|bias)\b", source)]
    for parent, name, layer in swaps:
        setattr(parent, name, PackedLinear(layer.weight, layer.bias))
    return len(swaps)
