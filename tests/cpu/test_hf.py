"""Families without a native decoder: transformers' own modules over pages, equal to themselves run plainly."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ganglion.engine.language_policy import POLICIES
from ganglion.errors import CheckpointError
from ganglion.models.decoder_load import load_language
from ganglion.models.dense_kv import DenseKv
from ganglion.models.hf.load import MAX_DIFFERENCE, load_module_language, outline_module_language
from ganglion.models.hf.model import HfLanguage
from ganglion.models.language import LanguageModel, StateGroup, can_rewind
from tests.cpu.language_toy import Stand

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
DELTA = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"sliding_window": 11}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25}),
    "cohere2": ("Cohere2", {"sliding_window": 7, "num_hidden_layers": 4}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "granitemoe": ("GraniteMoe", EXPERTS),
    "glm4": ("Glm4", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 10}),
    "olmo3": ("Olmo3", {"sliding_window": 7, "num_hidden_layers": 4}),
    "smollm3": ("SmolLM3", {}),
    "opt": ("OPT", {}),  # positions are added before the first layer
    "minimax_m2": ("MiniMaxM2", EXPERTS | {"head_dim": 8, "rotary_dim": 4}),
    "phimoe": ("Phimoe", EXPERTS),
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": (
        "Qwen3Next",
        DELTA
        | {"num_experts": 5, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "falcon_h1": (  # attention and a state in every layer
        "FalconH1",
        MAMBA | {"head_dim": 8, "mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        MAMBA
        | EXPERTS
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32},
    ),
    "mamba2": (  # no attention at all
        "Mamba2",
        {"num_heads": 12, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "jamba": (  # its mixer forgets its state where several tokens come at once
        "Jamba",
        {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
}
NUM_NEW = 64
LENGTHS = (40, 3, 28, 17, 33, 64, 65, 9)


def made(case: str, folder: Path) -> Any:
    """A module of `case` with noise for weights, saved in `folder`."""
    name, extra = (CASES | HYBRIDS)[case]
    torch.manual_seed(len(case))
    config = getattr(transformers, f"{name}Config")(**(BASE | extra))
    module = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    for key, value in module.named_parameters():
        if value.ndim >= 2 and "conv" not in key:
            value.data.normal_(0, 2.0 * value.shape[-1] ** -0.5)
        else:
            value.data.add_(torch.randn_like(value) * 0.1)
    transformers.utils.logging.disable_progress_bar()
    module.eval().save_pretrained(folder)
    return module


def scores(module: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def prompts() -> list[list[int]]:
    """They share what the shortest has, and end differently."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 97, (max(LENGTHS),), generator=generator).tolist()
    return [[*shared[: length - 2], length, length + 1] for length in LENGTHS]


def through_module(
    folder: Path, *, page_bytes: int = 4096, snapshot_tokens: int | None = None
) -> HfLanguage:
    return load_module_language(
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
        source=str(folder),
        dtype=torch.float32,
        name="m",
        version="1",
        eos_ids=(),
        max_page_bytes=page_bytes,
        snapshot_tokens=snapshot_tokens,
    )


