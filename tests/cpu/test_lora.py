"""LoRA adapters on the decoder: equal to the merged model, for every family; corrupt folders refused before mapping."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ganglion.errors import CheckpointError
from ganglion.models import lora
from ganglion.models.decoder import Decoder
from ganglion.models.decoder_load import load_language, random_language
from ganglion.models.dense_kv import DenseKv
from ganglion.models.lora import LoraBatch, LoraRows, Pieces, rows_of
from ganglion.models.lora_folder import CONFIG, WEIGHTS, lora_sites
from ganglion.models.lora_load import AdapterSet, LoraAdapter, read_adapters
from tests.cpu.test_decoder import BASE, CASES, assert_close, saved
from tests.lora_folder import merge, write_adapter

DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = (*DENSE, "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def adapters_of(model: Decoder, max_page_bytes: int = 1 << 20, **folders: Path) -> AdapterSet:
    return read_adapters(
        folders,
        model.decoder_spec,
        model=model.spec.name,
        dtype=model.spec.dtype,
        max_page_bytes=max_page_bytes,
    )


def filled(adapter: LoraAdapter, found: AdapterSet) -> Pieces:
    """In pages of their own, which held other bytes before."""
    dtype = getattr(torch, found.layout.dtype)
    pages = [
        torch.full(found.layout.shape, torch.nan, dtype=dtype) for _ in range(adapter.num_pages)
    ]
    adapter.fill(dict(enumerate(pages)))
    return adapter.pieces(pages)


def decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = load_language(folder, dtype=dtype, name="m")
    assert isinstance(model, Decoder)
    return model


def run(
    model: Decoder, rows: list[tuple[Tensor, Pieces | None]], order: tuple[int, ...]
) -> list[Tensor]:
    """Logits of each row's tokens, all in one batch; `order`: rows as they stand in it."""
    kv = DenseKv(model.groups, num_rows=len(rows), max_tokens=64)
    kv.extend([len(rows[at][0]) for at in order])
    spans: dict[int, range] = {}
    start = 0
    for at in order:
        spans[at] = range(start, start + len(rows[at][0]))
        start = spans[at].stop
    by_adapter: dict[int, tuple[Pieces, list[range]]] = {}
    for at in order:
        pieces = rows[at][1]
        if pieces is not None:
            by_adapter.setdefault(id(pieces), (pieces, []))[1].append(spans[at])
    batch = LoraBatch(
        [LoraRows(pieces=pieces, rows=rows_of(of_one)) for pieces, of_one in by_adapter.values()],
        num_tokens=start,
    )
    with torch.inference_mode():
        hidden = model.embed(torch.cat([rows[at][0] for at in order]))
        positions = torch.cat([torch.arange(len(rows[at][0])) for at in order])
        hidden = model.run_adapted(hidden, positions, kv, range(model.spec.num_layers), batch)
        logits = model.logits(hidden)
    return [logits[spans[at].start : spans[at].stop] for at in range(len(rows))]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_merged_model(case: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, case)
    model = decoder(tmp_path)
    folder = write_adapter(tmp_path / "odd", model.decoder_spec, rank=5, targets=ALL)
    found = adapters_of(model, odd=folder)
    tokens = torch.randint(3, BASE["vocab_size"], (23,))
    with torch.inference_mode():
        plain = theirs(tokens[None]).logits[0]
        merge(theirs, folder)
        want = theirs(tokens[None]).logits[0]
    assert (want - plain).abs().max() > 0.01 * plain.abs().max(), "the adapter changes nothing"
    (got,) = run(model, [(tokens, filled(found.adapters["odd"], found))], (0,))
    assert_close(got, want)


@pytest.mark.parametrize(
    ("rank", "changes"),
    [
        (1, {}),
        (7, {"use_rslora": True}),
        (3, {"rank_pattern": {"layers.1.self_attn.q_proj": 9, "down_proj": 2}}),
        (4, {"alpha_pattern": {"v_proj": 11, "model.layers.2.mlp.up_proj": 0.5}}),
    ],
)
@pytest.mark.parametrize("max_page_bytes", [1 << 20, 4096, 640])
def test_ranks_scales_and_pages(
    rank: int, changes: dict[str, Any], max_page_bytes: int, tmp_path: Path
) -> None:
    """However small the pages, so that products are cut between ranks."""
    theirs = saved(tmp_path, "qwen3")
    model = decoder(tmp_path)
    folder = write_adapter(tmp_path / "a", model.decoder_spec, rank=rank, targets=DENSE, **changes)
    found = adapters_of(model, max_page_bytes, a=folder)
    tokens = torch.randint(3, BASE["vocab_size"], (11,))
    merge(theirs, folder)
    with torch.inference_mode():
        want = theirs(tokens[None]).logits[0]
    (got,) = run(model, [(tokens, filled(found.adapters["a"], found))], (0,))
    assert_close(got, want)


