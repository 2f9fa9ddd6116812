"""Decoder: one LanguageModel for all families whose differences are switches of a DecoderSpec.

Made by `decoder_load` (or with random weights, by training), driven by the engine. Knows no page: attention goes through
KvSpace. Dimension names: token (of all rows), width, head, kv (key and value heads), dim, half, vocab.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ganglion.generation import LanguageSpec
from ganglion.layout import DTYPE_BYTES, PageKind, PageLayout
from ganglion.models.decoder_spec import DecoderSpec, QkNorm
from ganglion.models.language import KvGroup, KvSpace
from ganglion.models.layers import Linear
from ganglion.models.lora import LayerDeltas, LoraBatch
from ganglion.models.mla import Mla
from ganglion.models.moe import Moe
from ganglion.models.packed_experts import pack_experts
from ganglion.models.packed_mlp import ACTIVATIONS, packed_mlp
from ganglion.models.packing import pack
from ganglion.models.rotary import Rotation, frequencies, rotate, rotation

_MAX_SLOTS = 16


def rms_norm(
    x: Float[Tensor, "*b width"], weight: Float[Tensor, "*#b width"], eps: float
) -> Float[Tensor, "*b width"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32 up to the last rounding."""
    # on many rows a tenth of the time that a mean of squares takes
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (length * length).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    out: Tensor = (x * scale).mul_(weight).to(x.dtype)
    return out


