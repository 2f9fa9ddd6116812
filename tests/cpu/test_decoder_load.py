"""Loading decoders: shards, dtypes, pages, and folders that must be refused before a weight is read."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.kernels.cpu import PackedLinear, why_not_packed
from ganglion.layout import PageKind
from ganglion.models.decoder import Decoder, kv_groups
from ganglion.models.decoder_load import load_language, random_language
from ganglion.models.decoder_spec import read_decoder_spec
from ganglion.models.dense_kv import DenseKv
from ganglion.models.language import KvSpace, LanguageModel
from ganglion.models.packed_mlp import PackedGatedMlp
from ganglion.models.weights import promised

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with float32 weights."""
    folder: Path = tmp_path_factory.mktemp("llama")
    generator = torch.Generator().manual_seed(0)
    sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    mlp = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (61, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (61, 32),
    }
    for layer in range(3):
        below = f"model.layers.{layer}"
        shapes |= {f"{below}.self_attn.{key}.weight": size for key, size in sizes.items()}
        shapes |= {f"{below}.mlp.{key}.weight": size for key, size in mlp.items()}
        shapes |= {f"{below}.{key}_layernorm.weight": (32,) for key in ("input", "post_attention")}
    weights = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return load_language(folder, dtype=dtype, name="m")


def scores(model: LanguageModel, num_tokens: int = 9) -> Tensor:
    """Logits of a fixed text."""
    tokens = torch.arange(num_tokens) * 7 % 61
    kv = DenseKv(model.groups, num_rows=1, max_tokens=num_tokens)
    kv.extend((num_tokens,))
    layers = range(model.spec.num_layers)
    with torch.inference_mode():
        return model.logits(model.run(model.embed(tokens), torch.arange(num_tokens), kv, layers))


def test_what_a_loaded_model_says_of_itself(source: Path) -> None:
    model = load(source)
    assert isinstance(model, LanguageModel)
    spec = model.spec
    assert (spec.name, spec.family, spec.vocab_size, spec.max_tokens) == ("m", "llama", 61, 128)
    assert (spec.num_layers, spec.width, spec.eos_ids, spec.dtype) == (3, 32, (2,), "float32")
    assert isinstance(DenseKv(model.groups, num_rows=1, max_tokens=1), KvSpace)
    assert not any(value.requires_grad for value in model.parameters())  # type: ignore[attr-defined]


def test_shards_are_one_model(folder: Path) -> None:
    whole = load(folder)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-{at % 3 + 1}-of-3.safetensors" for at, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: weights[name].clone() for name in names if files[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load(folder)
    assert torch.equal(scores(sharded), scores(whole))
    assert sharded.spec.version != whole.spec.version


def test_bfloat16_is_near_float32_and_its_wide_layers_are_packed(source: Path) -> None:
    exact, rounded = load(source), load(source, torch.bfloat16)
    error = (scores(rounded) - scores(exact)).abs().max() / scores(exact).abs().max()
    assert error < 0.05
    assert {group.layout.dtype for group in rounded.groups} == {"bfloat16"}
    assert isinstance(rounded, Decoder)
    if not why_not_packed(torch.bfloat16):
        assert sum(isinstance(part, PackedLinear) for part in rounded.modules()) == 3 * 2 + 1
        assert sum(isinstance(part, PackedGatedMlp) for part in rounded.modules()) == 3


def test_weights_of_the_right_dtype_are_not_copied(source: Path) -> None:
    """They are views of the mapped file, so a model is there before its weights are read."""
    model = load(source)
    assert isinstance(model, Decoder)
    start = model.embedding.weight.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ours = [line[0].split("-") for line in maps if line[-1] == str(source / "model.safetensors")]
    assert any(int(low, 16) <= start < int(high, 16) for low, high in ours)


