"""Mixture-of-experts layers against transformers' own modules, whatever form the checkpoint has."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.kernels.cpu import why_not_packed
from ganglion.models.moe import ExpertBackend, GateSpec, Moe, MoeSpec, moe_spec
from ganglion.models.moe_load import Form, moe_parts
from ganglion.models.packed_experts import filled_up, pack_experts
from ganglion.models.router import RouterSpec

pytestmark = pytest.mark.cpu

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 11,
    "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SIGMOID = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
    "moe_intermediate_size": 13, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "intermediate_size": 31}  # fmt: skip
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13}),
    "mixtral_gelu": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 7,
        "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 13,
        "shared_expert_intermediate_size": 17, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 5,
        "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 6, "intermediate_size": 9, "num_key_value_heads": 4}),
    "deepseek_v2": ("deepseek_v2", {**SIGMOID, **MLA, "norm_topk_prob": False, "topk_method": "greedy"}),
    "deepseek_v2_groups": ("deepseek_v2", {**SIGMOID, **MLA, "norm_topk_prob": False,
        "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {**SIGMOID, **MLA}),
    "glm4_moe": ("glm4_moe", {**SIGMOID, "n_group": 1, "topk_group": 1}),
    "dots1": ("dots1", {**SIGMOID, "norm_topk_prob": False}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 10}),
    "granitemoe": ("granitemoe", {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 9}),
}  # fmt: skip
LAYER = 1


def oracle(case: str) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' block of layer 1 with random weights, and its config as saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    family, fields = CASES[case]
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    layer = model.model.layers[LAYER]
    block = layer.block_sparse_moe if family == "granitemoe" else layer.mlp
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.normal_(std=0.5)
    saved: dict[str, Any] = json.loads(config.to_json_string())
    return block, saved


def wide_config(case: str) -> dict[str, Any]:
    """As published, with experts wide enough for matrix units."""
    from transformers import AutoConfig

    family, fields = CASES[case]
    sizes = {**SIZES, **fields, "hidden_size": 40}
    sizes["moe_intermediate_size" if "moe_intermediate_size" in fields else "intermediate_size"] = (
        24
    )
    saved: dict[str, Any] = json.loads(AutoConfig.for_model(family, **sizes).to_json_string())
    return saved


def stacked(spec: MoeSpec, block: nn.Module) -> dict[str, Tensor]:
    """As transformers names them in memory, below the layer."""
    root = "block_sparse_moe" if spec.family == "granitemoe" else "mlp"
    return {f"{root}.{name}": tensor for name, tensor in block.state_dict().items()}


def apart(spec: MoeSpec, block: nn.Module) -> dict[str, Tensor]:
    """As published: one tensor for each expert and projection."""

    def split() -> Iterator[tuple[str, Tensor]]:
        is_mixtral = spec.family == "mixtral"
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        for name, tensor in stacked(spec, block).items():
            if is_mixtral:
                name = name.replace("mlp.", "block_sparse_moe.")
            below, _, leaf = name.rpartition(".")
            if leaf not in ("gate_up_proj", "down_proj"):
                yield name, tensor
                continue
            for expert, weight in enumerate(tensor):
                if leaf == "down_proj":
                    yield f"{below}.{expert}.{down}.weight", weight
                else:
                    yield f"{below}.{expert}.{gate}.weight", weight[: spec.inner]
                    yield f"{below}.{expert}.{up}.weight", weight[spec.inner :]

    return dict(split())


def load(spec: MoeSpec, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Moe:
    """A layer with these weights; every tensor is used."""
    moe = Moe(spec, dtype=dtype)
    parts = moe_parts(spec, tensors)
    assert {part.name for part in parts} == set(tensors)
    for part in parts:
        part.place(moe, tensors[part.name])
    return moe


def run(block: nn.Module, x: Tensor) -> Tensor:
    out = block(x[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


@pytest.mark.parametrize("num_tokens", [1, 33])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers(case: str, num_tokens: int) -> None:
    block, config = oracle(case)
    spec = moe_spec(config, LAYER)
    assert spec is not None
    x = torch.randn(num_tokens, SIZES["hidden_size"])
    expected = run(block, x)
    forms = [stacked] if spec.family in ("gpt_oss", "granitemoe") else [stacked, apart]
    for form in forms:
        out = load(spec, form(spec, block))(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_packed_equals_resident(case: str) -> None:
    config = wide_config(case)
    spec = moe_spec(config, LAYER)
    assert spec is not None
    torch.manual_seed(0)
    moe = Moe(spec, dtype=torch.bfloat16)
    for parameter in moe.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(33, spec.width, dtype=torch.bfloat16)
    expected = moe(x)
    if why_not_packed(torch.bfloat16):
        assert not pack_experts(moe)
        return
    assert pack_experts(moe)
    out = moe(x)
    # a fused activation is rounded to bfloat16 once less
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.03, atol=0.03 * float(expected.abs().max()))  # fmt: skip
    many = moe(x.repeat(9, 1))  # more rows than there are sizes for
    torch.testing.assert_close(many[:33], out, rtol=0.0, atol=0.0)
    for num_tokens in (1, 2, 7, 32):
        torch.testing.assert_close(moe(x[:num_tokens]), out[:num_tokens], rtol=0.0, atol=0.0)
    assert not pack_experts(moe)  # nothing left to pack


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_broken_token_does_not_spoil_the_others(case: str) -> None:
    spec = moe_spec(wide_config(case), LAYER)
    assert spec is not None
    moe = Moe(spec)
    x = torch.randn(9, spec.width)
    whole = moe(x)
    x[4] = torch.nan
    x[6] = torch.inf
    out = moe(x)
    others = [0, 1, 2, 3, 5, 7, 8]
    torch.testing.assert_close(out[others], whole[others], rtol=1e-5, atol=1e-6)
    assert not out[[4, 6]].isfinite().any()


def test_rows_are_filled_up_to_few_sizes() -> None:
    sizes = [filled_up(num_rows) for num_rows in range(1, 4097)]
    assert sizes[:32] == list(range(1, 33))
    assert len(set(sizes)) == 32 + 7 * 16
    for num_rows, size in enumerate(sizes, start=1):
        assert num_rows <= size <= num_rows * 17 / 16


@torch.no_grad()
def test_mxfp4_experts_as_published() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    spec = MoeSpec(
        family="gpt_oss",
        layer=LAYER,
        width=64,
        inner=32,
        gate=GateSpec(limit=7.0, alpha=1.702),
        router=RouterSpec(num_experts=3, top_k=2, is_softmax_after=True, has_bias=True),
        has_expert_bias=True,
    )
    torch.manual_seed(0)
    plain, packed = {}, {}
    for part in moe_parts(spec, ()):
        if part.form in (Form.FP4, Form.FP4_SCALES):
            low, high = (0, 256) if part.form is Form.FP4 else (118, 130)
            packed[part.name] = torch.randint(low, high, part.shape, dtype=torch.uint8)
        else:
            plain[part.name] = packed[part.name] = torch.randn(part.shape).bfloat16()
    for what in ("gate_up", "down"):
        below = f"mlp.experts.{what}_proj"
        plain[below] = convert_moe_packed_tensors(
            packed[f"{below}_blocks"], packed[f"{below}_scales"]
        )
    x = torch.randn(5, spec.width).bfloat16()
    moes = [load(spec, tensors, torch.bfloat16) for tensors in (plain, packed)]
    for ours, theirs in zip(moes[1].parameters(), moes[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(moes[0](x), moes[1](x))


def test_parts_of_another_model_are_named() -> None:
    spec = moe_spec({"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 6}, 0)
    assert spec is not None
    parts = moe_parts(spec, ())
    assert parts[1].name == "block_sparse_moe.experts.0.w1.weight"
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1.*\(6, 8\).*\(8, 6\)"):
        parts[1].place(Moe(spec), torch.zeros(8, 6))
    with pytest.raises(CheckpointError, match="uint8"):
        parts[1].place(Moe(spec), torch.zeros(6, 8, dtype=torch.uint8))


def test_another_backend_gets_the_routes() -> None:
    class Recorder:
        """Wraps a backend."""

        def __init__(self, inner: ExpertBackend) -> None:
            self.inner, self.seen = inner, [0]

        def experts(self, x: Tensor, indices: Tensor, weights: Tensor, layer: int) -> Tensor:
            self.seen = [*indices.shape, layer]
            return self.inner.experts(x, indices, weights, layer)

    spec = moe_spec({"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 6}, 3)
    assert spec is not None
    plain = Moe(spec)
    recorder = Recorder(plain.experts)
    hooked = Moe(spec, experts=recorder)
    hooked.router.load_state_dict(plain.router.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(hooked(x), plain(x))
    assert recorder.seen == [4, 2, 3]


def test_gradients_reach_router_and_used_experts() -> None:
    spec = moe_spec({"model_type": "qwen3_moe", "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": True}, 0)  # fmt: skip
    assert spec is not None
    for num_tokens in (1, 9):
        moe = Moe(spec)
        moe(torch.randn(num_tokens, 8)).square().sum().backward()
        for parameter in moe.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
