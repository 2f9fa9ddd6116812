"""Experts of a transformers module, computed by our loop over experts. Called by its experts interface.

Dimension names: token, width, k (experts of a token), pair (token and one of its experts).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def run_module_experts(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """For each token the sum over its experts of weight * expert(x), [token, width] in hidden's dtype.

    `module` holds 3-D weights as all classes behind that interface do: `gate_up_proj` or `up_proj`, `down_proj`, with
    biases or transposed where its flags say so. Sums are float32, in the order of experts: a token's result does not
    depend on its batch beyond what the products do. Indices beyond the last expert mean: none.
    """
    experts: Any = module
    num_experts = experts.down_proj.shape[0]
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    tokens = order // top_k_index.shape[-1]
    pairs, weights_P = hidden[tokens], top_k_weights.flatten()[order, None]
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    start = 0
    for index, count in enumerate(flat.bincount().tolist()[:num_experts]):
        if not count:
            continue
        rows = slice(start, start + count)
        start += count
        inner = _linear(experts, first, "gate_up" if experts.has_gate else "up", index, pairs[rows])
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        out = _linear(experts, experts.down_proj, "down", index, inner)
        if experts.has_post_expert_norm:
            out = experts.post_expert_norm(out)
        total.index_add_(0, tokens[rows], (out * weights_P[rows]).float())
    return total.to(hidden.dtype)


def _linear(experts: Any, weights: Tensor, name: str, index: int, x: Tensor) -> Tensor:
    weight = weights[index].T if experts.is_transposed else weights[index]
    bias = getattr(experts, f"{name}_proj_bias")[index] if experts.has_bias else None
    return functional.linear(x, weight, bias)
