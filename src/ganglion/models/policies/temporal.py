"""TemporalPolicy: a FlowPolicy that remembers, by pages of earlier observations and by one recurrent state.

Owns the network only: a frozen FlowPolicy's trunk sees, `Memory` keeps, the same action expert reads both. Called by
`models.policies.temporal_model` and by `train`. Knows nothing of pages' ids, sessions or retention.

Of each observation a *memory page* stays: what the trunk's last layer said of each view and of the state, pooled over
tokens, the state itself and a stamp. Two roads lead from there to the expert, which attends to both:

| road | what is carried | grows with time |
|---|---|---|
| history | the memory pages of up to T earlier observations, each one token | yes: pages are dropped by worth |
| recurrent | one vector: a GRU over all observations of the session | no |

Memory tokens attend to text and observation, not to each other: what the expert pays to a token it pays to that page
alone (`relevance`). Absent pages and an absent recurrent state become learned tokens, so no mask is needed and an arm
without a past is served like any other. Without memory tokens the context is the FlowPolicy's own, to the last bit.

Dimension names: as in `flow`; past (T remembered observations), row (of a memory page), column, memory (T + 1 tokens),
hidden (of the GRU), b batch row.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional

from ganglion.kernels.cpu import attend as attended
from ganglion.models.layers import Block, attend, time_features
from ganglion.models.policies.flow import FlowConfig, FlowPolicy

# Digits of a page's stamp. 127 marks a written page and is the largest of its row: int8 keeps all of them exactly.
STAMP_BASE = 127
NUM_STAMP_DIGITS = 4
NUM_STAMPS = STAMP_BASE**NUM_STAMP_DIGITS  # observation numbers are told apart modulo 260 million
AGE_SCALE = 64.0  # observations; ages beyond it look alike

# What a memory leaves as it was; the rest of the FlowPolicy, its action expert, learns to read memory tokens.
FROZEN = (
    "flow.stems.", "flow.view_position", "flow.word.", "flow.text_position", "flow.state_in.",
    "flow.trunk.", "flow.last_norm.", "flow.last_kv.",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalConfig:
    """Sizes of the memory; they stand in config.json beside the FlowPolicy's."""

    num_past: int = 7  # T
    hidden_dim: int = 192

    def num_memory_tokens(self) -> int:
        """Tokens that the expert reads beside text and observation."""
        return self.num_past + 1


def memory_page_shape(flow: FlowConfig) -> tuple[int, int]:
    """Rows and columns of a memory page: one row per view, one for the state token, the state, the stamp."""
    return flow.num_views + 3, 2 * flow.num_heads * flow.head_dim


class Gru(nn.Module):
    """A gated recurrent unit whose state stays float32, so that what is kept over many observations does not wear."""

    def __init__(self, low: int, hidden_dim: int) -> None:
        super().__init__()
        self.x_in = nn.Linear(low, 3 * hidden_dim)
        self.hidden_in = nn.Linear(hidden_dim, 3 * hidden_dim)
        with (
            torch.no_grad()
        ):  # starts out remembering: a gradient must first reach the beginning of an episode
            self.x_in.bias[hidden_dim : 2 * hidden_dim] += 2.0

    def forward(
        self, x: Float[Tensor, "b low"], hidden: Float32[Tensor, "b hidden"]
    ) -> Float32[Tensor, "b hidden"]:
        return self.update(self.x_in(x), hidden)

    def update(
        self, from_x: Float[Tensor, "b gate"], hidden: Float32[Tensor, "b hidden"]
    ) -> Float32[Tensor, "b hidden"]:
        """`forward` of an input that `x_in` has seen already: training projects a whole episode at once."""
        from_hidden = self.hidden_in(hidden.to(from_x.dtype)).float()
        x_reset, x_keep, x_new = from_x.float().chunk(3, dim=-1)
        hidden_reset, hidden_keep, hidden_new = from_hidden.chunk(3, dim=-1)
        keep = torch.sigmoid(x_keep + hidden_keep)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + hidden_reset) * hidden_new)
        return torch.lerp(new, hidden, keep)


