"""`ganglion serve chat=FOLDER` for families without a native decoder: a hybrid, and what the commands say of it."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
import transformers

from tests.e2e.command import Running, ganglion

PROMPT = "def main():\n    return 1\n" * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LFM2: short convolutions with states, and attention; ids are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-hybrid"
    config = transformers.Lfm2Config(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        layer_types=["conv", "full_attention", "conv"],
        eos_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = transformers.Lfm2ForCausalLM(config)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    line = ("serve", f"chat={folder}", "--port", "0", "--dtype", "float32")
    with Running(
        *line, "--arena-bytes", "64 MiB", until="Ctrl-C stops", timeout_s=150.0
    ) as running:
        yield running


def test_it_says_what_transformers_says(server: Running, folder: Path) -> None:
    module = transformers.Lfm2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(PROMPT.encode())
    for _ in range(24):
        with torch.inference_mode():
            ids.append(int(module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = bytes(t for t in ids[len(PROMPT) :] if t < 256).decode(errors="replace")
    with openai.OpenAI(
        base_url=server.find(r"OpenAI +(\S+)"), api_key="none", max_retries=0
    ) as client:
        for num_cached in (0, 192):  # the second time from a snapshot
            answer = client.completions.create(
                model="tiny-hybrid",
                prompt=PROMPT,
                max_tokens=24,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == expected
            usage = answer.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == num_cached


def test_plan_reads_its_headers(folder: Path) -> None:
    out = ganglion("plan", str(folder), timeout_s=150.0).stdout
    assert "tiny-hybrid" in out or "lfm2" in out
