"""Bench layered in its quick form, and how it counts."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ganglion.bench import layered
from ganglion.bench.layered import CountedExperts, Tally
from ganglion.bench.shapes import TOY_MOE
from ganglion.models.decoder_load import random_language
from ganglion.models.moe import Moe


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_in_short() -> None:
    result = layered.run(quick=True, seed=0)
    # two chunks of a prompt each ask all experts of both layers, two groups of layers ask each once
    assert result.metrics["expert_bytes_ratio_alone"] == 0.5
    assert 0.5 < result.metrics["expert_bytes_ratio"] < 1
    assert result.metrics["tbt_p99_ratio"] > 0
    # a batch a chunk, a batch a group of layers: every decode makes one token in each
    gaps = result.detail["num_gaps"]
    assert gaps["chunked"] == gaps["layered"] == 2 * 2 * layered.NUM_DECODES


def test_an_expert_counts_once_in_a_batch() -> None:
    model = random_language(TOY_MOE, dtype=torch.bfloat16, name="m")
    assert isinstance(model, nn.Module)
    moe = next(part for part in model.modules() if isinstance(part, Moe))
    tally = Tally()
    counted = CountedExperts(moe.experts, moe.spec, tally, dtype="bfloat16")
    x, indices = torch.ones(3, 64, dtype=torch.bfloat16), torch.tensor([[0, 1], [1, 2], [0, 1]])
    weights = torch.full((3, 2), 0.5)
    out: Tensor = counted.experts(x, indices, weights, moe.spec.layer)
    assert torch.equal(out, moe.experts.experts(x, indices, weights, moe.spec.layer))
    assert tally.touched_bytes == 3 * (3 * 64 * 32) * 2  # experts 0 to 2: gate, up and down
