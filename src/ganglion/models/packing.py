"""Packing: a network's weights laid out once for this CPU, for serving. Called by `registry` and `decoder`.

Swaps modules in place and leaves the parameters' names in checkpoints to the unpacked network: what is packed can
neither be trained nor saved. Knows no policy.
"""

from torch import nn

from ganglion.kernels.cpu import PackedHalve, PackedLinear, why_not_packed

MIN_WIDTH = 16  # below it the matrix units stand still and plain torch is as fast


def pack(network: nn.Module) -> int:
    """Pack every layer that gains from it here; returns how many. The others stay as they are."""
    swaps: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in network.modules():
        for name, layer in parent.named_children():
            packed = _packed(layer)
            if packed is not None:
                swaps.append((parent, name, packed))
    for parent, name, packed in swaps:
        setattr(parent, name, packed)
    return len(swaps)


def _packed(layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    if why_not_packed(layer.weight.dtype) or layer.weight.device.type != "cpu":
        return None
    if isinstance(layer, nn.Linear):
        is_wide = min(layer.in_features, layer.out_features) >= MIN_WIDTH
        return PackedLinear(layer.weight, layer.bias) if is_wide else None
    is_halve = (
        layer.kernel_size == (3, 3)
        and layer.stride == (2, 2)
        and layer.padding == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )
    return PackedHalve(layer.weight, layer.bias) if is_halve and layer.bias is not None else None
