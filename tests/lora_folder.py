"""LoRA folders with random numbers, written as PEFT writes them, and the truth: merged into a transformers model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ganglion.models.decoder_spec import DecoderSpec
from ganglion.models.lora_folder import CONFIG, WEIGHTS, lora_sites

PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    spec: DecoderSpec,
    *,
    rank: int = 4,
    alpha: float = 6.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    size: float = 0.3,
    is_used: Callable[[str], bool] = lambda name: True,
    **config: Any,
) -> Path:
    """An adapter of all layers whose names end with one of `targets`; B is not zero, unlike at the start of a training."""
    generator = torch.Generator().manual_seed(seed)
    patterns: Mapping[str, int] = config.get("rank_pattern", {})
    tensors: dict[str, Tensor] = {}
    for name, site in lora_sites(spec).items():
        last = name.rpartition(".")[2]
        if last not in targets or not is_used(name):
            continue
        own = next((r for end, r in patterns.items() if f".{name}".endswith(f".{end}")), rank)
        for key, shape in (
            ("lora_A", (own, site.num_inputs)),
            ("lora_B", (site.num_outputs, own)),
        ):
            numbers = torch.randn(shape, generator=generator) * size * shape[1] ** -0.5
            tensors[f"{PREFIX}{name}.{key}.weight"] = numbers.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/some-model",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "target_modules": list(targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(values | config))
    return folder


def merge(model: nn.Module, folder: Path) -> None:
    """W + scale * B @ A into the weights of a transformers model."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up, rank = tensors[name.replace("lora_A", "lora_B")].double(), down.shape[0]
        alpha = config["lora_alpha"]
        for end, of_layer in config.get("alpha_pattern", {}).items():
            alpha = of_layer if f".{module}".endswith(f".{end}") else alpha
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        weight = model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        weight.data.add_((scale * up @ down.double()).to(weight.dtype))
