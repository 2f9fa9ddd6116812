"""Vectors of prompts: what transformers' hidden states say, however the prompt is cut and whatever is in pages."""

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ganglion.config import ChatConfig, EngineConfig, MemoryConfig
from ganglion.engine.pooling import Pool
from ganglion.errors import FieldError, GanglionError, UnsupportedFieldError
from ganglion.generation import (
    Embedded,
    GenerateRequest,
    Pooling,
    Sampling,
    TextDelta,
    Usage,
)
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.service import Generated
from ganglion.types import Float32Array
from tests.cpu.language_toy import ToyDecoder
from tests.language_folder import MAX_TOKENS, write_llama

NAME = "tiny-llama"
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def reference(folder: Path) -> transformers.LlamaModel:
    return transformers.LlamaModel.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def service(folder: Path) -> Iterator[LocalService]:
    model = load_language(folder, dtype=torch.float32, name=NAME, max_page_bytes=1 << 16)
    with LocalService(
        None,
        engine=EngineConfig(language_threads=1, step_budget_us=500),  # prompts are cut
        memory=MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16),
        chat=ChatConfig(max_choices=32),
        languages=(ServedLanguage(model, ByteTokenizer()),),
    ) as service:
        yield service
        assert not any(service._ledger.stats().num_used_pages.values()), "pages are left behind"


def random_prompt(num_tokens: int) -> tuple[int, ...]:
    return tuple(RNG.integers(0, 256, num_tokens).tolist())


def ask(prompt: tuple[int, ...], pooling: Pooling | None) -> GenerateRequest:
    sampling = Sampling(temperature=0.0, max_tokens=8, is_eos_ignored=True)
    return GenerateRequest(model=NAME, prompt=prompt, sampling=sampling, pooling=pooling)


def run(service: LocalService, requests: list[GenerateRequest]) -> list[list[Generated]]:
    """What each of them was told, all under way together."""
    assert service.language is not None
    heard: list[list[Generated]] = [[] for _ in requests]
    ends: queue.SimpleQueue[None] = queue.SimpleQueue()

    def listen(at: int, item: Generated) -> None:
        heard[at].append(item)
        if isinstance(item, Usage | GanglionError):
            ends.put(None)

    for at, request in enumerate(requests):
        service.language.generate(request, lambda item, at=at: listen(at, item))  # type: ignore[misc]
    for _ in requests:
        ends.get(timeout=60)
    return heard


def expected(
    reference: transformers.LlamaModel, prompt: tuple[int, ...], pooling: Pooling
) -> Float32Array:
    with torch.inference_mode():
        hidden = reference(torch.tensor([prompt])).last_hidden_state[0]
    vector: Float32Array = (hidden.mean(0) if pooling is Pooling.MEAN else hidden[-1]).numpy()
    return vector


def test_vectors_are_those_of_transformers(
    service: LocalService, reference: transformers.LlamaModel
) -> None:
    lengths = (1, 2, 15, 16, 17, 100, 333, MAX_TOKENS)
    prompts = [random_prompt(length) for length in lengths]
    cases = [(prompt, pooling) for prompt in prompts for pooling in Pooling]
    plain = [ask(prompt, None) for prompt in prompts[:4]]  # others generate meanwhile
    heard = run(service, [*(ask(*case) for case in cases), *plain])
    for (prompt, pooling), items in zip(cases, heard, strict=False):
        embedded, usage = items
        assert isinstance(embedded, Embedded)
        assert isinstance(usage, Usage)
        assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (len(prompt), 0)
        wanted = expected(reference, prompt, pooling)
        np.testing.assert_allclose(embedded.vector, wanted, rtol=1e-4, atol=1e-4)
    for items in heard[len(cases) :]:
        assert sum(len(i.token_ids) for i in items if isinstance(i, TextDelta)) == 8


def test_a_prefix_in_pages_changes_no_vector(
    service: LocalService, reference: transformers.LlamaModel
) -> None:
    prompt = random_prompt(200)
    for pooling in Pooling:
        for turn in range(2):
            ((embedded, usage),) = run(service, [ask(prompt, pooling)])
            assert isinstance(embedded, Embedded)
            assert isinstance(usage, Usage)
            wanted = expected(reference, prompt, pooling)
            np.testing.assert_allclose(embedded.vector, wanted, rtol=1e-4, atol=1e-4)
            is_warm = pooling is Pooling.LAST and turn > 0
            assert usage.num_cached_tokens >= 150 if is_warm else True
            if pooling is Pooling.MEAN:
                assert usage.num_cached_tokens == 0


def test_a_vector_that_cannot_be_is_refused(service: LocalService) -> None:
    assert service.language is not None
    with pytest.raises(FieldError, match=str(MAX_TOKENS)):
        service.language.generate(ask((1,) * (MAX_TOKENS + 1), Pooling.LAST), lambda item: None)


def test_a_model_that_keeps_its_hidden_states_says_so() -> None:
    with pytest.raises(UnsupportedFieldError, match="gives no hidden states away"):
        Pool(ToyDecoder(), Pooling.MEAN)
