"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed. Called by `models.decoder`. Knows no page.

What is kept of a token is one key for all heads: its latent, of which keys and values are linear maps, and a part that
holds its position. The map to keys is applied to the query, the map to values to what comes back, so attention runs
over the latents themselves (the values are their first `kv_rank` numbers) and nothing is ever expanded.

Dimension names: token, width, head, rank (of the latent), nope and rope (dims of a query without and with position),
key (rank + rope), value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.models.language import KvSpace
from ganglion.models.lora import LayerDeltas, LoraPiece
from ganglion.models.rotary import Rotation, rotate

MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")
NORM_EPSILON = 1e-6  # of both norms, whatever the config says of the others


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """One layer. `q_rank` None: queries are projected in one go. `is_interleaved`: dims (2i, 2i + 1) rotate together."""

    width: int
    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    has_bias: bool = False
    is_interleaved: bool = True

    @property
    def key_dim(self) -> int:
        """Numbers that a token's page row holds; `KvGroup.value_dim` is `kv_rank`."""
        return self.kv_rank + self.rope_dim


def mla_spec(config: Mapping[str, Any]) -> MlaSpec | None:
    """All layers of a Hugging Face config; None: its attention is another. Raises CheckpointError for bad sizes."""
    family = config.get("model_type")
    if family not in MLA_FAMILIES:
        return None
    sizes = {name: config.get(name) for name in _SIZES}
    sizes["q_lora_rank"] = config.get("q_lora_rank") or 1  # absent or null: in one go
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"config.json of {family}: {name} must be a number >= 1, is {value!r}",
                next_step="compare config.json with the one that the model was published with",
            )
    nope_dim, rope_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    if rope_dim % 2:
        raise CheckpointError(
            f"config.json of {family}: qk_rope_head_dim must be even, is {rope_dim}",
            next_step="compare config.json with the one that the model was published with",
        )
    return MlaSpec(
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        q_rank=config.get("q_lora_rank"),
        kv_rank=config["kv_lora_rank"],
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=config["v_head_dim"],
        scale=(nope_dim + rope_dim) ** -0.5 * _stretch(config),
        has_bias=bool(config.get("attention_bias", False)),
        is_interleaved=family == "deepseek_v2" or config.get("rope_interleave", True) is not False,
    )


_SIZES = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip


