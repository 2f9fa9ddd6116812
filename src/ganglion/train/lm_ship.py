"""Ship: a trained language model as a Hugging Face folder of the Qwen3 or Qwen3-MoE family. Called by the CLI.

Owns the files of such a folder, the byte-level tokenizer included; the card is `train.lm_card`'s.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ganglion.train.lm import LmFitConfig
from ganglion.train.lm_corpus import END_OF_TEXT
from ganglion.train.lm_model import LmConfig, TrainedLm

END_OF_TEXT_NAME = "<|endoftext|>"
# The models were never taught to chat: a conversation is shown as a text that they may continue.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def ship_lm(model: TrainedLm, fit: LmFitConfig, folder: Path) -> None:
    """Write `folder`: config, bfloat16 weights, generation defaults, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", model_json(model.config, fit))
    _write(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    _write(folder / "tokenizer.json", tokenizer_json())
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT_NAME,
            "model_max_length": model.config.max_tokens,
            "pad_token": END_OF_TEXT_NAME,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    save_file(model.checkpoint(torch.bfloat16), folder / "model.safetensors", {"format": "pt"})


def model_json(config: LmConfig, fit: LmFitConfig) -> dict[str, Any]:
    """config.json as published Qwen3 and Qwen3-MoE models have it."""
    common: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": END_OF_TEXT,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_tokens,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.is_tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if not config.is_moe:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **common}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **common,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": fit.balance_weight,
    }


def tokenizer_json() -> dict[str, Any]:
    """A `tokenizers` file without merges: token b is byte b, and END_OF_TEXT follows."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_OF_TEXT,
                "content": END_OF_TEXT_NAME,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (the table of GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, num_others = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + num_others))
            num_others += 1
    return characters


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
