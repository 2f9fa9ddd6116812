"""CPU backend: the contract's ops where torch has a faster form than the plain one.

| op | why it is faster |
|---|---|
| attend, paged_attend | one fused pass that keeps the scores in cache, and hands out lse for free |
| linear, halve | bfloat16: the weights are laid out for the matrix units once, not at every call |

Called by `models.packing`, `models.layers` and `check`. Dimension names: `contract`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from ganglion.kernels.contract import Attended, Backend

PACK_NUM_ROWS = 48  # rows that the layout is chosen for; any number may come


def attend(
    query: Float[Tensor, "b token head dim"],
    key: Float[Tensor, "b key head dim"],
    value: Float[Tensor, "b key head dim"],
    mask: Float[Tensor, "#b 1 1 key"] | None = None,
) -> Attended:
    """Every token asks every key; `mask` is added to the scores. 128 keys take less time than 115: vectors hold 16."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return Attended(out=out.transpose(1, 2), lse=lse.transpose(1, 2))


def paged_attend(
    query: Float[Tensor, "b token head dim"],
    pages: Float[Tensor, "page slot layer 2 head dim"],
    layer: int,
    ids: Int[Tensor, "b span"],
    num_keys: Int[Tensor, " b"],
) -> Attended:
    """Keys are the first `num_keys` slots of the row's pages laid end to end."""
    longest = max(1, int(num_keys.max()))
    key_value = gather_pages(pages[:, :, layer], ids).flatten(1, 2)[:, :longest]
    if int(num_keys.min()) == longest:
        return attend(query, key_value[:, :, 0], key_value[:, :, 1])
    is_hidden = torch.arange(longest) >= num_keys[:, None]
    # what stands behind the last key may be anything, even NaN, and the mask only adds to the score
    key_value = key_value.masked_fill(is_hidden[:, :, None, None, None], 0.0)
    mask = query.new_zeros(is_hidden.shape).masked_fill_(is_hidden, -torch.inf)
    out, lse = attend(query, key_value[:, :, 0], key_value[:, :, 1], mask[:, None, None])
    return Attended(out=out, lse=lse.masked_fill((num_keys == 0)[:, None, None], -torch.inf))


def gather_pages(
    pages: Shaped[Tensor, "page slot *rest"], ids: Int[Tensor, "b span"]
) -> Shaped[Tensor, "b span slot *rest"]:
    """Copies of pages, row by row."""
    return pages.index_select(0, ids.flatten()).view(*ids.shape, *pages.shape[1:])


def why_not_packed(dtype: torch.dtype) -> str:
    """Why weights of `dtype` cannot be laid out ahead on this machine; empty when they can."""
    if dtype != torch.bfloat16:
        return f"{str(dtype).removeprefix('torch.')}: only bfloat16 gains"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions (AVX-512 at least)"
    return ""


class PackedLinear(nn.Module):
    """A bfloat16 linear layer with its weight laid out for oneDNN. Its layout is opaque: not to be saved or moved.

    Gradients flow to what it reads, for guidance, not to its weight.
    """

    def __init__(
        self, weight: Float[Tensor, "high low"], bias: Float[Tensor, " high"] | None
    ) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_NUM_ROWS)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Float[Tensor, "*b low"]) -> Float[Tensor, "*b high"]:
        if x.requires_grad:
            differentiable: Tensor = _PackedAffine.apply(x, self.packed, self.bias)  # type: ignore[no-untyped-call]
            return differentiable
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.packed, self.bias, "none", [], ""
        )
        return out

    def forward_onto(
        self, x: Float[Tensor, "*b low"], base: Float[Tensor, "*b high"]
    ) -> Float[Tensor, "*b high"]:
        """base + forward(x) in one pass."""
        if x.requires_grad or base.requires_grad:
            plain: Tensor = self(x)
            return base + plain
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, base, self.packed, self.bias, "add"
        )
        return out


class _PackedAffine(torch.autograd.Function):
    """PackedLinear's map with a gradient. The weight comes back from its layout when a gradient asks for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.packed.to_dense(), None, None


class PackedHalve(nn.Module):
    """A bfloat16 3x3 convolution of stride 2 and padding 1, its weight laid out for oneDNN like PackedLinear's."""

    def __init__(self, weight: Float[Tensor, "high c 3 3"], bias: Float[Tensor, " high"]) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach().to(memory_format=torch.channels_last), (1, 1), (2, 2), (1, 1), 1
        )
        self.register_buffer("bias", bias.detach(), persistent=False)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b high h2 w2"]:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.packed, self.bias, (1, 1), (2, 2), (1, 1), 1, "none", [], ""
        )
        return out


def backend() -> Backend:
    """The ops that work on this machine, by name."""
    ops: Backend = {
        "attend": attend, "paged_attend": paged_attend, "gather_pages": gather_pages,
    }  # fmt: skip
    if why_not_packed(torch.bfloat16):
        return ops
    return {**ops, "linear": _linear, "halve": _halve}


def _linear(
    x: Float[Tensor, "*b low"], weight: Float[Tensor, "high low"], bias: Float[Tensor, " high"]
) -> Float[Tensor, "*b high"]:
    if why_not_packed(x.dtype):
        return functional.linear(x, weight, bias)
    out: Tensor = PackedLinear(weight, bias)(x)
    return out


def _halve(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "high c 3 3"],
    bias: Float[Tensor, " high"],
) -> Float[Tensor, "b high h2 w2"]:
    if why_not_packed(x.dtype):
        return functional.conv2d(x, weight, bias, stride=2, padding=1)
    out: Tensor = PackedHalve(weight, bias)(x)
    return out
