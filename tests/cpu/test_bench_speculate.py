"""Bench speculate in its quick form, and the models that say what they are told to."""

from collections.abc import Iterator

import pytest
import torch

from ganglion.bench import speculate
from ganglion.bench.shapes import TOY_DENSE
from ganglion.models.decoder_load import random_language


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_speculate_in_short() -> None:
    metrics = speculate.run(quick=True, seed=0).metrics
    assert metrics["best_speedup"] >= metrics["ngram_copied_ratio"]
    assert 0.0 < metrics["worst_ratio_to_plain"] <= metrics["ngram_new_ratio"]
    assert 0.0 <= metrics["layer_work_saved_share"] <= 1.0


def test_drafted_tokens_hold_with_the_chance_asked_for() -> None:
    target, draft = speculate.scripts(320, 4000, 0.6, seed=1)
    assert float((target == draft).float().mean()) == pytest.approx(0.6, abs=0.03)
    model = random_language(TOY_DENSE, dtype=torch.bfloat16, name="target", seed=0)
    one = torch.zeros(5, model.spec.width, dtype=torch.bfloat16)
    positions = torch.tensor([0, 127, 128, 300, 3999])
    one[:, 0], one[:, 1] = positions // speculate.PLACES, positions % speculate.PLACES
    said = speculate.Scripted(model, target).logits(one).argmax(-1)
    assert said.tolist() == target[positions].tolist()
