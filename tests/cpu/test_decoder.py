"""The decoder against transformers: the same folder, the same tokens, for every family and its switches."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ganglion.models.decoder_load import load_language
from ganglion.models.dense_kv import DenseKv
from ganglion.models.language import LanguageModel

NUM_PROMPT, NUM_NEW = 19, 64
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 10}),
    "llama-one-kv": (
        "Llama",
        {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "llama-biases-tied": (
        "Llama",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3-rope": ("Llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    ),
    "llama-yarn": ("Llama", {"head_dim": 16, "rope_parameters": YARN}),
    "llama-dynamic": (
        "Llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"head_dim": 10, "sliding_window": 7}),
    "mistral-full": ("Mistral", {"head_dim": 10, "sliding_window": None}),
    "qwen2": ("Qwen2", {"hidden_size": 48, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {
            "hidden_size": 48,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-bias": ("Qwen3", {"head_dim": 6, "attention_bias": True, "hidden_act": "gelu"}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 12, "sliding_window": 9, "query_pre_attn_scalar": 20, "num_hidden_layers": 4},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 12,
            "sliding_window": 9,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 7,
            "final_logit_softcapping": 5.0,
        },
    ),
    "mixtral": ("Mixtral", {"head_dim": 10, "num_local_experts": 5, "sliding_window": 11}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "hidden_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 10,
            "num_experts": 7,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": (
        "Olmoe",
        {"hidden_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 1.5},
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 14,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "rope_parameters": {**YARN, "truncate": False, "rope_theta": 1000.0},
        },
    ),
}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def saved(folder: Path, case: str, **sizes: int) -> Any:
    """A transformers model with random weights, saved to `folder`."""
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **changes, **sizes})
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if value.ndim == 1 else 1.0 / value.shape[-1] ** 0.5)
            if "norm" in name and "gemma" not in case:
                value += 1.0
    model.save_pretrained(folder)
    return model.eval()


def fed(model: LanguageModel, kv: DenseKv, tokens: Tensor, *cuts: int) -> Tensor:
    """Logits of the next tokens of one row, run in pieces of layers [0, cut), [cut, ...)."""
    kv.extend((len(tokens),))
    positions = torch.arange(kv.lengths[0] - len(tokens), kv.lengths[0])
    hidden = model.embed(tokens)
    bounds = (0, *cuts, model.spec.num_layers)
    for low, high in itertools.pairwise(bounds):
        hidden = model.run(hidden, positions, kv, range(low, high))
    return model.logits(hidden)


def assert_close(got: Tensor, want: Tensor) -> None:
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-4, f"logits differ by {error:.2e} of the largest"


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, case)
    ours = load_language(tmp_path, dtype=torch.float32, name="m")
    tokens = torch.randint(3, BASE["vocab_size"], (1, NUM_PROMPT + NUM_NEW))
    with torch.inference_mode():
        want = theirs(tokens).logits[0]
        assert_close(fed(ours, dense(ours), tokens[0]), want)
        assert_close(fed(ours, dense(ours), tokens[0], 1, 2), want)
        kv = dense(ours)
        single = torch.cat([fed(ours, kv, token[None]) for token in tokens[0]])
        assert_close(single, want)
        kv = dense(ours)
        parts = torch.cat([fed(ours, kv, part) for part in tokens[0].split(23)])
        assert_close(parts, want)

        prompt = tokens[:, :NUM_PROMPT]
        whole = theirs.generate(
            prompt, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1
        )
        kv = dense(ours)
        token, generated = prompt[0], []
        for _ in range(NUM_NEW):
            token = fed(ours, kv, token)[-1:].argmax(-1)
            generated.append(int(token))
    assert generated == whole[0, NUM_PROMPT:].tolist()


def dense(model: LanguageModel) -> DenseKv:
    return DenseKv(model.groups, num_rows=1, max_tokens=NUM_PROMPT + NUM_NEW)


def test_gpt_oss_as_published_in_four_bits(tmp_path: Path) -> None:
    """Experts as MXFP4 blocks and scales are the same model as those numbers written out."""
    saved(tmp_path, "gpt-oss", hidden_size=96, intermediate_size=64)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])
    packed = dict(weights)
    stacked = ("experts.gate_up_proj", "experts.down_proj")
    for name in [name for name in weights if name.endswith(stacked)]:
        num_experts, low, high = weights[name].shape
        blocks = torch.randint(256, (num_experts, high, low // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, (num_experts, high, low // 32), dtype=torch.uint8)
        pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).int()
        numbers = table[pairs].flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
        weights[name] = numbers.flatten(2).mT.contiguous()
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    tokens = torch.arange(3, 20)
    outs = []
    config = json.loads((tmp_path / "config.json").read_text())
    for tensors, extra in (
        (weights, {}),
        (packed, {"quantization_config": {"quant_method": "mxfp4"}}),
    ):
        save_file(tensors, path)
        (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
        model = load_language(tmp_path, dtype=torch.float32, name="m")
        with torch.inference_mode():
            outs.append(fed(model, dense(model), tokens))
    assert torch.equal(*outs)