@pytest.mark.parametrize("case", [*CASES, *HYBRIDS])
def test_scores_are_the_modules_own(case: str, tmp_path: Path) -> None:
    theirs = made(case, tmp_path)
    ours = load_language(tmp_path, dtype=torch.float32, name="m", max_page_bytes=4096)
    assert isinstance(ours, LanguageModel)
    assert ours.spec.family == case
    assert ours.spec.eos_ids == (2,)
    (tokens, *_) = prompts()
    want = scores(theirs, tokens)
    kv = DenseKv(ours.groups, num_rows=1, max_tokens=len(tokens))
    got = []
    for start, end in ((0, 13), (13, 38), (38, 39), (39, 40)):
        kv.extend([end - start])
        hidden = ours.embed(torch.tensor(tokens[start:end]))
        for layer in range(ours.spec.num_layers):
            hidden = ours.run(hidden, torch.arange(start, end), kv, range(layer, layer + 1))
        got.append(ours.logits(hidden))
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("case", [*CASES, *HYBRIDS])
def test_engine_equal_to_the_module(case: str, tmp_path: Path) -> None:
    """Eight rows in a pool that is too small for them, preempted, with prefixes found: greedy tokens are its own."""
    theirs = made(case, tmp_path)
    page_bytes = 4096
    ours = through_module(tmp_path, page_bytes=page_bytes, snapshot_tokens=16)
    num_larges = 2 * sum(
        3 if isinstance(group, StateGroup) else group.layout.num_pages(140) for group in ours.groups
    )
    policy = list(POLICIES.values())[len(case) % len(POLICIES)]
    stand = Stand(
        ours,  # type: ignore[arg-type]
        num_large_pages=num_larges,
        large_page_bytes=page_bytes,
        policy=policy,
        max_rows=8,
        max_batch_tokens=40,
    )
    for at, prompt in enumerate(prompts()):
        stand.submit(at, prompt, model="m", max_tokens=NUM_NEW, num_choices=1 + (at == 3))
    for _ in range(3):
        for _ in range(12):
            stand.step()
        stand.engine.preempt_latest()
    stand.run()
    stand.check_empty()
    assert stand.engine.num_preemptions > 0
    for at, prompt in enumerate(prompts()):
        assert stand.tokens[at, 0] == stand.tokens[at, int(at == 3)]
        tokens = [*prompt, *stand.tokens[at, 0]]
        assert len(stand.tokens[at, 0]) == NUM_NEW
        best = scores(theirs, tokens)[len(prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == tokens[len(prompt) :]


@pytest.mark.parametrize("case", ["qwen3_next", "falcon_h1", "lfm2"])
def test_prefix_goes_on_from_a_snapshot(case: str, tmp_path: Path) -> None:
    theirs = made(case, tmp_path)
    ours = through_module(tmp_path, snapshot_tokens=16)
    stand = Stand(ours, num_large_pages=200, large_page_bytes=4096)  # type: ignore[arg-type]
    prompt = prompts()[5]
    stand.submit(1, prompt[:50], model="m", max_tokens=10)
    stand.run()
    assert stand.usage(1).num_cached_tokens == 0
    stand.submit(2, prompt, model="m", max_tokens=10, num_choices=3)
    stand.run()
    # 48 is the last snapshot that both have
    assert stand.usage(2).num_cached_tokens == 48
    tokens = [*prompt, *stand.tokens[2, 0]]
    assert scores(theirs, tokens)[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]
    assert stand.tokens[2, 0] == stand.tokens[2, 1] == stand.tokens[2, 2]
    stand.check_empty()


def test_choices_part_from_a_shared_state(tmp_path: Path) -> None:
    """Drawn apart by their seeds: each choice's state is its own from there on."""
    theirs = made("falcon_h1", tmp_path)
    ours = through_module(tmp_path, snapshot_tokens=32)
    stand = Stand(ours, num_large_pages=200, large_page_bytes=4096)  # type: ignore[arg-type]
    prompt = prompts()[0]
    stand.submit(
        1, prompt, model="m", max_tokens=20, num_choices=3, temperature=2.0, seed=5, num_logprobs=0
    )
    stand.run()
    choices = [tuple(stand.tokens[1, choice]) for choice in range(3)]
    assert len(set(choices)) == 3
    for choice, drawn in enumerate(choices):
        want = scores(theirs, [*prompt, *drawn]).log_softmax(-1)
        got = [
            one.logprob
            for delta in stand.deltas
            if delta.choice == choice
            for one in delta.logprobs
        ]
        for at, (token, logprob) in enumerate(zip(drawn, got, strict=True)):
            assert logprob == pytest.approx(float(want[len(prompt) - 1 + at, token]), abs=1e-3)
    stand.check_empty()


@pytest.mark.parametrize("case", ["granite", "qwen3_next"])
def test_deterministic_bits(case: str, tmp_path: Path) -> None:
    """Alone or with others, cut or whole, preempted or not: the same tokens and bit-equal scores."""
    made(case, tmp_path)
    ours = through_module(tmp_path, snapshot_tokens=16)
    seen = []
    for num_others, num_larges, max_batch_tokens in ((0, 200, 200), (4, 40, 11)):
        stand = Stand(
            ours,  # type: ignore[arg-type]
            num_large_pages=num_larges,
            large_page_bytes=4096,
            max_batch_tokens=max_batch_tokens,
            is_deterministic=True,
        )
        for at in range(num_others):
            stand.submit(at, prompts()[at + 1], model="m", max_tokens=12)
        stand.submit(9, prompts()[0], model="m", max_tokens=12, num_logprobs=0)
        for _ in range(6):
            stand.step()
        if num_others:
            stand.engine.preempt_latest()
        stand.run()
        logprobs = [one.logprob for delta in stand.deltas for one in delta.logprobs]
        seen.append((stand.tokens[9, 0], logprobs))
    assert seen[0] == seen[1]


def test_outline_has_the_same_pages(tmp_path: Path) -> None:
    made("qwen3_next", tmp_path)
    ours = through_module(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    outline = outline_module_language(
        config,
        source="outline",
        dtype=torch.float32,
        name="m",
        version="1",
        eos_ids=(),
        max_page_bytes=4096,
    )
    assert outline.groups == ours.groups
    assert outline.spec == ours.spec
    assert not can_rewind(ours)


def test_states_larger_than_a_page(tmp_path: Path) -> None:
    """A layer's state may lie in several pages, and a page may hold the end of one layer's and all of another's."""
    theirs = made("qwen3_next", tmp_path)
    ours = through_module(tmp_path, page_bytes=1536, snapshot_tokens=16)
    states = [group for group in ours.groups if isinstance(group, StateGroup)]
    assert len(states) > 3
    assert all(group.layout.page_bytes <= 1536 for group in states)
    assert any(len(set(group.layers)) > 1 for group in states)
    stand = Stand(ours, num_large_pages=400, large_page_bytes=1536)  # type: ignore[arg-type]
    prompt = prompts()[0]
    stand.submit(1, prompt, model="m", max_tokens=8)
    stand.run()
    tokens = [*prompt, *stand.tokens[1, 0]]
    assert scores(theirs, tokens)[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]


@pytest.mark.skipif(torch.bfloat16 not in MAX_DIFFERENCE, reason="bfloat16 is not served")
def test_bfloat16(tmp_path: Path) -> None:
    """Linear layers are packed where this CPU gains from it; the load's own check holds them to the module."""
    made("olmo3", tmp_path)
    ours = load_language(tmp_path, dtype=torch.bfloat16, name="m")
    assert ours.spec.dtype == "bfloat16"
    hidden = ours.embed(torch.tensor([5, 6]))
    assert hidden.dtype == torch.bfloat16


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_language(folder, dtype=torch.float32, name="m")
    return caught.value


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_refuses_what_attends_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    error = refused(tmp_path)
    assert "computes its attention by itself" in str(error)


def test_refuses_what_passes_more_between_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    config = transformers.Zamba2Config(
        **BASE | {"num_hidden_layers": 4},
        layer_types=kinds,
        layers_block_type=kinds,
        hybrid_layer_ids=[1, 3],
        mamba_d_state=8,
        n_mamba_heads=4,
        chunk_size=16,
    )
    transformers.Zamba2ForCausalLM(config).save_pretrained(tmp_path)
    error = refused(tmp_path)
    assert "zamba2" in str(error)


def test_refuses_unknown_families_and_names_the_nearest(tmp_path: Path) -> None:
    made("granite", tmp_path)
    edited(tmp_path, model_type="qwen33", architectures=["Qwen33ForCausalLM"])
    error = refused(tmp_path)
    assert "'Qwen33ForCausalLM'" in str(error)
    assert "'qwen3'" in str(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 8}, "shape expected (12, 48), got (16, 48)"),
        ({"intermediate_size": 60}, "shape expected (60, 48), got (56, 48)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_hidden_layers": 4}, "expected, but missing"),
        ({"num_hidden_layers": 2}, "unexpected"),
    ],
)
def test_refuses_configs_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    made("granite", tmp_path)
    edited(tmp_path, **changes)
    assert said in str(refused(tmp_path))


def test_runs_no_code_of_a_folder(tmp_path: Path) -> None:
    made("granite", tmp_path)
    edited(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert load_language(tmp_path, dtype=torch.float32, name="m").spec.family == "granite"


def test_refuses_quantised_bytes(tmp_path: Path) -> None:
    made("granite", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, path)
    assert "I8" in str(refused(tmp_path))


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("granite", tmp_path)
    monkeypatch.delitem(sys.modules, "ganglion.models.hf.load")
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refused(tmp_path)
    assert "'granite'" in str(error)
    assert "nearest supported one" in str(error)
    assert "pip install 'ganglion[hf]'" in error.advice
