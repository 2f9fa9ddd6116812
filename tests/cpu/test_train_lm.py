"""Language model training: a corpus that is a function of the installation, resumable runs, folders that load elsewhere."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from ganglion.errors import CheckpointError, FieldError, GanglionError
from ganglion.train.lm import LmFitConfig, LmProgress, batch_of_step, fit_lm, orthogonal, rate_share
from ganglion.train.lm_corpus import (
    END_OF_TEXT,
    Corpus,
    Document,
    corpus_of,
    encode,
    is_held_out,
    read_corpus,
)
from ganglion.train.lm_evaluate import evaluate_lm
from ganglion.train.lm_model import DENSE, MOE, LmConfig, Routing, TrainedLm, balance_loss
from ganglion.train.lm_ship import ship_lm, tokenizer_json

transformers = pytest.importorskip("transformers")

SMALL = {
    "tiny-moe": replace(MOE, hidden_size=48, num_layers=2, num_heads=6, head_dim=16),
    "tiny-dense": replace(DENSE, hidden_size=48, num_layers=3, num_heads=6, head_dim=16),
}
QUICK = LmFitConfig(
    num_steps=20,
    tokens_per_step=512,
    length=64,
    long_length=256,
    num_warmup_steps=4,
    num_steps_per_state=10,
)


def _text(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return b"".join(rng.choice([b"def ", b"self.", b"return ", b"x = 1\n"], 400).tolist())


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Sixty small documents."""
    return corpus_of(
        [Document(name=f"m{i}.py", kind="source", text=_text(i)) for i in range(60)]
        + [Document(name="licence/a", kind="licence", text=_text(99))]
    )


def _ignore(_: LmProgress) -> None:
    pass


def test_the_corpus_of_an_installation_is_always_the_same() -> None:
    first, second = (read_corpus(max_bytes=1_500_000) for _ in range(2))
    assert first.sha256 == second.sha256
    assert np.array_equal(first.train, second.train)
    assert set(first.held_out) == {"docstring", "source", "topic"}
    assert 0.02 < first.num_held_out_tokens / len(first.train) < 0.2
    assert int(first.train.max()) == END_OF_TEXT


def test_a_module_and_its_docstrings_are_on_one_side() -> None:
    documents = [
        Document(name=f"m{i}.py", kind=kind, text=f"{kind} {i} ".encode() * 20)
        for i in range(100)
        for kind in ("docstring", "source")
    ]
    made = corpus_of(documents)
    for document in documents:
        wanted = bytes(document.text)
        train = made.train[made.train != END_OF_TEXT].astype(np.uint8).tobytes()
        held = made.held_out[document.kind]
        side = held[held != END_OF_TEXT].astype(np.uint8).tobytes()
        assert (wanted in side) == is_held_out(document.name)
        assert (wanted in train) != is_held_out(document.name)


def test_equal_texts_count_once_and_licences_are_never_held_out() -> None:
    text = b"Permission is hereby granted, free of charge, to any person " * 2
    documents = [Document(name=f"licence/{i}", kind="licence", text=text) for i in range(50)]
    documents += [Document(name=f"m{i}.py", kind="source", text=_text(i)) for i in range(60)]
    made = corpus_of(documents)
    assert made.num_documents == 61
    assert "licence" not in made.held_out


def test_an_installation_without_sources_is_refused() -> None:
    with pytest.raises(GanglionError, match="0 documents to train on"):
        corpus_of([])


def test_a_batch_is_a_function_of_seed_and_step(corpus: Corpus) -> None:
    tokens = torch.from_numpy(corpus.train.astype(np.int64))

    def batch(step: int, seed: int = 0) -> torch.Tensor:
        return batch_of_step(replace(QUICK, seed=seed), tokens, step=step)

    assert torch.equal(batch(3), batch(3))
    assert not torch.equal(batch(3), batch(4))
    assert not torch.equal(batch(3), batch(3, seed=1))
    assert batch(3).shape == (8, 65)
    assert batch(15).shape == (2, 257)  # one step in sixteen is long


def test_the_rate_rises_then_falls() -> None:
    shares = [rate_share(QUICK, step) for step in range(QUICK.num_steps)]
    assert shares[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[-1] < 0.1


def test_a_turned_matrix_is_nearly_orthogonal_and_keeps_its_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 48), (48, 24), (1, 16, 16)):
        matrices = torch.randn(shape, generator=generator)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        turned = orthogonal(matrices)
        assert turned.shape == matrices.shape
        inner = left.mT @ turned @ right.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert 0.4 < float(values.min()) <= float(values.max()) < 1.4
        assert float((inner - torch.diag_embed(values)).abs().max()) < 0.1


@pytest.mark.parametrize("name", SMALL)
def test_twenty_steps_learn_and_a_resumed_run_is_the_uninterrupted_one(
    name: str, corpus: Corpus, tmp_path: Path
) -> None:
    heard: list[LmProgress] = []
    whole = fit_lm(QUICK, SMALL[name], corpus, tmp_path / "whole", heard.append)
    assert [progress.step for progress in heard] == list(range(1, 21))
    assert heard[-1].loss < heard[0].loss
    assert (heard[0].balance > 0) == SMALL[name].is_moe
    cut = fit_lm(QUICK, SMALL[name], corpus, tmp_path / "cut", _ignore, until_step=13)
    assert cut.step == 13
    resumed = fit_lm(QUICK, SMALL[name], corpus, tmp_path / "cut", _ignore)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert resumed.train_s > cut.train_s > 0


