"""Routing against transformers' routers, and what holds of every route."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganglion.errors import CheckpointError
from ganglion.models.moe import Moe, moe_spec
from ganglion.models.moe_load import moe_parts
from ganglion.models.router import GroupScore, Router, RouterSpec, Score, route
from tests.cpu.test_moe import CASES, LAYER, SIZES, oracle, stacked

pytestmark = pytest.mark.cpu


def by_expert(weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """In the order of experts: transformers leaves some choices unsorted."""
    order = indices.argsort(dim=-1)
    return weights.gather(-1, order), indices.gather(-1, order)


@pytest.mark.parametrize("num_tokens", [1, 33])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers(case: str, num_tokens: int) -> None:
    block, config = oracle(case)
    spec = moe_spec(config, LAYER)
    assert spec is not None
    moe, tensors = Moe(spec), stacked(spec, block)
    for part in moe_parts(spec, tensors):
        part.place(moe, tensors[part.name])
    x = torch.randn(num_tokens, SIZES["hidden_size"])
    theirs = block.router if spec.family in ("gpt_oss", "granitemoe") else block.gate
    assert callable(theirs)
    _, weights, indices = theirs(x)
    expected = by_expert(weights.float(), indices)
    routes = moe.router(x)
    assert routes.weights.dtype == torch.float32
    got = by_expert(*routes)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


@st.composite
def router_specs(draw: st.DrawFn) -> RouterSpec:
    num_groups, group_size = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    num_top_groups = draw(st.integers(1, num_groups))
    return RouterSpec(
        num_experts=num_groups * group_size,
        top_k=draw(st.integers(1, num_top_groups * group_size)),
        score=draw(st.sampled_from(Score)),
        num_groups=num_groups,
        num_top_groups=num_top_groups,
        group_score=draw(st.sampled_from(GroupScore)),
        is_softmax_after=draw(st.booleans()),
        has_correction=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=200, deadline=None)
@given(spec=router_specs(), seed=st.integers(0, 2**32), num_tokens=st.integers(0, 5))
def test_routes_are_choices(spec: RouterSpec, seed: int, num_tokens: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, spec.num_experts, generator=random) * 3
    correction = torch.randn(spec.num_experts, generator=random) if spec.has_correction else None
    weights, indices = route(spec, logits, correction)
    assert weights.shape == indices.shape == (num_tokens, spec.top_k)
    for row, token_weights in zip(indices.tolist(), weights, strict=True):
        assert len(set(row)) == spec.top_k
        assert len({expert // spec.group_size for expert in row}) <= spec.num_top_groups
        if spec.is_softmax_after:
            assert abs(float(token_weights.sum()) / spec.scale - 1.0) < 1e-5
    # a token's route does not depend on the others
    for token in range(num_tokens):
        alone = route(spec, logits[token : token + 1], correction)
        assert torch.equal(alone.indices[0], indices[token])


def test_correction_moves_the_choice_and_not_the_weight() -> None:
    spec = RouterSpec(num_experts=3, top_k=1, score=Score.SIGMOID, has_correction=True)
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    weights, indices = route(spec, logits, torch.tensor([0.0, 0.0, 5.0]))
    assert indices.tolist() == [[2]]
    torch.testing.assert_close(weights, logits[:, 2:].sigmoid())


def test_float32_projection_whatever_the_dtype() -> None:
    spec = RouterSpec(num_experts=4, top_k=2, is_float32=True)
    router = Router(spec, width=8, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.float32
    assert router.logits(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "5 of 4 experts"),
        ({"num_experts": 4, "top_k": 0}, "0 of 4 experts"),
        ({"num_experts": 6, "top_k": 2, "num_groups": 4}, "6 experts cannot be split into 4"),
        ({"num_experts": 8, "top_k": 2, "num_groups": 4, "num_top_groups": 5}, "5 of 4 groups"),
        ({"num_experts": 8, "top_k": 3, "num_groups": 4, "num_top_groups": 1}, "hold fewer than"),
        (
            {"num_experts": 4, "top_k": 1, "num_groups": 4, "group_score": GroupScore.TOP2_SUM},
            "no best two",
        ),
    ],
)
def test_impossible_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec(**fields)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 40, "num_experts": 8}, "40 of 8 experts"),
        ("qwen3_moe", {"hidden_act": "relu6"}, "relu6"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v3", {"n_group": 5}, "groups"),
        ("deepseek_v3", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("mixtral", {"num_local_experts": -3}, "num_local_experts"),
        ("gpt_oss", {"swiglu_limit": "7"}, "swiglu_limit"),
        ("jetmoe", {"num_local_experts": 8}, "jetmoe.*known: mixtral"),
    ],
)
def test_bad_configs_are_named(family: str, change: dict[str, Any], message: str) -> None:
    config = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "model_type": family,
        "n_routed_experts": 16, "num_experts_per_tok": 2, **change}  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        moe_spec(config, 0)


def test_dense_layers() -> None:
    qwen = {
        "model_type": "qwen3_moe",
        "hidden_size": 8,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    assert [moe_spec(qwen, layer) is not None for layer in range(6)] == [
        False, True, False, False, False, True,
    ]  # fmt: skip
    deepseek = {"model_type": "dots1", "hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 8,
        "first_k_dense_replace": 2}  # fmt: skip
    assert [moe_spec(deepseek, layer) is not None for layer in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert moe_spec({"model_type": "llama", "hidden_size": 8}, 0) is None
