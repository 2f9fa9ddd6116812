"""Multi-head latent attention, absorbed, against transformers' expanded one."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.layout import PageKind, PageLayout
from ganglion.models.dense_kv import DenseKv
from ganglion.models.language import KvGroup
from ganglion.models.mla import Mla, MlaSpec, mla_spec
from ganglion.models.rotary import Rotation

pytestmark = pytest.mark.cpu

LAYER = 1
SIZES: dict[str, Any] = {"hidden_size": 21, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 14,
    "q_lora_rank": 9, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 11, "vocab_size": 11,
    "num_hidden_layers": 2, "intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 2, "head_dim": 6}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {}),
    "v2_lite": ("deepseek_v2", {"q_lora_rank": None}),
    "v2_yarn": ("deepseek_v2", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "v3": ("deepseek_v3", {}),
    "v3_yarn": ("deepseek_v3", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "v3_halves_bias": ("deepseek_v3", {"rope_interleave": False, "attention_bias": True}),
    "v3_plain_query": ("deepseek_v3", {"q_lora_rank": None, "num_attention_heads": 1, "num_key_value_heads": 1}),
}  # fmt: skip


def oracle(case: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """transformers' attention and rotary embedding with random weights, and the config as saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    family, fields = CASES[case]
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    attention = model.model.layers[LAYER].self_attn
    with torch.no_grad():
        for name, tensor in attention.named_parameters():
            tensor.normal_(mean=1.0 if "layernorm" in name else 0.0, std=0.3)
    saved: dict[str, Any] = json.loads(config.to_json_string())
    return attention, model.model.rotary_emb, saved


def halves(embedding: object) -> Rotation:
    """Cosine and sine "token 1 half" of what transformers' rotary embedding returns for one row."""
    if isinstance(embedding, tuple):
        cosine, sine = embedding
        half = cosine.shape[-1] // 2
        return cosine[0, :, None, :half], sine[0, :, None, :half]
    assert isinstance(embedding, Tensor)
    return embedding.real[0, :, None], embedding.imag[0, :, None]


def dense(spec: MlaSpec) -> DenseKv:
    layout = PageLayout(
        name="toy.latent",
        kind=PageKind.KV,
        shape=(1, 1, 16, 1, spec.key_dim),
        dtype="float32",
        slots=16,
    )
    group = KvGroup(layout=layout, layers=(LAYER,), value_dim=spec.kv_rank)
    return DenseKv([group], num_rows=1, max_tokens=64)


@pytest.mark.parametrize("cuts", [(1,), (33,), (20, 1, 12)])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers(case: str, cuts: tuple[int, ...]) -> None:
    attention, rotary, config = oracle(case)
    spec = mla_spec(config)
    assert spec is not None
    mla = Mla(spec, layer=LAYER)
    mla.load_state_dict(attention.state_dict())
    x = torch.randn(sum(cuts), spec.width)
    embedding = rotary(x[None], torch.arange(len(x))[None])
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)[None, None]
    expected = attention(x[None], attention_mask=mask, position_embeddings=embedding)[0][0]

    cosine, sine = halves(embedding)
    kv, outs, start = dense(spec), [], 0
    for cut in cuts:
        kv.extend([cut])
        tokens = slice(start, start + cut)
        outs.append(mla(x[tokens], (cosine[tokens], sine[tokens]), kv))
        start += cut
    torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-5, atol=1e-5)

    mla.absorb()
    kv = dense(spec)
    kv.extend([len(x)])
    absorbed = mla(x, (cosine, sine), kv)
    torch.testing.assert_close(absorbed, expected, rtol=1e-5, atol=1e-5)
    assert not any("kv_b_proj" in name for name, _ in mla.named_parameters())


def test_other_attention_is_none() -> None:
    assert mla_spec({"model_type": "llama"}) is None


@pytest.mark.parametrize(("name", "value"), [("kv_lora_rank", 0), ("v_head_dim", None), ("qk_rope_head_dim", 5)])  # fmt: skip
def test_bad_sizes_are_named(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=name):
        mla_spec({"model_type": "deepseek_v3", **SIZES, name: value})
