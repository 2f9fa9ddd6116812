"""Decoders to train: the shape of Qwen3 (dense) and Qwen3-MoE, with a gradient.

Owns their mathematics and their names in a checkpoint. Called by `train.lm`. The serving decoder is inference code over
pages; this is whole sequences in plain torch, and tests hold both against transformers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ganglion.train.lm_corpus import VOCAB_SIZE

_ROWS_MULTIPLE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LmConfig:
    """Sizes. `num_experts` 0: a dense feed-forward of `intermediate_size`; else each expert has that size."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 64
    num_experts: int = 32
    num_experts_per_token: int = 4
    vocab_size: int = VOCAB_SIZE
    max_tokens: int = 2048
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    is_tied: bool = False  # one matrix for embedding and scores

    @property
    def is_moe(self) -> bool:
        """Whether there are experts and routers."""
        return self.num_experts > 0


MOE = LmConfig()
DENSE = LmConfig(intermediate_size=256, num_experts=0, num_experts_per_token=0, is_tied=True)


@dataclass(frozen=True, slots=True)
class Routing:
    """Of one layer: probabilities [token, expert] before the choice, and the chosen experts [token, choice]."""

    probabilities: Tensor
    experts: Tensor


class RmsNorm(nn.Module):
    """Root-mean-square norm with a scale."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


class Attention(nn.Module):
    """Grouped-query attention with norms on queries and keys, rotary positions, causal."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        self._dim, self._num_kv_heads = dim, config.num_kv_heads
        self._num_heads = config.num_heads
        self.q_proj = nn.Linear(width, config.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * dim, width, bias=False)
        self.q_norm = RmsNorm(dim, config.norm_epsilon)
        self.k_norm = RmsNorm(dim, config.norm_epsilon)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        rows, length, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(rows, length, self._num_heads, self._dim))
        key = self.k_norm(self.k_proj(x).view(rows, length, self._num_kv_heads, self._dim))
        value = self.v_proj(x).view(rows, length, self._num_kv_heads, self._dim)
        query, key = rotate(query.transpose(1, 2), turn), rotate(key.transpose(1, 2), turn)
        heads_per_kv = self._num_heads // self._num_kv_heads
        key = key.repeat_interleave(heads_per_kv, 1)
        value = value.transpose(1, 2).repeat_interleave(heads_per_kv, 1)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return joined


class Mlp(nn.Module):
    """Gated feed-forward, SiLU."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Moe(nn.Module):
    """Softmax over all experts, the best `num_experts_per_token`, their weights scaled to sum 1; no token is dropped."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        width, inner, num_experts = (
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
        )
        self._num_choices = config.num_experts_per_token
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, inner))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, -2)
        probabilities = self.gate(tokens).float().softmax(-1)
        weights, experts = probabilities.topk(self._num_choices, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        token_of = order // self._num_choices
        counts = experts.flatten().bincount(minlength=len(self.down))
        # each expert's rows are filled up to a multiple: matrix kernels are made once for every new size
        padded = (counts + _ROWS_MULTIPLE - 1) // _ROWS_MULTIPLE * _ROWS_MULTIPLE
        ends = padded.cumsum(0)
        shift = (ends - padded) - (counts.cumsum(0) - counts)
        place = torch.arange(len(order)) + shift[experts.flatten()[order]]
        rows = tokens.new_zeros(int(ends[-1]), tokens.shape[1]).index_copy(
            0, place, tokens[token_of]
        )
        offsets = ends.to(torch.int32)
        inner = functional.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=offsets)
        gate, up = inner.chunk(2, dim=-1)
        inner = functional.silu(gate) * up
        outs = functional.grouped_mm(inner, self.down.transpose(1, 2), offs=offsets)[place]
        weighted = outs * weights.flatten()[order, None].to(x.dtype)
        out = torch.zeros_like(tokens).index_add(0, token_of, weighted)
        return out.view_as(x), Routing(probabilities, experts)


class Layer(nn.Module):
    """Attention, then feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = Moe(config) if config.is_moe else Mlp(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        out = self.mlp(self.post_attention_layernorm(x))
        if isinstance(out, Tensor):
            return x + out, None
        return x + out[0], out[1]


class TrainedLm(nn.Module):
    """Token ids [row, length] to scores [row, length, vocab]."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.lm_head = (
            None if config.is_tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def initialise(self, seed: int) -> None:
        """Normal weights, deviation 0.02; what adds to the residual is scaled down with depth."""
        generator = torch.Generator().manual_seed(seed)
        deep = 0.02 / (2 * self.config.num_layers) ** 0.5
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.ndim > 1:
                    adds = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
                    value.normal_(0.0, deep if adds else 0.02, generator=generator)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """Scores, float32, and each layer's routing (empty when dense)."""
        hidden = self.embed_tokens(token_ids)
        turn = turns(self.config, token_ids.shape[1], hidden.dtype)
        routings = []
        for layer in self.layers:
            hidden, routing = layer(hidden, turn)
            if routing is not None:
                routings.append(routing)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return functional.linear(self.norm(hidden), head).float(), tuple(routings)

    def checkpoint(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights under the names that Qwen3 and Qwen3-MoE have in transformers."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            stem = name if name.startswith("lm_head") else f"model.{name}"
            if name.endswith("mlp.gate_up"):
                for expert, matrix in enumerate(value):
                    gate, up = matrix.chunk(2, dim=0)
                    prefix = f"{stem.removesuffix('gate_up')}experts.{expert}"
                    tensors[f"{prefix}.gate_proj.weight"] = gate
                    tensors[f"{prefix}.up_proj.weight"] = up
            elif name.endswith("mlp.down"):
                for expert, matrix in enumerate(value):
                    prefix = f"{stem.removesuffix('down')}experts.{expert}"
                    tensors[f"{prefix}.down_proj.weight"] = matrix
            else:
                tensors[stem] = value
        return {name: value.to(dtype).contiguous().clone() for name, value in tensors.items()}


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, halves paired as in Llama; x [row, head, length, dim]."""
    cos, sin = turn
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def turns(config: LmConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, dim] of positions 0 to `length` - 1."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), config.rope_theta**-steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def balance_loss(routings: tuple[Routing, ...]) -> Tensor:
    """Mean over layers of experts x sum(share of choices x mean probability): 1 when all experts are used alike."""
    losses = []
    for routing in routings:
        num_experts = routing.probabilities.shape[-1]
        counts = routing.experts.flatten().bincount(minlength=num_experts)
        share = counts.float() / routing.experts.numel()
        losses.append(num_experts * (share * routing.probabilities.mean(0)).sum())
    return torch.stack(losses).mean()
