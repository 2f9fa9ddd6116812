"""Patches: a flow policy's perception of the tokens that changed, the rest taken over; and which tokens matter.

Called by the policy's encode and prefill stages. Knows no gate, page or time: who calls says which tokens to compute.

| function | computes | the rest |
|---|---|---|
| encode_patches | features | exact: a token of a stack of stride-2 3x3 convolutions depends on the pixels less than `patch_px` from where it stands, and norms look at one position alone, so a crop with one token of margin above and to the left gives what the image gives |
| refill_observation | keys and values | lossy: VLA-Cache's reuse (arXiv 2502.02175) |
| view_attention | the tokens that the instruction attends to | - |

Dimension names: b batch row, h and w (pixels), row and column (of the token grid), token (of one view row by row, or of
all views end to end), text, obs, context, layer, head, dim, horizon, action, state, width: as in `flow`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ganglion.kernels import cpu
from ganglion.models.layers import Block, ConvStem, attend
from ganglion.models.policies.flow import FlowPolicy


class Box(NamedTuple):
    """Tokens [top, bottom) x [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def margins(self) -> tuple[int, int]:
        """Rows and columns of tokens that a crop has more than the box: none at the image's own edge."""
        return int(self.top > 0), int(self.left > 0)


def box_around(tokens: Bool[np.ndarray, "row column"]) -> Box | None:
    """The smallest box that holds all of `tokens`; None when there are none."""
    rows, columns = np.flatnonzero(tokens.any(axis=1)), np.flatnonzero(tokens.any(axis=0))
    if not len(rows):
        return None
    return Box(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def encode_patches(
    policy: FlowPolicy,
    view_index: int,
    images: UInt8[Tensor, "b h w 3"],
    old_features: Float[Tensor, "b token width"],
    tokens: Bool[np.ndarray, "b row column"],
) -> Float[Tensor, "b token width"]:
    """`policy.encode_view` at `tokens` (and around them, up to a box), `old_features` elsewhere; no input is written.

    Equal to `encode_view` everywhere when the tokens left out see no pixel that differs from the image behind
    `old_features`. Crops of one size go in one batch.
    """
    stem = cast("ConvStem", policy.stems[view_index])
    position = policy.view_position[view_index].view(*tokens.shape[1:], -1)
    features = old_features.clone(memory_format=torch.contiguous_format)
    by_place = features.view(len(features), *tokens.shape[1:], -1)
    crops: dict[tuple[int, ...], list[tuple[int, Box, Tensor]]] = defaultdict(list)
    for index, changed in enumerate(tokens):
        box = box_around(changed)
        if box is not None:
            crop = _crop(stem, images[index], box)
            crops[*crop.shape, *box.margins].append((index, box, crop))
    for group in crops.values():
        _fill(stem, position, by_place, group)
    return features


def _fill(
    stem: ConvStem,
    position: Float[Tensor, "row column width"],
    by_place: Float[Tensor, "b row column width"],
    group: Sequence[tuple[int, Box, UInt8[Tensor, "h w 3"]]],
) -> None:
    """Encode crops of one size and margin and put their tokens in place."""
    above, before = group[0][1].margins
    first = group[0][1]
    shape = (first.bottom - first.top + above, first.right - first.left + before)
    pixels = torch.stack([crop for _, _, crop in group]) if group[1:] else group[0][2][None]
    encoded = stem(pixels).view(len(group), *shape, by_place.shape[-1])[:, above:, before:]
    for at, (index, box, _) in enumerate(group):
        place = slice(box.top, box.bottom), slice(box.left, box.right)
        torch.add(encoded[at], position[place], out=by_place[index][place])


def _crop(stem: ConvStem, image: UInt8[Tensor, "h w 3"], box: Box) -> UInt8[Tensor, "h2 w2 3"]:
    """The box's pixels with the margin: it starts on a multiple of patch_px, as every layer's stride wants."""
    above, before = box.margins
    px = stem.patch_px
    return image[
        (box.top - above) * px : box.bottom * px, (box.left - before) * px : box.right * px
    ]


# --- the trunk: lossy, off by default ------------------------------------------------------------------------------------


def refill_observation(
    policy: FlowPolicy,
    features: Float[Tensor, "b token width"],
    state: Float[Tensor, "b state"],
    text_kv: Float[Tensor, "b layer 2 text head dim"],
    old_kv: Float[Tensor, "b layer 2 obs head dim"],
    tokens: Bool[np.ndarray, "b token"],
) -> Float[Tensor, "b layer 2 obs head dim"]:
    """`FlowPolicy.prefill_observation` for `tokens` of all views and the state; old keys and values elsewhere.

    VLA-Cache's reuse. Exact for all tokens; otherwise lossy: the kept tokens do not hear of the changed ones until the
    next whole prefill. All rows take as many tokens as the one with most.
    """
    at = _padded(tokens)
    rows = torch.arange(len(at))[:, None]
    x = torch.cat([features, policy.state_in(state.to(features.dtype))[:, None]], dim=1)[rows, at]
    # [row, layer, token, 2, head, dim], as attention wants it
    observation_kv = old_kv.transpose(2, 3).clone(memory_format=torch.contiguous_format)
    for layer, block in enumerate(cast("Iterable[Block]", policy.trunk)):
        query, key_value = block.project(x)
        observation_kv[rows, layer, at] = key_value
        keys_values = torch.cat(
            [text_kv[:, layer].transpose(1, 2), observation_kv[:, layer]], dim=1
        )
        x = block.finish(x, attend(query, *keys_values.unbind(2)))
    last: Tensor = policy.last_kv(policy.last_norm(x))
    observation_kv[rows, -1, at] = last.view(*at.shape, *observation_kv.shape[3:])
    return observation_kv.transpose(2, 3)


def _padded(tokens: Bool[np.ndarray, "b token"]) -> Int[Tensor, "b changed"]:
    """Places of each row's tokens and of its state; short rows name the state again, which changes nothing."""
    rows, num_view_tokens = tokens.shape
    at = np.full((rows, int(tokens.sum(axis=1).max(initial=0)) + 1), num_view_tokens)
    for row, changed in enumerate(tokens):
        places = changed.nonzero()[0]
        at[row, : len(places)] = places
    return torch.from_numpy(at)


# --- what the instruction attends to -------------------------------------------------------------------------------------


def view_attention(
    policy: FlowPolicy,
    x: Float[Tensor, "b horizon action"],
    tau: Float[Tensor, "b horizon"],
    context_kv: Float[Tensor, "b layer 2 context head dim"],
) -> Float[Tensor, "b view token"]:
    """How the action tokens share out their attention to each view's tokens; a view's shares sum to 1.

    VLA-Cache asks which image tokens the text attends to. Here text sees text alone, and what reads the image for the
    sake of the instruction is the action expert: its tokens attend to text and image at once. So this is the mean, over
    its layers, heads and tokens, at one flow step (`x` at `tau`: the last but one of a chunk is a good choice).
    """
    config = policy.config
    first = config.num_text_tokens
    num_seen = config.num_views * config.num_view_tokens
    hidden = policy._embedded(x.to(policy.dtype), tau)
    total = torch.zeros(len(x), num_seen)
    for block, layer_kv in zip(
        cast("Iterable[Block]", policy.expert), context_kv.unbind(1), strict=True
    ):
        query, key_value = block.project(hidden)
        keys, values = torch.cat([layer_kv.transpose(1, 2), key_value], dim=1).unbind(2)
        out, lse = cpu.attend(query, keys, values)
        scores = torch.einsum("bthd,bkhd->bthk", query, keys[:, first : first + num_seen])
        weights = (scores.float() * query.shape[-1] ** -0.5 - lse[..., None]).exp()
        total += weights.mean(dim=(1, 2))
        hidden = block.finish(hidden, out.flatten(2))
    by_view = total.view(len(x), config.num_views, config.num_view_tokens)
    return by_view / by_view.sum(dim=-1, keepdim=True)


def attended(
    shares: Float[Tensor, "b view token"], *, factor: float = 2.0
) -> Bool[np.ndarray, "b view token"]:
    """Tokens that get at least `factor` times an even share of their view's attention."""
    mask: Bool[np.ndarray, "b view token"] = (shares * shares.shape[-1] >= factor).numpy()
    return mask