def test_a_tied_head_is_packed_and_the_table_stays(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    rounded = {name: value.bfloat16() for name, value in weights.items()}
    save_file(rounded, folder / "model.safetensors")
    untied = [load(folder, dtype) for dtype in (torch.bfloat16, torch.float32)]
    (folder / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    for dtype, want in zip((torch.bfloat16, torch.float32), untied, strict=True):
        tied = load(folder, dtype)
        assert torch.equal(scores(tied), scores(want))
        assert isinstance(tied, Decoder)
        if dtype == torch.float32:
            assert tied.head.weight is tied.embedding.weight


def test_progress_ends_at_all_bytes(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_language(
        source,
        dtype=torch.float32,
        name="m",
        on_progress=lambda done, of: seen.append((done, of)),
    )
    weights = load_file(source / "model.safetensors")
    num_bytes = sum(value.nbytes for value in weights.values())
    assert seen == sorted(seen)
    assert seen[-1] == (num_bytes, num_bytes)


def test_generation_config_says_when_to_stop(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert load(folder).spec.eos_ids == (5, 9)


def test_another_weight_is_another_version(folder: Path) -> None:
    before = load(folder).spec.version
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    assert load(folder).spec.version != before


@pytest.mark.parametrize("config", [LLAMA, MOE, DEEPSEEK], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_of_any_config(config: dict[str, Any], dtype: torch.dtype) -> None:
    model, again, other = (
        random_language(config, dtype=dtype, name="m", seed=seed) for seed in (1, 1, 2)
    )
    out = scores(model)
    assert out.isfinite().all()
    assert out.dtype == torch.float32
    assert torch.equal(out, scores(again))
    assert not torch.equal(out, scores(other))


def test_pages_hold_as_many_slots_as_fit() -> None:
    spec = read_decoder_spec(
        {**LLAMA, "model_type": "gemma2", "head_dim": 8, "num_hidden_layers": 5}
    )
    slot_bytes = 2 * 2 * 8 * 2
    full, windowed = kv_groups(spec, name="p", dtype="bfloat16", max_page_bytes=1 << 20)
    assert (full.layout.name, full.layers, full.window) == ("p.kv", (1, 3), None)
    assert (windowed.layout.name, windowed.layers) == ("p.kv-window", (0, 2, 4))
    assert windowed.window == 4096
    assert (full.layout.shape, full.layout.slots) == ((2, 2, 16, 2, 8), 16)
    assert full.layout.kind is PageKind.KV
    small = kv_groups(spec, name="p", dtype="bfloat16", max_page_bytes=3 * slot_bytes * 5)
    assert [group.layout.slots for group in small] == [4, 4]
    split = kv_groups(spec, name="p", dtype="bfloat16", max_page_bytes=2 * slot_bytes)
    assert [(group.layout.name, group.layers) for group in split] == [
        ("p.kv", (1, 3)),
        ("p.kv-window", (0,)),
        ("p.kv-window.1", (2, 4)),
    ]
    assert all(group.layout.page_bytes <= 2 * slot_bytes for group in split)
    with pytest.raises(ValueError, match="64 bytes, a page at most 63"):
        kv_groups(spec, name="p", dtype="bfloat16", max_page_bytes=63)


def test_latent_pages_hold_one_half() -> None:
    spec = read_decoder_spec(DEEPSEEK)
    (group,) = kv_groups(spec, name="p", dtype="float32", max_page_bytes=1 << 20)
    assert group.layout.name == "p.latent"
    assert (group.layout.shape, group.value_dim) == ((3, 1, 16, 1, 32), 24)


def test_layers_split_over_groups_change_nothing(source: Path) -> None:
    one = load(source)
    many = load_language(source, dtype=torch.float32, name="m", max_page_bytes=128)
    assert len(many.groups) == 3
    assert torch.equal(scores(one), scores(many))


def test_rows_of_a_batch_do_not_see_each_other(source: Path) -> None:
    model = load(source)
    tokens = torch.randint(61, (3, 8))
    lengths = (3, 8, 5)
    with torch.inference_mode():
        kv = DenseKv(model.groups, num_rows=3, max_tokens=8)
        kv.extend(lengths)
        flat = torch.cat([row[:length] for row, length in zip(tokens, lengths, strict=True)])
        positions = torch.cat([torch.arange(length) for length in lengths])
        together = model.logits(model.run(model.embed(flat), positions, kv, range(3)))
        for part, row, length in zip(together.split(lengths), tokens, lengths, strict=True):
            alone = DenseKv(model.groups, num_rows=1, max_tokens=8)
            alone.extend((length,))
            hidden = model.embed(row[:length])
            want = model.logits(model.run(hidden, torch.arange(length), alone, range(3)))
            torch.testing.assert_close(part, want, atol=1e-5, rtol=1e-4)


def test_rejected_tokens_are_forgotten(source: Path) -> None:
    model = load(source)

    def fed(kv: DenseKv, *tokens: int) -> Tensor:
        kv.extend((len(tokens),))
        positions = torch.arange(kv.lengths[0] - len(tokens), kv.lengths[0])
        return model.logits(model.run(model.embed(torch.tensor(tokens)), positions, kv, range(3)))

    with torch.inference_mode():
        kept, drafted = (DenseKv(model.groups, num_rows=1, max_tokens=9) for _ in range(2))
        fed(kept, 1, 2, 3)
        want = fed(kept, 4)
        fed(drafted, 1, 2, 3)
        fed(drafted, 50, 51)
        drafted.truncate((3,))
        assert torch.equal(fed(drafted, 4), want)
        with pytest.raises(ValueError, match="10 tokens in a row, there is room for 9"):
            drafted.extend((6,))


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))

    return change


def _weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return rewrite


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(weight_map: object) -> Callable[[Path], None]:
    text = json.dumps({"weight_map": weight_map})
    return _text("model.safetensors.index.json", text)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "unsupported family": (
        _config(model_type="qwen3_moe_next", architectures=["Qwen3MoeNextForCausalLM"]),
        "Qwen3MoeNextForCausalLM.*'qwen3_moe_next'.*nearest supported one is 'qwen3_moe'",
    ),
    "no family": (_config(model_type=None), "model_type"),
    "quantised": (_config(quantization_config={"quant_method": "awq"}), "awq"),
    "missing size": (_config(hidden_size=None), "hidden_size: expected, but missing"),
    "huge size": (
        _config(vocab_size=10**12),
        "vocab_size: expected 1..16777216, got 1000000000000",
    ),
    "too many layers": (
        _config(num_hidden_layers=10**6),
        "num_hidden_layers: expected 1..4096, got 1000000",
    ),
    "too many experts": (
        _config(model_type="mixtral", num_local_experts=10**6),
        "num_local_experts: expected 1..4096, got 1000000",
    ),
    "negative size": (_config(num_hidden_layers=-1), "num_hidden_layers: expected 1"),
    "text for a size": (
        _config(hidden_size="32"),
        "hidden_size: expected a whole number, got '32'",
    ),
    "NaN": (_config(rms_norm_eps=float("nan")), "rms_norm_eps: expected a positive number"),
    "heads": (_config(num_key_value_heads=3), "multiple of num_key_value_heads = 3, got 4"),
    "activation": (_config(hidden_act="relu6"), "hidden_act: expected one of .*'relu6'"),
    "positions": (
        _config(rope_scaling={"rope_type": "longrope", "short_factor": [1.0]}),
        "rope_type: expected one of .*'longrope'",
    ),
    "no JSON": (_text("config.json", "{'a': 1}"), "config.json: not readable JSON"),
    "JSON list": (_text("config.json", "[]"), "expected an object, got list"),
    "deep JSON": (_text("config.json", "[" * 100_000), "config.json: not readable JSON"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "not readable JSON: No such file",
    ),
    "bad eos": (_text("generation_config.json", '{"eos_token_id": "a"}'), "eos_token_id"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "found neither"),
    "pickled weights": (_pickled, "found pytorch_model.bin"),
    "truncated": (_truncate, "header describes .* bytes of data, the file has"),
    "missing": (
        _weights(lambda w: w.__delitem__(NORM)),
        "model.norm.weight: expected, but missing",
    ),
    "unexpected": (
        _weights(lambda w: w.update({"model.layers.0.extra": torch.ones(1)})),
        "model.layers.0.extra: unexpected",
    ),
    "one layer too many": (_config(num_hidden_layers=2), "model.layers.2.*unexpected.*and 6 more"),
    "shape": (
        _weights(lambda w: w.update({NORM: torch.ones(31)})),
        r"model.norm.weight: shape expected \(32,\), got \(31,\)",
    ),
    "dtype": (
        _weights(lambda w: w.update({NORM: torch.ones(32, dtype=torch.int64)})),
        "model.norm.weight: dtype expected one of F32, F16, BF16, got I64",
    ),
    "shard is not there": (
        _index({NORM: "model-1.safetensors"}),
        "is missing, the index names 1 file",
    ),
    "shard elsewhere": (_index({NORM: "../../etc/x.safetensors"}), "a .safetensors file beside it"),
    "shard is a pickle": (_index({NORM: "model.bin"}), "a .safetensors file beside it"),
    "index of numbers": (_index({NORM: 1}), "a .safetensors file beside it, got '1'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_by_name(case: str, folder: Path) -> None:
    change, match = BAD[case]
    change(folder)
    with pytest.raises(CheckpointError, match=match):
        load(folder)


@pytest.mark.skipif(
    bool(why_not_packed(torch.bfloat16)), reason="this CPU lays out no bfloat16 weights"
)
@pytest.mark.parametrize("config", [LLAMA, MOE, DEEPSEEK], ids=lambda config: config["model_type"])
def test_packed_rows_have_the_same_bits_in_any_batch(config: dict[str, Any]) -> None:
    """What a request gets does not depend on who else is there, nor on how its prompt was cut."""
    model = random_language(config, dtype=torch.bfloat16, name="m")
    tokens = torch.arange(16) * 5 % 61
    layers = range(3)

    def outputs(num_rows: int) -> Tensor:
        parts = []
        for some in torch.split(tokens, num_rows):
            kv = DenseKv(model.groups, num_rows=len(some), max_tokens=1)
            kv.extend([1] * len(some))
            positions = torch.zeros(len(some), dtype=torch.int64)
            parts.append(model.logits(model.run(model.embed(some), positions, kv, layers)))
        return torch.cat(parts)

    with torch.inference_mode():
        alone = outputs(1)
        for num_rows in (2, 3, 8, 16):
            assert torch.equal(outputs(num_rows), alone), f"{num_rows} rows"


def test_promising_weights_loads_no_compiler(folder: Path) -> None:
    """In a process of its own: it would take a second, and 100 MiB."""
    code = f"""
import sys, torch
from pathlib import Path
from ganglion.models.decoder_load import load_language
load_language(Path({str(folder)!r}), dtype=torch.bfloat16, name="m")
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_promised_module_has_shapes_only() -> None:
    with promised():
        linear, table = nn.Linear(3, 2), nn.Embedding(5, 4)
    assert linear.weight.is_meta
    assert table.weight.is_meta
    assert table.weight.shape == (5, 4)