@pytest.mark.parametrize("max_page_bytes", [1 << 20, 1024])
@pytest.mark.parametrize("most", [0, lora.MAX_TOKENS_TOGETHER])
@pytest.mark.parametrize("case", ["llama-biases-tied", "deepseek-v3"])
def test_rows_with_different_adapters_equal_each_alone(
    case: str, most: int, max_page_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter by adapter, as in large batches, and all together, as in small ones."""
    monkeypatch.setattr(lora, "MAX_TOKENS_TOGETHER", most)
    saved(tmp_path, case)
    model = decoder(tmp_path)
    few = ("v_proj", "o_proj", "kv_b_proj")
    folders = {
        "all": write_adapter(tmp_path / "x", model.decoder_spec, rank=5, targets=ALL, seed=1),
        "few": write_adapter(tmp_path / "y", model.decoder_spec, rank=2, targets=few, seed=2),
        "one": write_adapter(
            tmp_path / "z",
            model.decoder_spec,
            targets=few,
            seed=3,
            is_used=lambda name: ".1." in name,
        ),
    }
    found = adapters_of(model, max_page_bytes, **folders)
    pieces = {name: filled(adapter, found) for name, adapter in found.adapters.items()}
    names = ("all", None, "few", "all", "one", None, "few")
    rows = [
        (
            torch.randint(3, BASE["vocab_size"], (1 + at % 3,)),
            None if name is None else pieces[name],
        )
        for at, name in enumerate(names)
    ]
    alone = [run(model, [row], (0,))[0] for row in rows]
    with torch.inference_mode():
        kv = DenseKv(model.groups, num_rows=1, max_tokens=8)
        kv.extend((len(rows[1][0]),))
        positions = torch.arange(len(rows[1][0]))
        plain = model.logits(model.run(model.embed(rows[1][0]), positions, kv, range(3)))
    assert_close(alone[1], plain)
    for order in ((0, 1, 2, 3, 4, 5, 6), (3, 0, 5, 1, 6, 2, 4)):
        for got, want in zip(run(model, rows, order), alone, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_packed_bfloat16_is_near_float32(family: str, tmp_path: Path) -> None:
    """Products laid out for the matrix units, where there are any, with the activation apart."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {**BASE, **sizes, "model_type": family, **(experts if "moe" in family else {})}
    models = [random_language(config, dtype=d, name="m") for d in (torch.float32, torch.bfloat16)]
    tokens = torch.arange(3, 20)
    outs = []
    for model in models:
        assert isinstance(model, Decoder)
        folder = write_adapter(tmp_path / "a", model.decoder_spec, rank=4, targets=DENSE, size=0.6)
        found = adapters_of(model, a=folder)
        outs.append(run(model, [(tokens, filled(found.adapters["a"], found))], (0,))[0])
        outs.append(run(model, [(tokens, None)], (0,))[0])
    full, plain, half, _ = outs
    assert (full - half).norm() < 0.05 * full.norm()
    assert (full - plain).norm() > 0.3 * full.norm()


# --- what is refused ---------------------------------------------------------------------------------------------


def _changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def _tensors(folder: Path, **tensors: Tensor | None) -> None:
    held = load_file(folder / WEIGHTS)
    for key, value in tensors.items():
        name = key.replace("__", ".")
        if value is None:
            del held[name]
        else:
            held[name] = value
    save_file(held, folder / WEIGHTS)


Q = "base_model__model__model__layers__0__self_attn__q_proj__"
EXPERT = "base_model__model__model__layers__0__mlp__experts__1__up_proj__"
BAD: dict[str, tuple[Any, str]] = {
    "kind": (lambda f: _changed(f, peft_type="IA3"), "peft_type: expected LORA, got 'IA3'"),
    "dora": (lambda f: _changed(f, use_dora=True), "use_dora: True is not served"),
    "bias": (lambda f: _changed(f, bias="all"), "bias: expected none, got 'all'"),
    "pissa": (lambda f: _changed(f, init_lora_weights="pissa"), "init_lora_weights"),
    "saved modules": (lambda f: _changed(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "unknown": (lambda f: _changed(f, new_trick={"a": 1}), "new_trick"),
    "rank": (lambda f: _changed(f, r=0), "r: expected a number of 1 to"),
    "rank text": (lambda f: _changed(f, r="8"), "r: expected a number of 1 to"),
    "other rank": (lambda f: _changed(f, r=8), "rank expected 8"),
    "alpha": (lambda f: _changed(f, lora_alpha=float("nan")), "lora_alpha: expected a number"),
    "pattern": (lambda f: _changed(f, rank_pattern={"(a+)+$": 3}), "expected names of layers"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "not readable JSON"),
    "no object": (lambda f: (f / CONFIG).write_text("[]"), "expected an object"),
    "deep json": (lambda f: (f / CONFIG).write_text("[" * 100_000), "not readable JSON"),
    "no config": (lambda f: (f / CONFIG).unlink(), "not readable JSON"),
    "no weights": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "found adapter_model.bin"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]),
        "the file has",
    ),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x02}q\x00."), "header"),
    "half": (lambda f: _tensors(f, **{Q + "lora_B__weight": None}), "one is missing"),
    "shape": (
        lambda f: _tensors(f, **{Q + "lora_A__weight": torch.zeros(4, 5)}),
        "got (4, 5)",
    ),
    "dtype": (
        lambda f: _tensors(f, **{Q + "lora_A__weight": torch.zeros(4, 42, dtype=torch.int8)}),
        "got I8",
    ),
    "magnitude": (
        lambda f: _tensors(f, **{Q + "lora_magnitude_vector": torch.zeros(4)}),
        "lora_magnitude_vector: expected",
    ),
    "expert": (
        lambda f: _tensors(f, **{EXPERT + "lora_A__weight": torch.zeros(4, 42)}),
        "adapters of experts are not served",
    ),
    "router": (
        lambda f: _tensors(
            f, base_model__model__model__layers__0__mlp__gate__lora_A__weight=torch.zeros(4, 42)
        ),
        "adapters of routers are not served",
    ),
    "head": (
        lambda f: _tensors(f, base_model__model__lm_head__lora_A__weight=torch.zeros(4, 42)),
        "adapters of embeddings and heads are not served",
    ),
    "layer": (
        lambda f: _tensors(
            f,
            base_model__model__model__layers__7__mlp__up_proj__lora_A__weight=torch.zeros(4, 42),
        ),
        "expected layers of 0 to 2, got 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_before_a_weight_is_mapped(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = BAD[case]
    saved(tmp_path, "qwen3")
    model = decoder(tmp_path)
    folder = write_adapter(tmp_path / "a", model.decoder_spec)
    damage(folder)
    monkeypatch.setattr("ganglion.models.lora_load.safe_open", None)
    with pytest.raises(CheckpointError) as caught:
        adapters_of(model, a=folder)
    assert message in str(caught.value), caught.value


def test_numbers_that_are_none_are_refused_when_they_come_in(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    model = decoder(tmp_path)
    folder = write_adapter(tmp_path / "a", model.decoder_spec)
    _tensors(folder, **{Q + "lora_A__weight": torch.full((4, 42), torch.inf)})
    found = adapters_of(model, a=folder)
    with pytest.raises(
        CheckpointError, match=r"q_proj\.lora_A\.weight: holds numbers that are not"
    ):
        filled(found.adapters["a"], found)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    model = decoder(tmp_path)
    folder = write_adapter(tmp_path / "a", model.decoder_spec)
    found = adapters_of(model, a=folder)
    write_adapter(folder, model.decoder_spec, rank=5, seed=9)
    with pytest.raises(CheckpointError, match="changed since the server started"):
        filled(found.adapters["a"], found)


def test_a_page_too_small_for_one_rank_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    model = decoder(tmp_path)
    folder = write_adapter(tmp_path / "a", model.decoder_spec)
    with pytest.raises(CheckpointError, match="does not fit into a page of 256 bytes"):
        adapters_of(model, 256, a=folder)


def test_sites_are_the_products_of_the_decoder(tmp_path: Path) -> None:
    """Every site names columns that its product has, none twice."""
    for case in ("qwen3", "gemma3", "qwen2-moe", "deepseek-v3"):
        saved(tmp_path / case, case)
        model = decoder(tmp_path / case)
        used: dict[tuple[int, str], int] = {}
        for site in lora_sites(model.decoder_spec).values():
            if site.product == "attention.kv_b_proj":
                continue  # taken apart when the model is packed
            product = model.get_submodule(f"layers.{site.layer}.{site.product}")
            assert isinstance(product, torch.nn.Linear)
            assert product.in_features == site.num_inputs
            key = (site.layer, site.product)
            assert site.start == used.get(key, 0)
            used[key] = site.start + site.num_outputs
            assert used[key] <= product.out_features
