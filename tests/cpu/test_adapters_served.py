"""Adapters behind the language service: named like models, for models in memory and models that come when asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from ganglion.cli.chat import load_languages
from ganglion.config import ChatConfig, EngineConfig, MemoryConfig
from ganglion.errors import FieldError, GanglionError
from ganglion.generation import GenerateRequest, Sampling, TextDelta
from ganglion.models.decoder_spec import read_decoder_spec
from ganglion.pipeline.language import LanguageFront
from ganglion.pipeline.local import LocalService
from tests.cpu.test_language_front import Heard
from tests.language_folder import write_llama
from tests.lora_folder import merge, write_adapter

PROMPT, NUM_NEW = "def main():\n", 16
LARGE_BYTES = 1 << 16
RANKS = {"tiny-llama": None, "poet": 5, "sql": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {"tiny-llama": write_llama(root / "tiny-llama"), "other": root / "other"}
    write_llama(found["other"], width=32, num_layers=1)
    spec = read_decoder_spec(json.loads((root / "tiny-llama" / "config.json").read_text()))
    for seed, (name, rank) in enumerate(RANKS.items()):
        if rank is not None:
            targets = ("v_proj", "up_proj")
            found[name] = write_adapter(
                root / name, spec, rank=rank, seed=seed, size=3.0, targets=targets
            )
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[int]]:
    """What transformers says greedily, each adapter merged."""
    found: dict[str, list[int]] = {}
    for name, rank in RANKS.items():
        model = transformers.LlamaForCausalLM.from_pretrained(folders["tiny-llama"])
        if rank is not None:
            merge(model, folders[name])
        ids = list(PROMPT.encode())
        with torch.inference_mode():
            for _ in range(NUM_NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found[name] = ids[len(PROMPT) :]
    assert len({tuple(ids) for ids in found.values()}) == len(found), "adapters change nothing"
    return found


def chat_of(
    folders: dict[str, Path], *adapters: str, stay: str = "", others: str = ""
) -> ChatConfig:
    models = [f"{folders['tiny-llama']}{stay}"]
    models += [f"{folders[others]},on_demand"] if others else []
    return ChatConfig(models=tuple(models), adapters=adapters)


@pytest.fixture(params=["", ",on_demand"])
def front(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[LanguageFront]:
    adapters = [f"{name}={folders[name]}" for name in ("poet", "sql")]
    chat = chat_of(folders, *adapters, stay=request.param)
    languages = load_languages(
        chat, dtype="float32", max_page_bytes=LARGE_BYTES, on_stage=lambda text: None
    )
    memory = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=LARGE_BYTES)
    engine = EngineConfig(language_threads=1)
    with LocalService(
        None, engine=engine, memory=memory, chat=chat, languages=languages
    ) as service:
        assert service.language is not None
        yield service.language
        used = service._ledger.stats().num_used_pages
        assert not any(used.values()), used
        service._ledger.check_integrity()


def test_requests_name_adapters_like_models(
    front: LanguageFront, expected: dict[str, list[int]]
) -> None:
    specs = {spec.name: spec for spec in front.language_models()}
    assert list(specs) == ["tiny-llama", "poet", "sql"]
    assert [spec.parent for spec in specs.values()] == ["", "tiny-llama", "tiny-llama"]
    assert len({spec.version for spec in specs.values()}) == 3
    sampling = Sampling(temperature=0.0, max_tokens=NUM_NEW, is_eos_ignored=True)
    for _ in range(2):
        heard = {name: Heard() for name in specs}
        for name, each in heard.items():
            prompt = front.tokenizer(name).encode(PROMPT)
            front.generate(GenerateRequest(model=name, prompt=prompt, sampling=sampling), each)
        for name, each in heard.items():
            each.wait()
            deltas = [item for item in each.items if isinstance(item, TextDelta)]
            assert [token for delta in deltas for token in delta.token_ids] == expected[name], name
            assert front.residence(name).stay == front.residence("tiny-llama").stay
    with pytest.raises(FieldError, match="one of tiny-llama, poet, sql"):
        front.generate(GenerateRequest(model="sq", prompt=(1,), sampling=sampling), Heard())


@pytest.mark.parametrize(
    ("adapters", "others", "problem"),
    [
        (("poet",), "", "expected NAME=FOLDER"),
        (("=.",), "", "expected NAME=FOLDER"),
        (("a b=.",), "", "expected NAME=FOLDER"),
        (("poet=nowhere",), "", "no folder 'nowhere'"),
        (("poet=.", "poet=."), "", "the name 'poet' is taken"),
        (("tiny-llama=.",), "", "the name 'tiny-llama' is taken"),
        (("poet@elsewhere=.",), "", "Language models here: tiny-llama"),
        (("poet=.",), "other", "Language models here: tiny-llama, other"),
        (("poet=.",), "", "not readable JSON"),
        (("poet@other={poet}",), "other", "does not fit a llama of 1 layers"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_weight_is_read(
    adapters: tuple[str, ...], others: str, problem: str, folders: dict[str, Path]
) -> None:
    texts = [text.replace("{poet}", str(folders["poet"])) for text in adapters]
    chat = chat_of(folders, *texts, stay=",on_demand", others=others)
    with pytest.raises(GanglionError) as caught:
        load_languages(
            chat, dtype="float32", max_page_bytes=LARGE_BYTES, on_stage=lambda text: None
        )
    assert problem in str(caught.value), caught.value
