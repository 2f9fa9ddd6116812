"""The shipped language models: our decoder and transformers agree on them, and they have learnt what the card says."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from ganglion.models.decoder_load import load_language
from ganglion.models.dense_kv import DenseKv
from ganglion.models.language import LanguageModel
from ganglion.models.text_tokenizer import read_tokenizer
from ganglion.train.lm_corpus import END_OF_TEXT

SHIPPED = Path(str(resources.files("ganglion"))) / "assets" / "language"
NAMES = ("tiny-dense", "tiny-moe")
# written for this test: nobody has trained on it
TEXT = '''"""Shelf: keeps named boxes in order of their weight. Used by the loader."""

from dataclasses import dataclass


@dataclass
class Box:
    """One box."""

    name: str
    weight: float = 0.0


class Shelf:
    def __init__(self, boxes=None):
        self.boxes = list(boxes or [])

    def add(self, box):
        """Add a box to the shelf. Raises ValueError if the name is already used."""
        if any(other.name == box.name for other in self.boxes):
            raise ValueError("a box of that name is already there")
        self.boxes.append(box)
        self.boxes.sort(key=lambda other: other.weight)

    def __len__(self):
        return len(self.boxes)
'''


def _logits(model: LanguageModel, kv: DenseKv, token_ids: Tensor) -> Tensor:
    start = kv.lengths[0]
    kv.extend([len(token_ids)])
    hidden = model.embed(token_ids)
    positions = torch.arange(start, start + len(token_ids))
    return model.logits(model.run(hidden, positions, kv, range(model.spec.num_layers)))


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_and_transformers_agree(name: str) -> None:
    folder = SHIPPED / name
    ours = load_language(folder, dtype=torch.float32, name=name)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = read_tokenizer(folder, vocab_size=ours.spec.vocab_size)
    token_ids = torch.tensor(tokenizer.encode(TEXT))
    assert token_ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode(token_ids.tolist()) == TEXT
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
        kv = DenseKv(ours.groups, num_rows=1, max_tokens=2048)
        found = _logits(ours, kv, token_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    loss = float(functional.cross_entropy(found[:-1], token_ids[1:]))
    assert loss < 1.9  # nats per byte; a unigram model of this text has 3.3
    generated = theirs.generate(token_ids[None, :200], max_new_tokens=64, do_sample=False)
    with torch.no_grad():
        kv = DenseKv(ours.groups, num_rows=1, max_tokens=2048)
        tokens = [int(_logits(ours, kv, token_ids[:200])[-1].argmax())]
        while len(tokens) < 64 and tokens[-1] != END_OF_TEXT:
            tokens.append(int(_logits(ours, kv, torch.tensor(tokens[-1:]))[-1].argmax()))
    assert tokens == generated[0, 200:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_card_gives_what_was_measured(name: str) -> None:
    card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    measured = json.loads((SHIPPED / name / "evaluation.json").read_text(encoding="utf-8"))
    figures = measured["figures"]
    assert f"**{figures['loss']:.3f}**" in card
    assert len(figures["routers"]) == (4 if name == "tiny-moe" else 0)
    for router in figures["routers"]:
        assert router["reuse_share"] > 1.2 * router["chance_reuse_share"]
        assert router["hottest_quarter_share"] >= 0.25


def test_together_they_are_small() -> None:
    num_bytes = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert num_bytes <= 20e6