class Memory(nn.Module):
    """From memory pages and a recurrent state to keys and values for the expert."""

    def __init__(self, flow: FlowConfig, config: TemporalConfig) -> None:
        super().__init__()
        self.config, self.flow_config = config, flow
        width = flow.trunk_width
        heads = {"num_heads": flow.num_heads, "head_dim": flow.head_dim}
        num_rows, num_columns = memory_page_shape(flow)
        self.row_norm = nn.LayerNorm(num_columns)
        self.rows_in = nn.Linear((num_rows - 2) * num_columns, width)
        self.state_in = nn.Linear(flow.state_dim, width)
        self.page_out = nn.Linear(width, width)
        self.age_in = nn.Linear(flow.num_time_features, width)
        self.absent = nn.Parameter(torch.randn(width) * 0.1)
        self.gru = Gru(width, config.hidden_dim)
        self.hidden_in = nn.Linear(config.hidden_dim, width)
        self.fresh = nn.Parameter(torch.randn(width) * 0.1)  # in place of a state never written
        self.trunk = nn.ModuleList(
            Block(width=width, mlp_width=flow.trunk_mlp_width, **heads)
            for _ in range(flow.num_layers - 1)
        )
        self.last_norm = nn.LayerNorm(width)
        self.last_kv = nn.Linear(width, 2 * flow.num_heads * flow.head_dim)

    @property
    def _blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.trunk)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.absent.dtype

    def encode(self, pages: Float[Tensor, "*b row column"]) -> Float[Tensor, "*b width"]:
        """One vector per memory page, whatever its age."""
        pages = pages.to(self.dtype)
        rows = self.row_norm(pages[..., :-2, :]).flatten(-2)
        state = pages[..., -2, : self.flow_config.state_dim]
        encoded: Tensor = self.page_out(functional.silu(self.rows_in(rows) + self.state_in(state)))
        return encoded

    def history_tokens(
        self,
        encoded: Float[Tensor, "b past width"],
        age: Float32[Tensor, "b past"],
        is_written: Bool[Tensor, "b past"],
    ) -> Float[Tensor, "b past width"]:
        """Encoded pages with their ages (in observations); pages that are not there become the absent token."""
        share = torch.log1p(age.clamp(0.0, AGE_SCALE)) / torch.log1p(torch.tensor(AGE_SCALE))
        features = time_features(share, self.flow_config.num_time_features).to(self.dtype)
        tokens: Tensor = encoded + self.age_in(features)
        return torch.where(is_written[..., None], tokens, self.absent.to(tokens.dtype))

    def recurrent_token(
        self, hidden: Float32[Tensor, "b hidden"], is_written: Bool[Tensor, " b"]
    ) -> Float[Tensor, "b 1 width"]:
        """The recurrent state as one token."""
        token: Tensor = self.hidden_in(hidden.to(self.dtype))
        return torch.where(is_written[:, None], token, self.fresh.to(token.dtype))[:, None]

    def project(
        self,
        tokens: Float[Tensor, "b memory width"],
        context_kv: Float[Tensor, "b layer 2 context head dim"],
    ) -> Float[Tensor, "b layer 2 memory head dim"]:
        """Keys and values of memory tokens, all layers, each token having attended to text and observation."""
        layers, x = [], tokens
        for block, layer_kv in zip(self._blocks, context_kv.unbind(1)[:-1], strict=True):
            query, key_value = block.project(x)
            layers.append(key_value)
            keys, values = layer_kv.transpose(1, 2).unbind(2)
            x = block.finish(x, attend(query, keys, values))
        last: Tensor = self.last_kv(self.last_norm(x))
        heads = (self.flow_config.num_heads, self.flow_config.head_dim)
        layers.append(last.view(*x.shape[:-1], 2, *heads))
        return torch.stack(layers, dim=1).transpose(2, 3)


