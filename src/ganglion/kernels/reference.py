"""Reference: every op of the contract in plain torch, computed in float32. The truth that backends are held to.

Called by `check` and by tests, on any device. Dimension names: `contract`.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from ganglion.kernels.contract import Attended, Backend


def attend(
    query: Float[Tensor, "b token head dim"],
    key: Float[Tensor, "b key head dim"],
    value: Float[Tensor, "b key head dim"],
    mask: Float[Tensor, "#b 1 1 key"] | None = None,
) -> Attended:
    """Every token asks every key; `mask` is added to the scores."""
    scores = _scores(query, key) if mask is None else _scores(query, key) + mask.float()
    return _attend(scores, value, query.dtype)


def merge(*parts: Attended) -> Attended:
    """Attention to disjoint sets of keys -> attention to all of them."""
    lse = torch.stack([part.lse for part in parts])
    total = lse.logsumexp(0)
    share = (lse - _finite(total)).exp()
    out = sum(
        (part.out.float() * weight[..., None] for part, weight in zip(parts, share, strict=True)),
        start=torch.zeros(()),
    )
    return Attended(out=out.to(parts[0].out.dtype), lse=total)


def paged_attend(
    query: Float[Tensor, "b token head dim"],
    pages: Float[Tensor, "page slot layer 2 head dim"],
    layer: int,
    ids: Int[Tensor, "b span"],
    num_keys: Int[Tensor, " b"],
) -> Attended:
    """Keys are the first `num_keys` slots of the row's pages laid end to end."""
    key, value = pages[ids][:, :, :, layer].flatten(1, 2).unbind(2)
    is_hidden = torch.arange(key.shape[1], device=ids.device) >= num_keys[:, None]
    scores = _scores(query, key).masked_fill(is_hidden[:, None, None], -torch.inf)
    # what stands behind the last key may be anything, even NaN, and zero times NaN is not zero
    value = value.masked_fill(is_hidden[:, :, None, None], 0.0)
    return _attend(scores, value, query.dtype)


def gather_pages(
    pages: Shaped[Tensor, "page slot *rest"], ids: Int[Tensor, "b span"]
) -> Shaped[Tensor, "b span slot *rest"]:
    """Copies of pages, row by row."""
    return pages[ids]


def linear(
    x: Float[Tensor, "*b low"], weight: Float[Tensor, "high low"], bias: Float[Tensor, " high"]
) -> Float[Tensor, "*b high"]:
    """One affine map of every row."""
    return (torch.matmul(x.float(), weight.float().T) + bias.float()).to(x.dtype)


def halve(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "high c 3 3"],
    bias: Float[Tensor, " high"],
) -> Float[Tensor, "b high h2 w2"]:
    """3x3 convolution of stride 2 and padding 1: both sides are halved, rounding up."""
    out = functional.conv2d(x.float(), weight.float(), bias.float(), stride=2, padding=1)
    return out.to(x.dtype)


def backend() -> Backend:
    """All ops by name."""
    return {
        "attend": attend,
        "merge": merge,
        "paged_attend": paged_attend,
        "gather_pages": gather_pages,
        "linear": linear,
        "halve": halve,
    }


def _scores(
    query: Float[Tensor, "b token head dim"], key: Float[Tensor, "b key head dim"]
) -> Float[Tensor, "b head token key"]:
    scaled = query.float() * float(query.shape[-1]) ** -0.5
    return torch.einsum("bthd,bkhd->bhtk", scaled, key.float())


def _attend(
    scores: Float[Tensor, "b head token key"],
    value: Float[Tensor, "b key head dim"],
    dtype: torch.dtype,
) -> Attended:
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhtk,bkhd->bthd", (scores - _finite(lse)[..., None]).exp(), value.float())
    return Attended(out=out.to(dtype), lse=lse.transpose(1, 2))


def _finite(lse: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Zero instead of -inf: who asked no key has weights exp(-inf - 0) = 0, not NaN."""
    return lse.nan_to_num(neginf=0.0)
