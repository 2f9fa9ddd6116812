"""Speculation behind the service: texts, stop strings, grammars and usage are those without it, with the shipped pair."""

import queue
from importlib import resources
from pathlib import Path

import pytest
import torch

from ganglion.config import ChatConfig, EngineConfig, MemoryConfig
from ganglion.engine.drafter import Speculation
from ganglion.errors import ConfigError, GanglionError
from ganglion.generation import GenerateRequest, Grammar, GrammarKind, Sampling, TextDelta, Usage
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.drafting import read_speculation
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.service import Generated

MEMORY = MemoryConfig(arena_bytes=1 << 24, large_page_bytes=1 << 16)
CODE = "import os\n\ndef read(path):\n    return open(path)\n\ndef write(path):\n    return "
NUMBERS = Grammar(kind=GrammarKind.REGEX, text=r"(\[[0-9]{2}(, [0-9]{2}){3,5}\]\n){4}")


def load(name: str) -> ServedLanguage:
    folder = Path(str(resources.files("ganglion"))) / "assets" / "language" / name
    model = load_language(folder, dtype=torch.float32, name=name, max_page_bytes=1 << 16)
    return ServedLanguage(model, ByteTokenizer())


@pytest.fixture(scope="module")
def pair() -> tuple[ServedLanguage, ...]:
    torch.set_num_threads(1)
    return load("tiny-moe"), load("tiny-dense")


def request(**sampling: object) -> GenerateRequest:
    values = {"temperature": 0.0, "max_tokens": 60, "is_eos_ignored": True, **sampling}
    return GenerateRequest(
        model="tiny-moe",
        prompt=tuple(CODE.encode()),
        sampling=Sampling(**values),  # type: ignore[arg-type]
        num_choices=2,
    )


REQUESTS = {
    "greedy": request(),
    "sampled": request(temperature=0.8, seed=7, num_logprobs=1),
    "stop string": request(stop=("\n\n", "path)")),
    "grammar": request(grammar=NUMBERS, is_eos_ignored=False, temperature=0.7, seed=1),
}


def answers(pair: tuple[ServedLanguage, ...], chat: ChatConfig) -> tuple[dict[str, object], int]:
    """Text and usage of every request, and how many tokens were drafted."""
    told: dict[str, object] = {}
    with LocalService(
        None, engine=EngineConfig(language_threads=1), memory=MEMORY, chat=chat, languages=pair
    ) as service:
        assert service.language is not None
        for name, each in REQUESTS.items():
            heard: queue.SimpleQueue[Generated] = queue.SimpleQueue()
            service.language.generate(each, heard.put)
            texts, finishes = ["", ""], [None, None]
            while not isinstance(item := heard.get(timeout=60), Usage):
                assert not isinstance(item, GanglionError), item
                if isinstance(item, TextDelta):
                    texts[item.choice] += item.text
                    finishes[item.choice] = item.finish or finishes[item.choice]  # type: ignore[call-overload]
            told[name] = (texts, finishes, item)
        num_drafted = service.language._core.draft_counts.num_drafted
    return told, num_drafted


def test_answers_and_usage_are_those_without_drafts(
    pair: tuple[ServedLanguage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, num_drafted = answers(pair, ChatConfig())
    assert num_drafted == 0
    always = {"is_paced": False, "max_tokens": 5}
    for speculation in (
        Speculation(source="ngram", **always),  # type: ignore[arg-type]
        Speculation(source="tiny-dense", **always),  # type: ignore[arg-type]
        Speculation(source="tiny-dense", is_ahead=True, **always),  # type: ignore[arg-type]
    ):
        monkeypatch.setattr("ganglion.pipeline.local.read_speculation", lambda *_, s=speculation: s)
        told, num_drafted = answers(pair, ChatConfig())
        assert told == plain
        assert num_drafted > 50


def test_configured(pair: tuple[ServedLanguage, ...]) -> None:
    chat = ChatConfig(speculate="tiny-dense", speculate_tokens=3, speculate_ahead=True)
    told = Speculation(source="tiny-dense", max_tokens=3, is_ahead=True)
    assert read_speculation(chat, pair) == told
    assert read_speculation(ChatConfig(), pair[:1]) == Speculation()
    with pytest.raises(ConfigError, match="no served model 'gpt' among tiny-moe, tiny-dense"):
        read_speculation(ChatConfig(speculate="gpt"), pair)
    with pytest.raises(ConfigError, match=r"tiny-dense \(257 tokens\).*there is none"):
        read_speculation(chat, pair[1:])