class TemporalPolicy(nn.Module):
    """The network, in stages that a server batches and schedules one by one."""

    def __init__(self, flow: FlowConfig, config: TemporalConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = FlowPolicy(flow)
        self.memory = Memory(flow, config)

    @classmethod
    def from_flow(cls, flow: FlowPolicy, config: TemporalConfig) -> "TemporalPolicy":
        """A fresh memory around a trained policy. Its tokens start out being read as the trunk's own are."""
        policy = cls(flow.config, config)
        policy.flow.load_state_dict(flow.state_dict())
        for name in ("trunk", "last_norm", "last_kv"):
            getattr(policy.memory, name).load_state_dict(getattr(flow, name).state_dict())
        return policy

    def trained(self) -> dict[str, Tensor]:
        """The weights that are not the trunk's, by name: what a checkpoint holds."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(FROZEN)}

    def sizes(self) -> dict[str, int]:
        """The memory's sizes, for config.json."""
        return asdict(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.flow.dtype

    def remember(
        self,
        observation_kv: Float[Tensor, "b layer 2 obs head dim"],
        state: Float[Tensor, "b state"],
        seq: Int[Tensor, " b"],
    ) -> Float[Tensor, "b row column"]:
        """The memory page of an observation. The last layer's keys and values are a linear image of all it holds."""
        flow = self.flow.config
        last = observation_kv[:, -1].permute(0, 2, 1, 3, 4).flatten(2)  # [b, obs, column]
        views = last[:, :-1].reshape(len(last), flow.num_views, flow.num_view_tokens, -1).mean(2)
        num_rows, num_columns = memory_page_shape(flow)
        page = last.new_zeros((len(last), num_rows, num_columns))
        page[:, : flow.num_views] = views
        page[:, -3] = last[:, -1]
        page[:, -2, : flow.state_dim] = state.to(page.dtype)
        page[:, -1, : NUM_STAMP_DIGITS + 1] = stamp(seq).to(page.dtype)
        return page

    def advance(
        self, hidden: Float32[Tensor, "b hidden"], page: Float[Tensor, "b row column"]
    ) -> Float32[Tensor, "b hidden"]:
        """The recurrent state after one more observation; zeros before the first."""
        state: Tensor = self.memory.gru(self.memory.encode(page), hidden)
        return state

    def recall(
        self,
        past: Float[Tensor, "b past row column"],
        hidden: Float32[Tensor, "b hidden"],
        seq: Int[Tensor, " b"],
        context_kv: Float[Tensor, "b layer 2 context head dim"],
    ) -> Float[Tensor, "b layer 2 memory head dim"]:
        """Keys and values of the memory. Pages of zeros are absent; so is a recurrent state of zeros."""
        is_written, written_seq = read_stamp(past[:, :, -1])
        age = ((seq[:, None] - written_seq) % NUM_STAMPS).float()
        history = self.memory.history_tokens(self.memory.encode(past), age, is_written)
        recurrent = self.memory.recurrent_token(hidden, hidden.ne(0.0).any(-1))
        return self.memory.project(torch.cat([history, recurrent], dim=1), context_kv)

    def probe(self, num_tokens: int = 4) -> Float[Tensor, "1 probe width"]:
        """Action tokens spread over the chunk, at flow time 0 without noise: there the choice between futures is made.

        They depend on the weights alone.
        """
        flow = self.flow
        places = torch.linspace(0, flow.config.horizon - 1, num_tokens).long()
        zero = torch.zeros(1, flow.config.horizon, flow.config.action_dim, dtype=flow.dtype)
        return flow._embedded(zero, torch.zeros(1, flow.config.horizon))[:, places]

    @torch.inference_mode()
    def relevance(
        self,
        context_kv: Float[Tensor, "b layer 2 context head dim"],
        probe: Float[Tensor, "1 probe width"],
    ) -> Float32[Tensor, "b memory"]:
        """Share of the expert's attention that each memory token receives, the last tokens of `context_kv`.

        Mean over layers, heads and the action tokens of `probe`, which attend to the context and to each other.
        """
        expert = list(cast("Iterable[Block]", self.flow.expert))
        num_memory = self.config.num_memory_tokens()
        num_context = context_kv.shape[3]
        hidden = probe.expand(len(context_kv), -1, -1)
        total = torch.zeros(len(context_kv), num_memory)
        for at, block in enumerate(expert):
            query, key_value = block.project(hidden)
            keys_values = torch.cat([context_kv[:, at].transpose(1, 2), key_value], dim=1)
            keys, values = keys_values.unbind(2)
            out, lse = attended(query, keys, values)
            asked = keys[:, num_context - num_memory : num_context].float().permute(0, 2, 3, 1)
            scores = query.float().transpose(1, 2) @ asked * query.shape[-1] ** -0.5
            total += (scores - lse.transpose(1, 2)[..., None]).exp().mean((1, 2))
            if at + 1 < len(expert):  # nothing reads the last one's output
                hidden = block.finish(hidden, out.flatten(2))
        return total / len(expert)


def stamp(seq: Int[Tensor, " b"]) -> Int[Tensor, "b digit"]:
    """A mark that says "written", then the observation's number in digits, the lowest first."""
    digits = [seq // STAMP_BASE**place % STAMP_BASE for place in range(NUM_STAMP_DIGITS)]
    return torch.stack([torch.full_like(seq, STAMP_BASE), *digits], dim=-1)


def read_stamp(
    row: Float[Tensor, "b past column"],
) -> tuple[Bool[Tensor, "b past"], Int[Tensor, "b past"]]:
    """Whether the page was ever written, and the number of its observation."""
    digits = row[..., 1 : NUM_STAMP_DIGITS + 1].float().round().long()
    places = STAMP_BASE ** torch.arange(NUM_STAMP_DIGITS)
    return row[..., 0] > 0, (digits * places).sum(-1)
