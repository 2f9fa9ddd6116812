"""Capacity: what fits into memory and into the arena. Called by cli's plan. Pure; knows sizes, no machine of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from ganglion.layout import DTYPE_BYTES
from ganglion.plan.footprint import KvGroupPlan, LanguageShape, Weights
from ganglion.units import MIB

RUNTIME_BYTES = 450 * MIB  # Python, torch and the server before anything is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bytes of one server process, and the sequences that its arena holds."""

    available_bytes: int
    weight_bytes: int
    workspace_bytes: int
    arena_bytes: int
    context: int
    num_rows: int  # that were asked for
    row_bytes: int  # pages of one sequence of `context` tokens
    num_rows_in_arena: int
    num_tokens_in_arena: int  # of a single sequence
    largest_arena_bytes: int  # that this machine has room for

    @property
    def needed_bytes(self) -> int:
        """All of the process."""
        return RUNTIME_BYTES + self.weight_bytes + self.workspace_bytes + self.arena_bytes

    @property
    def is_loadable(self) -> bool:
        """Does it fit into what is available?"""
        return self.needed_bytes <= self.available_bytes

    @property
    def needed_arena_bytes(self) -> int:
        """Arena of the rows that were asked for."""
        return self.num_rows * self.row_bytes


def workspace_bytes(
    shape: LanguageShape, *, dtype: str, chunk_tokens: int, num_rows: int, context: int
) -> int:
    """Largest temporary tensors of one step: one layer's activations, gathered pages of one layer, the logits."""
    value_bytes = DTYPE_BYTES[dtype]
    active = max(1, shape.num_active_experts)
    inner = max(shape.ffn_width, shape.expert_width * active)
    heads = shape.num_heads * (shape.head_dim + max(0, shape.latent_dim - shape.head_dim))
    per_token = (4 * shape.width + 3 * inner + 3 * heads) * value_bytes
    layer_kv = max((group.layer_bytes for group in shape.kv_groups(dtype)), default=0)
    logits = num_rows * shape.vocab_size * 4 * 2  # the scores and their softmax
    tokens = max(chunk_tokens, num_rows)
    return tokens * per_token + num_rows * context * layer_kv * 2 + logits


def fit(
    shape: LanguageShape,
    weights: Weights,
    *,
    dtype: str,
    available_bytes: int,
    arena_bytes: int,
    large_page_bytes: int,
    context: int,
    num_rows: int,
    chunk_tokens: int,
) -> Capacity:
    """What fits. `num_rows` sequences of `context` tokens are wanted."""
    groups = shape.kv_groups(dtype)
    workspace = workspace_bytes(
        shape, dtype=dtype, chunk_tokens=chunk_tokens, num_rows=num_rows, context=context
    )
    row = sum(group.row_bytes(context, large_page_bytes) for group in groups)
    rest = available_bytes - RUNTIME_BYTES - weights.served_bytes - workspace
    return Capacity(
        available_bytes=available_bytes,
        weight_bytes=weights.served_bytes,
        workspace_bytes=workspace,
        arena_bytes=arena_bytes,
        context=context,
        num_rows=num_rows,
        row_bytes=row,
        num_rows_in_arena=arena_bytes // row,
        num_tokens_in_arena=longest(
            groups, arena_bytes, large_page_bytes, at_most=shape.max_tokens
        ),
        largest_arena_bytes=max(0, rest // MIB * MIB),
    )


def longest(
    groups: Sequence[KvGroupPlan], arena_bytes: int, large_page_bytes: int, *, at_most: int
) -> int:
    """Tokens of the longest single sequence whose pages fit."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if sum(group.row_bytes(middle, large_page_bytes) for group in groups) <= arena_bytes:
            low = middle
        else:
            high = middle - 1
    return low
