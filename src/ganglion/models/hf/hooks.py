"""Hooks: our names among transformers' attentions, masks and experts. The only place that imports its registries.

Called once for each module that is loaded; registering again changes nothing. A module whose config names `ATTENTION`
computes attention as its seat says.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ganglion.models.hf.experts import run_module_experts
from ganglion.models.hf.seat import seat_of

ATTENTION, SURVEYED = "ganglion", "ganglion_surveyed"  # the second one is given masks
EXPERTS = "ganglion"
WINDOW = (
    "ganglion_window"  # attribute of a mask: None, or tokens that a token sees, itself among them
)


def register() -> None:
    """Make our names known."""
    for name in (ATTENTION, SURVEYED):
        ALL_ATTENTION_FUNCTIONS.register(name, _attend)
    # no mask function under `ATTENTION`: then transformers makes no mask at all
    ALL_MASK_ATTENTION_FUNCTIONS.register(SURVEYED, _mask)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, run_module_experts)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    attend = seat_of(module).attend
    assert attend is not None, f"{type(module).__name__} attends outside of a pass"
    return attend(module, query, key, value, attention_mask, **options), None


def _mask(*, mask_function: Callable[..., Tensor], **options: Any) -> Tensor | None:
    """As for `sdpa`, but always written out, and with the window that it stands for."""
    options["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(mask_function=mask_function, **options)
    if mask is not None:
        setattr(mask, WINDOW, _window(mask_function, options.get("local_size")))
    return mask


def _window(mask_function: Callable[..., Tensor], size: int | None) -> int | None:
    """Of a mask that is asked point by point. Raises ValueError for one that is no causal window."""
    near = size or 8
    asks = [0, 1, near - 1, near, near + 1, 2 * near + 3, 8 * near]
    keys = sorted({at for ask in asks for at in range(ask - near - 2, ask + 3) if at >= 0})
    ask, key = torch.tensor(asks)[:, None], torch.tensor(keys)[None]
    zero = torch.tensor(0)
    got = mask_function(zero, zero, ask, key).expand(len(asks), len(keys))
    want = key <= ask
    if size is not None:
        want &= key > ask - size
    if not bool((got == want).all()):
        raise ValueError("its attention is neither causal nor a causal sliding window")
    return size
