"""Shapes: the two language models that speed is measured on, with random weights, as Hugging Face folders.

Called by the language benches. Speed does not depend on what weights say: only routing does a little, and random routers
spread tokens evenly, which is the worst case for a mixture of experts.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DENSE: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
MOE: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024,
    "norm_topk_prob": True,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_TOY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
}
TOY_DENSE: Mapping[str, Any] = {**DENSE, **_TOY}
TOY_MOE: Mapping[str, Any] = {
    **MOE,
    **_TOY,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def shape_folder(config: Mapping[str, Any], *, seed: int) -> Path:
    """A folder of `config` with random bfloat16 weights, made once and kept in the machine's temporary folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = json.dumps(dict(config), sort_keys=True)
    digest = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).hexdigest()
    folder = (
        Path(tempfile.gettempdir()) / "ganglion-bench-models" / f"{config['model_type']}-{digest}"
    )
    if (folder / "config.json").is_file():
        return folder
    sizes = {name: value for name, value in config.items() if name != "model_type"}
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = factory.from_config(
            AutoConfig.for_model(config["model_type"], **sizes), dtype=torch.bfloat16
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # half a folder is no folder
        made.save_pretrained(scratch)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # for its own end
    folder.chmod(0o755)
    return folder