def test_a_state_of_another_run_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(QUICK, num_steps=1)
    fit_lm(config, SMALL["tiny-dense"], corpus, tmp_path, _ignore)
    with pytest.raises(CheckpointError, match=r"gate_up expected \(32, 128, 48\), got None"):
        fit_lm(config, SMALL["tiny-moe"], corpus, tmp_path, _ignore)
    with pytest.raises(CheckpointError, match="trained on corpus"):
        fit_lm(config, SMALL["tiny-dense"], replace(corpus, sha256="0" * 64), tmp_path, _ignore)


def test_balance_is_one_when_experts_are_used_alike_and_more_when_not() -> None:
    alike = torch.full((8, 4), 0.25)
    spread = torch.tensor([[0, 1], [2, 3]] * 4)
    assert float(balance_loss((Routing(alike, spread),))) == pytest.approx(1.0)
    narrow = torch.tensor([[0, 1]] * 8)
    skewed = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 8)
    assert float(balance_loss((Routing(skewed, narrow),))) == pytest.approx(2.0)
    both = (Routing(alike, spread), Routing(skewed, narrow))
    assert float(balance_loss(both)) == pytest.approx(1.5)


@pytest.mark.parametrize("name", SMALL)
def test_transformers_reads_the_folder_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = TrainedLm(SMALL[name])
    model.initialise(0)
    model.to(torch.bfloat16).float()  # what the folder can hold
    ship_lm(model, QUICK, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        type(theirs).__name__
        == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    )
    token_ids = torch.randint(0, 257, (2, 77), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, (found, _) = theirs(token_ids).logits, model(token_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert theirs.generation_config.eos_token_id == END_OF_TEXT


def test_the_tokenizer_is_the_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json()))
    texts = [chr(code) for code in (*range(0x180), 0x3B1, 0x4E2D, 0x1F600)] + [
        "def f(x):\n    return x  # \t ok\r\n",
        " leading and trailing ",
        "naïve café 中文 🙂",
        "",
    ]
    for text in texts:
        token_ids = tokenizer.encode(text).ids
        assert token_ids == list(text.encode())
        assert tokenizer.decode(token_ids) == text
    assert [tokenizer.token_to_id(tokenizer.id_to_token(i)) for i in range(257)] == list(range(257))
    assert tokenizer.encode("a<|endoftext|>").ids == [97, END_OF_TEXT]
    ship_lm(TrainedLm(SMALL["tiny-dense"]), QUICK, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("abc").input_ids == [97, 98, 99]
    assert loaded.eos_token_id == END_OF_TEXT
    conversation = [{"role": "user", "content": "hello"}]
    shown = loaded.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert shown == "user: hello\n\nassistant:"


@pytest.mark.parametrize("name", SMALL)
def test_held_out_figures_are_those_of_a_plain_loop(name: str, corpus: Corpus) -> None:
    config: LmConfig = SMALL[name]
    model = TrainedLm(config)
    model.initialise(0)
    heard: list[tuple[int, int]] = []
    figures = evaluate_lm(
        model, corpus, length=128, on_progress=lambda done, total: heard.append((done, total))
    )
    rounded = TrainedLm(config)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16).float()
    tokens = torch.from_numpy(corpus.held_out["source"].astype(np.int64))
    total, chosen, num_same = 0.0, torch.zeros(config.num_experts), 0
    for start in range(0, len(tokens) - 1, 128):
        row = tokens[start : start + 129][None]
        with torch.no_grad():
            scores, routings = rounded(row[:, :-1])
        total += float(functional.cross_entropy(scores[0], row[0, 1:], reduction="sum"))
        if routings:
            experts = routings[0].experts.tolist()
            chosen += torch.bincount(routings[0].experts.flatten(), minlength=config.num_experts)
            num_same += sum(len(set(a) & set(b)) for a, b in pairwise(experts))
    assert figures.loss == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert sum(figures.num_tokens_by_kind.values()) == len(tokens) - 1
    assert list(figures.loss_by_position) == ["0-63", "64-127"]
    assert heard[-1][0] == heard[-1][1]
    if not config.is_moe:
        assert figures.routers == ()
        return
    first = figures.routers[0]
    hottest = chosen.sort(descending=True).values[:8].sum() / chosen.sum()
    assert first.hottest_quarter_share == pytest.approx(float(hottest), abs=1e-3)
    num_followers = len(tokens) - 1 - heard[-1][1]
    assert first.reuse_share == pytest.approx(num_same / (4 * num_followers), abs=1e-3)


def test_a_document_ends_with_its_mark() -> None:
    assert encode(b"ab").tolist() == [97, 98, END_OF_TEXT]


def test_the_command_makes_a_folder_with_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ganglion.cli.main import main

    line = ["train", "lm", "--quick", "--dense", "--steps", "2", "--run", str(tmp_path)]
    assert main(line) == 0
    assert "nats per byte held out" in capsys.readouterr().out
    folder = tmp_path / "tiny-dense" / "checkpoint"
    card = (folder / "README.md").read_text()
    assert "2 steps of 4,096 bytes" in card
    assert "Routers" not in card
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    assert 2 < figures["loss"] < 6


def test_flags_of_other_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from ganglion.cli.main import main

    assert main(["train", "lm", "--episodes", "3"]) != 0
    assert "--episodes" in capsys.readouterr().err
    assert main(["train", "fit", "--moe"]) != 0
    assert "--moe" in capsys.readouterr().err
    assert issubclass(FieldError, GanglionError)
