"""Plans against what is really loaded: pages and parameters of every family that is served; the command itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ganglion.bench.shapes import TOY_DENSE, TOY_MOE
from ganglion.cli.main import main
from ganglion.clock import RealClock
from ganglion.kernels.probe import probe
from ganglion.models.decoder_load import load_language, random_language
from ganglion.plan.footprint import read_shape, weigh
from ganglion.plan.headers import read_folder

GEMMA = {**TOY_DENSE, "model_type": "gemma3_text", "sliding_window": 64, "num_hidden_layers": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TOY_DENSE, "model_type": "llama"},
    "mistral": {**TOY_DENSE, "model_type": "mistral", "sliding_window": 128},
    "qwen2": {
        **TOY_DENSE,
        "model_type": "qwen2",
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 1,
    },
    "qwen3": {**TOY_DENSE, "num_hidden_layers": 60, "head_dim": 512, "vocab_size": 32},
    "gemma2": {**GEMMA, "model_type": "gemma2"},
    "gemma3": GEMMA,
    "qwen3_moe": dict(TOY_MOE),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_planned_pages_are_those_of_the_model(family: str) -> None:
    config = {key: value for key, value in CONFIGS[family].items() if value is not None}
    model = random_language(config, dtype=torch.bfloat16, name="m")
    planned = read_shape(config, where="x").kv_groups("bfloat16")
    real: dict[str, list[int]] = {}
    for group in model.groups:
        kind = "kv-window" if group.window else "kv"
        assert group.window == next(each.window or None for each in planned if each.name == kind)
        real.setdefault(kind, []).append(group.layout.num_pages(100) * group.layout.page_bytes)
    for each in planned:
        needed = each.num_layers * each.layer_bytes * 100
        assert sum(real[each.name]) >= needed
        if each.layers_per_page == each.num_layers:
            (group,) = (g for g in model.groups if ("kv-window" if g.window else "kv") == each.name)
            assert (group.layout.slots, group.layout.page_bytes) == (each.slots, each.page_bytes)
    assert {each.name for each in planned} == real.keys()


@pytest.mark.parametrize("config", [TOY_DENSE, TOY_MOE], ids=["dense", "moe"])
def test_the_command_plans_what_load_loads(
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ganglion.bench.shapes import shape_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = shape_folder(config, seed=0)
    assert load_language(folder, dtype=torch.bfloat16, name="m").spec.vocab_size == 320
    theirs = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert weigh(read_folder(folder), dtype="bfloat16").num_values == theirs
    line = ["plan", str(folder), "--rows", "3", "--json", "plan.json", "--dtype", "bfloat16"]
    assert main(line) == 0
    text = capsys.readouterr().out
    for part in ("weights", "pages", "memory", "expected", "decode, 3 rows", "wall", "fits"):
        assert part in text
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["served"] is True
    assert [each["num_rows"] for each in document["decode"]] == [1, 3, 8, 32]
    kept = (tmp_path / "cache" / "ganglion" / "rates.json").read_text()
    assert main(line) == 0  # the second time nothing is measured
    assert (tmp_path / "cache" / "ganglion" / "rates.json").read_text() == kept
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--context", "0"], "--context: expected 1..2048"),
        (["--context", "9999"], "--context: expected 1..2048"),
        (["--rows", "0"], "--rows: expected 1..4096"),
        (["--json", "no/such/plan.json"], "No such file"),
    ],
)
def test_flags_out_of_range_are_refused(
    flags: list[str],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ganglion.bench.shapes import shape_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["plan", str(shape_folder(TOY_DENSE, seed=0)), *flags]) == 1
    assert match in capsys.readouterr().err


def test_a_policy_has_no_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "metaworld-ten", "--context", "5"]) == 1
    assert "a policy has no context" in capsys.readouterr().err


def test_a_family_that_is_not_served_is_planned_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ganglion.bench.shapes import shape_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = shape_folder(TOY_DENSE, seed=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "not served: " in text
    assert "nearest supported" in text


def test_the_probe_measures_a_machine_and_leaves_threads_alone() -> None:
    before = torch.get_num_threads()
    probed = probe(RealClock(), dtype="float32", num_threads=1)
    assert torch.get_num_threads() == before
    assert probed.flops_per_s[512] > probed.flops_per_s[1] > 0
    assert probed.read_bytes_per_s > 1e8
    assert 0 < probed.call_us < 1e4