class RmsNorm(nn.Module):
    """A weight for `rms_norm`, float32 whatever the model computes in."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self._eps = eps

    def forward(self, x: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width"]:
        return rms_norm(x, self.weight, self._eps)


class Attention(nn.Module):
    """Causal self-attention with grouped keys; query, key and value come out of one product."""

    def __init__(self, spec: DecoderSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._layer, self._scale, self._softcap = (
            layer,
            spec.attention_scale,
            spec.attention_softcap,
        )
        self._qk_norm, self._eps, self._clip = spec.qk_norm, spec.norm_eps, spec.qkv_clip
        heads, kv, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._heads, self._sizes = (heads, kv, dim), (heads * dim, kv * dim, kv * dim)
        self.qkv = Linear(spec.width, sum(self._sizes), bias=spec.has_qkv_bias, dtype=dtype)
        self.out = Linear(heads * dim, spec.width, bias=spec.has_out_bias, dtype=dtype)
        if spec.qk_norm != QkNorm.NONE:
            is_per_head = spec.qk_norm == QkNorm.HEAD
            self.q_norm = RmsNorm(dim if is_per_head else heads * dim, spec.norm_eps)
            self.k_norm = RmsNorm(dim if is_per_head else kv * dim, spec.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(heads, dtype=dtype)) if spec.has_sinks else None

    def forward(
        self,
        x: Float[Tensor, "token width"],
        by: Rotation | None,
        kv: KvSpace,
        deltas: LayerDeltas | None = None,
    ) -> Float[Tensor, "token width"]:
        heads, kv_heads, dim = self._heads
        rows: Tensor = self.qkv(x)
        if deltas is not None:
            deltas.add("attention.qkv", x, rows)
        if self._qk_norm == QkNorm.ALL:
            query, key, value = torch.split(rows, list(self._sizes), dim=-1)
            rows = torch.cat([self.q_norm(query), self.k_norm(key), value], dim=-1)
        if self._clip is not None:
            rows = rows.clamp(-self._clip, self._clip)
        # queries and keys are normed and turned in one go
        by_head = rows.view(-1, heads + 2 * kv_heads, dim)
        turned, value = by_head[:, : heads + kv_heads], by_head[:, heads + kv_heads :]
        if self._qk_norm == QkNorm.HEAD:
            weights = (
                self.q_norm.weight.expand(heads, -1),
                self.k_norm.weight.expand(kv_heads, -1),
            )
            turned = rms_norm(turned, torch.cat(weights), self._eps)
        if by is not None:
            turned = rotate(turned, by)
        attended = kv.attend(
            self._layer,
            turned[:, :heads],
            turned[:, heads:],
            value,
            scale=self._scale,
            sinks=self.sinks,
            softcap=self._softcap,
        )
        inner = attended.flatten(1)
        out: Tensor = self.out(inner)
        if deltas is not None:
            deltas.add("attention.out", inner, out)
        return out


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(spec.width, 2 * spec.mlp_width, bias=spec.has_mlp_bias, dtype=dtype)
        self.down = Linear(spec.mlp_width, spec.width, bias=spec.has_mlp_bias, dtype=dtype)
        self.activation = spec.activation

    def forward(
        self, x: Float[Tensor, "token width"], deltas: LayerDeltas | None = None
    ) -> Float[Tensor, "token width"]:
        gate_up = self.gate_up(x)
        if deltas is not None:
            deltas.add("mlp.gate_up", x, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = ACTIVATIONS[self.activation](gate) * up
        out: Tensor = self.down(inner)
        if deltas is not None:
            deltas.add("mlp.down", inner, out)
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a second norm behind it where the family has one."""

    def __init__(self, spec: DecoderSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()

        def norm() -> RmsNorm:
            return RmsNorm(spec.width, spec.norm_eps)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = (
            Attention(spec, layer, dtype)
            if spec.mla is None
            else Mla(spec.mla, layer=layer, dtype=dtype)
        )
        moe = spec.layers[layer].moe
        self.mlp: nn.Module = GatedMlp(spec, dtype) if moe is None else Moe(moe, dtype=dtype)
        self.attention_post_norm = norm() if spec.has_post_norms else None
        self.mlp_post_norm = norm() if spec.has_post_norms else None

    def forward(
        self,
        hidden: Float[Tensor, "token width"],
        by: Rotation | None,
        kv: KvSpace,
        deltas: LayerDeltas | None = None,
    ) -> Float[Tensor, "token width"]:
        out: Tensor = self.attention(self.attention_norm(hidden), by, kv, deltas)
        if self.attention_post_norm is not None:
            out = self.attention_post_norm(out)
        hidden = hidden + out
        x = self.mlp_norm(hidden)
        is_adapted = deltas is not None and deltas.touches("mlp.gate_up", "mlp.down")
        out = self.mlp(x, deltas) if is_adapted else self.mlp(x)
        if self.mlp_post_norm is not None:
            out = self.mlp_post_norm(out)
        return hidden + out


class Decoder(nn.Module):
    """A LanguageModel. Weights are random until a loader fills them; `dtype` is that of pages too."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        name: str,
        version: str,
        dtype: torch.dtype,
        max_page_bytes: int = 1 << 20,
    ) -> None:
        super().__init__()
        self.decoder_spec = spec
        dtype_name = str(dtype).removeprefix("torch.")
        self._spec = LanguageSpec(
            name=name,
            family=spec.family,
            version=version,
            vocab_size=spec.vocab_size,
            max_tokens=spec.max_tokens,
            num_layers=spec.num_layers,
            width=spec.width,
            eos_ids=spec.eos_ids,
            dtype=dtype_name,
        )
        self._groups = kv_groups(spec, name=name, dtype=dtype_name, max_page_bytes=max_page_bytes)
        self._ropes = tuple(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope))
        with torch.device("cpu"):  # also where the weights are only promised
            self._frequencies = tuple(frequencies(rope) for rope in self._ropes)
        self.embedding = nn.Embedding(spec.vocab_size, spec.width, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, layer, dtype) for layer in range(spec.num_layers)
        )
        self.norm = RmsNorm(spec.width, spec.norm_eps)
        self.head = Linear(spec.width, spec.vocab_size, bias=False, dtype=dtype)
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weights, where the family does. To be called again when they are replaced."""
        if self.decoder_spec.is_tied:
            self.head.weight = self.embedding.weight

    def pack(self, network: nn.Module) -> None:
        """Lay out the weights of one part of this model for this CPU, where that pays. Not to be saved or trained then."""
        for part in list(network.modules()):
            if isinstance(part, Moe):
                pack_experts(part)
            elif isinstance(part, DecoderLayer) and isinstance(part.mlp, GatedMlp):
                mlp = part.mlp
                part.mlp = packed_mlp(mlp.gate_up, mlp.down, mlp.activation) or mlp
            elif isinstance(part, Mla):
                part.absorb()
        pack(network)

    @property
    def spec(self) -> LanguageSpec:
        """As LanguageModel.spec."""
        return self._spec

    @property
    def groups(self) -> tuple[KvGroup, ...]:
        """As LanguageModel.groups."""
        return self._groups

    def embed(self, token_ids: Int[Tensor, " token"]) -> Float[Tensor, "token width"]:
        """As LanguageModel.embed."""
        hidden: Tensor = self.embedding(token_ids)
        scale = self.decoder_spec.embedding_scale
        # Gemma was trained with a scale rounded to its dtype
        return hidden if scale == 1.0 else hidden * torch.tensor(scale, dtype=hidden.dtype)

    def run(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
    ) -> Float[Tensor, "token width"]:
        """As LanguageModel.run."""
        return self._run(hidden, positions, kv, layers, None)

    def run_adapted(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
        adapters: LoraBatch,
    ) -> Float[Tensor, "token width"]:
        """As AdaptableModel.run_adapted."""
        return self._run(hidden, positions, kv, layers, adapters)

    def _run(
        self,
        hidden: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        kv: KvSpace,
        layers: range,
        adapters: LoraBatch | None,
    ) -> Float[Tensor, "token width"]:
        specs = self.decoder_spec.layers
        rotations = {
            rope: rotation(frequency, positions, amplitude=rope.amplitude, dtype=hidden.dtype)
            for rope, frequency in zip(self._ropes, self._frequencies, strict=True)
        }
        for layer in layers:
            rope = specs[layer].rope
            by = None if rope is None else rotations[rope]
            deltas = None if adapters is None else adapters.of_layer(layer)
            hidden = self.layers[layer](hidden, by, kv, deltas)
        return hidden

    def normed(self, hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """As EmbeddingModel.normed."""
        states: Tensor = self.norm(hidden)
        return states

    def logits(self, hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token vocab"]:
        """As LanguageModel.logits."""
        scores: Tensor = self.head(self.normed(hidden)).float()
        cap = self.decoder_spec.logit_softcap
        return scores if cap is None else torch.tanh(scores / cap) * cap


def kv_groups(
    spec: DecoderSpec, *, name: str, dtype: str, max_page_bytes: int
) -> tuple[KvGroup, ...]:
    """Layers with equal windows share pages, as many slots of them as `max_page_bytes` holds.

    Names are "<name>.kv", "<name>.kv-window" and, for latent attention, "<name>.latent". Where not even one slot of all
    these layers fits, they are spread over several groups: "<name>.kv", "<name>.kv.1", ... Raises ValueError where one
    layer's slot does not fit.
    """
    if spec.mla is None:
        slot, value_dim = (2, spec.num_kv_heads, spec.head_dim), None
    else:
        slot, value_dim = (1, 1, spec.mla.key_dim), spec.mla.kv_rank
    slot_bytes = prod(slot) * DTYPE_BYTES[dtype]
    max_layers = max_page_bytes // slot_bytes
    if max_layers < 1:
        raise ValueError(
            f"keys and values of one token and one layer take {slot_bytes} bytes, a page at most {max_page_bytes}"
        )
    groups: list[KvGroup] = []
    order = sorted(range(spec.num_layers), key=lambda layer: spec.layers[layer].window or 0)
    for window, members in groupby(order, key=lambda layer: spec.layers[layer].window):
        layers = tuple(members)
        kind = "latent" if spec.mla else "kv" if window is None else "kv-window"
        base = f"{name}.{kind}"
        num_groups = -(-len(layers) // max_layers)
        for part, chosen in enumerate(_split(layers, num_groups)):
            slots = _MAX_SLOTS
            while slots * len(chosen) * slot_bytes > max_page_bytes:
                slots //= 2
            layout = PageLayout(
                name=base if part == 0 else f"{base}.{part}",
                kind=PageKind.KV,
                shape=(len(chosen), slot[0], slots, *slot[1:]),
                dtype=dtype,
                slots=slots,
            )
            groups.append(KvGroup(layout=layout, layers=chosen, window=window, value_dim=value_dim))
    return tuple(groups)


def _split(layers: Sequence[int], num_parts: int) -> list[tuple[int, ...]]:
    """Into parts whose sizes differ by at most one."""
    bounds = [part * len(layers) // num_parts for part in range(num_parts + 1)]
    return [tuple(layers[low:high]) for low, high in pairwise(bounds)]