def _stretch(config: Mapping[str, Any]) -> float:
    """Stretched contexts (YaRN) get sharper scores: `mscale_all_dim` says how much."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    all_dims, factor = rope.get("mscale_all_dim") or 0.0, rope.get("factor") or 1.0
    if kind == "default" or not all_dims or factor <= 1.0:
        return 1.0
    return float((0.1 * all_dims * math.log(factor) + 1.0) ** 2)


class Mla(nn.Module):
    """One layer's attention. Parameters have the names that checkpoints give them below `self_attn`."""

    def __init__(self, spec: MlaSpec, *, layer: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        query_width = spec.num_heads * (spec.nope_dim + spec.rope_dim)
        value_width = spec.num_heads * spec.value_dim
        self.q_proj: nn.Linear | None = None
        if spec.q_rank is None:
            self.q_proj = nn.Linear(spec.width, query_width, bias=False, dtype=dtype)
        else:
            self.q_a_proj = nn.Linear(spec.width, spec.q_rank, bias=spec.has_bias, dtype=dtype)
            self.q_a_layernorm = nn.RMSNorm(spec.q_rank, eps=NORM_EPSILON, dtype=dtype)
            self.q_b_proj = nn.Linear(spec.q_rank, query_width, bias=False, dtype=dtype)
        self.kv_a_proj_with_mqa = nn.Linear(
            spec.width, spec.key_dim, bias=spec.has_bias, dtype=dtype
        )
        self.kv_a_layernorm = nn.RMSNorm(spec.kv_rank, eps=NORM_EPSILON, dtype=dtype)
        self.kv_b_proj = nn.Linear(
            spec.kv_rank,
            spec.num_heads * (spec.nope_dim + spec.value_dim),
            bias=False,
            dtype=dtype,
        )
        self._to_key: Tensor | None
        self._to_value: Tensor | None
        self.register_buffer("_to_key", None, persistent=False)
        self.register_buffer("_to_value", None, persistent=False)
        self.o_proj = nn.Linear(value_width, spec.width, bias=spec.has_bias, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "token width"],
        by: Rotation,
        kv: KvSpace,
        deltas: LayerDeltas | None = None,
    ) -> Float[Tensor, "token width"]:
        """`by`: rotation at the tokens' positions of `rope_dim` numbers."""
        spec = self.spec
        kept = self._product("kv_a_proj_with_mqa", x, deltas)
        latent, position = torch.split(kept, [spec.kv_rank, spec.rope_dim], -1)
        key = torch.cat(
            [self.kv_a_layernorm(latent), self._rotate(position[:, None], by)[:, 0]], -1
        )
        to_key, to_value = self._maps()
        plain, turned = torch.split(self._query(x, deltas), [spec.nope_dim, spec.rope_dim], -1)
        asked = torch.bmm(plain.transpose(0, 1), to_key).transpose(0, 1)
        if deltas is not None:
            self._adapt_keys(plain, asked, deltas)
        query = torch.cat([asked, self._rotate(turned, by)], dim=-1)
        found = kv.attend(self.layer, query, key[:, None], None, scale=spec.scale)
        value = torch.bmm(found.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)
        if deltas is not None:
            self._adapt_values(found, value, deltas)
        return self._product("o_proj", value.flatten(1), deltas)

    def _query(
        self, x: Float[Tensor, "token width"], deltas: LayerDeltas | None
    ) -> Float[Tensor, "token head nope_rope"]:
        if self.q_proj is not None:
            query = self._product("q_proj", x, deltas)
        else:
            narrow = self.q_a_layernorm(self._product("q_a_proj", x, deltas))
            query = self._product("q_b_proj", narrow, deltas)
        return query.view(x.shape[0], self.spec.num_heads, -1)

    def _product(
        self, name: str, x: Float[Tensor, "token low"], deltas: LayerDeltas | None
    ) -> Float[Tensor, "token high"]:
        out: Tensor = self.get_submodule(name)(x)
        if deltas is not None:
            deltas.add(f"attention.{name}", x, out)
        return out

    def _adapt_keys(
        self,
        plain: Float[Tensor, "token head nope"],
        asked: Float[Tensor, "token head rank"],
        deltas: LayerDeltas,
    ) -> None:
        """What adapters add to the map to keys, applied to the query like the map itself."""
        for rows, piece in deltas.pieces("attention.kv_b_proj"):
            to_key, _ = self._parted(piece)
            narrow = torch.einsum("thn,rhn->thr", plain[rows], to_key)
            asked[rows] += narrow @ piece.down

    def _adapt_values(
        self,
        found: Float[Tensor, "token head rank"],
        value: Float[Tensor, "token head value"],
        deltas: LayerDeltas,
    ) -> None:
        for rows, piece in deltas.pieces("attention.kv_b_proj"):
            _, to_value = self._parted(piece)
            narrow = found[rows] @ piece.down.T
            value[rows] += torch.einsum("thr,rhv->thv", narrow, to_value)

    def _parted(
        self, piece: LoraPiece
    ) -> tuple[Float[Tensor, "low head nope"], Float[Tensor, "low head value"]]:
        """`kv_b_proj`'s rows are each head's part of keys, then its values."""
        (columns,) = piece.columns
        up = columns.up.view(len(columns.up), self.spec.num_heads, -1)
        return up[..., : self.spec.nope_dim], up[..., self.spec.nope_dim :]

    def absorb(self) -> None:
        """Lay the maps of the latent out for serving, instead of `kv_b_proj`: cannot be trained or saved then.

        A product over heads first copies a map that is not in one piece, which takes ten times as long as the product.
        """
        if self._to_key is None:
            self._to_key, self._to_value = (part.detach().contiguous() for part in self._maps())
            del self.kv_b_proj

    def _maps(
        self,
    ) -> tuple[Float[Tensor, "head nope rank"], Float[Tensor, "head value rank"]]:
        if self._to_key is not None and self._to_value is not None:
            return self._to_key, self._to_value
        spec = self.spec
        weight = self.kv_b_proj.weight.view(spec.num_heads, -1, spec.kv_rank)
        return weight[:, : spec.nope_dim], weight[:, spec.nope_dim :]

    def _rotate(
        self, x: Float[Tensor, "token head rope"], by: Rotation
    ) -> Float[Tensor, "token head rope"]:
        """Rotated dims come out with all firsts of pairs before all seconds: queries and keys alike, so scores agree."""
        if self.spec.is_interleaved:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return rotate(x, by)
