"""`ganglion serve chat= --adapter`: the command and the real openai client; adapters are models of their own."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
import transformers

from ganglion.models.decoder_spec import read_decoder_spec
from tests.e2e.command import Running
from tests.language_folder import MAX_TOKENS, write_llama
from tests.lora_folder import merge, write_adapter

PROMPT = "def main():\n"
NAMES = {"tiny-llama": None, "poet": 5, "sql": 3}  # rank
NUM_NEW = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {"tiny-llama": write_llama(root / "tiny-llama")}
    spec = read_decoder_spec(json.loads((root / "tiny-llama" / "config.json").read_text()))
    for seed, (name, rank) in enumerate(NAMES.items()):
        if rank is not None:
            found[name] = write_adapter(
                root / name, spec, rank=rank, seed=seed, size=3.0, targets=("v_proj", "up_proj")
            )
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, str]:
    """What transformers says greedily, each adapter merged."""
    texts = {}
    for name, rank in NAMES.items():
        model = transformers.LlamaForCausalLM.from_pretrained(folders["tiny-llama"])
        if rank is not None:
            merge(model, folders[name])
        ids = list(PROMPT.encode())
        with torch.inference_mode():
            for _ in range(NUM_NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(PROMPT) :]
        texts[name] = bytes(token for token in new if token < 256).decode(errors="replace")
    assert len(set(texts.values())) == len(texts), "the adapters change nothing"
    return texts


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[openai.OpenAI]:
    line = ["serve", f"chat={folders['tiny-llama']}", "--port", "0"]
    for name in ("poet", "sql"):
        line += ["--adapter", f"{name}={folders[name]}"]
    line += ["--dtype", "float32", "--arena-bytes", "64 MiB"]
    with (
        Running(*line, until="Ctrl-C stops") as server,
        openai.OpenAI(
            base_url=server.find(r"OpenAI +(\S+)"), api_key="none", max_retries=0, timeout=60
        ) as it,
    ):
        yield it


def test_adapters_are_models(client: openai.OpenAI, expected: dict[str, str]) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert set(listed) == set(NAMES)
    assert listed["poet"]["parent"] == "tiny-llama"
    assert listed["tiny-llama"]["parent"] is None
    assert listed["poet"]["max_model_len"] == MAX_TOKENS
    assert listed["poet"]["version"] != listed["sql"]["version"]
    for _ in range(2):  # the second time from cached prefixes, which are each model's own
        streams = {
            name: client.completions.create(
                model=name,
                prompt=PROMPT,
                max_tokens=NUM_NEW,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for name in NAMES
        }
        said = {
            name: "".join(chunk.choices[0].text for chunk in stream)
            for name, stream in streams.items()
        }
        assert said == expected
    answer = client.chat.completions.create(
        model="poet", messages=[{"role": "user", "content": "x"}], max_tokens=2
    )
    assert answer.model == "poet"
    unnamed = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    body = client.post("/chat/completions", body=unnamed, cast_to=dict[str, object])
    assert body["model"] == "tiny-llama"
    with pytest.raises(openai.NotFoundError, match="sql"):
        client.completions.create(model="sq", prompt=PROMPT)
