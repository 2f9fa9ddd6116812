"""Models that come and go in one service: loaded when asked for, swapped by value, beside robots that notice nothing."""

import gc
import itertools
import queue
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ganglion.cli.chat import FolderSource
from ganglion.config import ChatConfig, EngineConfig, MemoryConfig
from ganglion.errors import CancelledError, ConfigError, GanglionError, ModelUnavailableError
from ganglion.generation import GenerateRequest, LanguageSpec, Sampling, TextDelta, Usage
from ganglion.layout import PageLayout
from ganglion.models.language import KvGroup, LanguageModel, StateGroup
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.residency import Stay
from ganglion.pipeline.served import ServedLanguage
from ganglion.service import Generated, ModelState, Outcome
from ganglion.types import ActionChunk, RequestId
from tests.cpu.toy import Toy, observation
from tests.language_folder import continuation, write_llama

TIMEOUT_S = 60.0
PAGE = 1 << 16
ARENA = 64 * PAGE
ON_DEMAND = Stay(is_pinned=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_llama(root / name) for name in "abc"}


class Gated:
    """A source that can be held up, and tells what became of its models."""

    def __init__(self, folder: Path) -> None:
        self._inner = FolderSource.read(folder, dtype="float32", max_page_bytes=PAGE)
        self.is_open = threading.Event()
        self.is_open.set()
        self.begun = threading.Event()
        self.models: list[weakref.ref[LanguageModel]] = []

    @property
    def spec(self) -> LanguageSpec:
        return self._inner.spec

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        return self._inner.groups

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        return self._inner.layouts

    @property
    def weight_bytes(self) -> int:
        return self._inner.weight_bytes

    def load(self) -> LanguageModel:
        self.begun.set()
        assert self.is_open.wait(TIMEOUT_S), "nobody opened"
        model = self._inner.load()
        self.models.append(weakref.ref(model))
        return model


class Heard:
    """What one request was told."""

    def __init__(self) -> None:
        self.items: list[Generated] = []
        self._end = threading.Event()

    def __call__(self, item: Generated) -> None:
        assert not self._end.is_set(), f"after the end: {item}"
        self.items.append(item)
        if isinstance(item, Usage | GanglionError):
            self._end.set()

    def ids(self) -> list[int]:
        assert self._end.wait(TIMEOUT_S), "no end"
        if isinstance(self.items[-1], GanglionError):
            raise self.items[-1]
        return [t for item in self.items if isinstance(item, TextDelta) for t in item.token_ids]


@contextmanager
def serving(
    sources: dict[str, Gated],
    *,
    num_models: int,
    stays: dict[str, Stay] | None = None,
    load_wait_s: float = TIMEOUT_S,
    policy: Toy | None = None,
    max_choices: int = 16,
    deadline_ms: float = 250.0,
) -> Iterator[LocalService]:
    """A service whose budget holds so many of the models beside a quarter of the arena."""
    weight_bytes = max(source.weight_bytes for source in sources.values())
    with LocalService(
        policy,
        engine=EngineConfig(language_threads=1, deadline_ms=deadline_ms),
        memory=MemoryConfig(
            arena_bytes=ARENA,
            large_page_bytes=PAGE,
            budget_bytes=num_models * weight_bytes + ARENA // 4,
        ),
        chat=ChatConfig(max_choices=max_choices, load_wait_s=load_wait_s),
        languages=[
            ServedLanguage(source, ByteTokenizer(), stay=(stays or {}).get(name, ON_DEMAND))
            for name, source in sources.items()
        ],
    ) as service:
        yield service
        service._ledger.check_integrity()
        used = service._ledger.stats().num_used_pages  # a robot's session keeps its own
        assert not any(used[f"{name}.kv"] for name in sources), "pages are left behind"


def ask(
    service: LocalService, model: str, prompt: str = "def f(x):\n", num_tokens: int = 16
) -> Heard:
    return ask_id(service, model, prompt, num_tokens)[1]


def ask_id(
    service: LocalService, model: str, prompt: str = "def f(x):\n", num_tokens: int = 16
) -> tuple[RequestId, Heard]:
    assert service.language is not None
    heard = Heard()
    request = GenerateRequest(
        model=model,
        prompt=tuple(prompt.encode()),
        sampling=Sampling(temperature=0.0, max_tokens=num_tokens, is_eos_ignored=True),
    )
    return service.language.generate(request, heard), heard


def state(service: LocalService, model: str) -> ModelState:
    assert service.language is not None
    return service.language.residence(model).state


def gated(folders: dict[str, Path], names: str = "abc") -> dict[str, Gated]:
    return {name: Gated(folders[name]) for name in names}


def num_alive(sources: dict[str, Gated]) -> int:
    gc.collect()
    return sum(ref() is not None for source in sources.values() for ref in source.models)


def test_models_are_loaded_when_asked_for_and_swapped_by_value(folders: dict[str, Path]) -> None:
    sources = gated(folders)
    expected = continuation(folders["a"], "def f(x):\n", 16)
    with serving(sources, num_models=2) as service:
        assert [state(service, name) for name in "abc"] == [ModelState.UNLOADED] * 3
        heard = [ask(service, "a") for _ in range(3)]
        assert [each.ids() for each in heard] == [expected] * 3
        assert len(sources["a"].models) == 1
        assert ask(service, "b").ids() == expected  # the same weights under another name
        assert [state(service, name) for name in "abc"] == ["loaded", "loaded", "unloaded"]
        num_pages = service._ledger.num_large_pages
        assert num_pages == ARENA // 4 // PAGE
        assert ask(service, "c").ids() == expected
        assert [state(service, name) for name in "abc"] == ["loaded", "unloaded", "loaded"]
        assert ask(service, "b").ids() == expected
        assert [state(service, name) for name in "abc"] == ["loaded", "loaded", "unloaded"]
        assert len(sources["b"].models) == 2
    assert num_alive(sources) == 2
    del service
    assert num_alive(sources) == 0


def test_a_model_goes_when_its_time_is_over_and_pages_get_its_bytes(
    folders: dict[str, Path],
) -> None:
    sources = gated(folders, "ab")
    stay = Stay(is_pinned=False, ttl_s=0.2)
    with serving(sources, num_models=1, stays={"a": stay}) as service:
        ask(service, "a", num_tokens=4).ids()
        small = service._ledger.num_large_pages
        pause = threading.Event()
        for _ in range(200):
            if state(service, "a") is ModelState.UNLOADED:
                break
            pause.wait(0.02)
        assert state(service, "a") is ModelState.UNLOADED
        assert service._ledger.num_large_pages > small
        ask(service, "a", num_tokens=4).ids()
        assert len(sources["a"].models) == 2


def test_requests_wait_for_room_and_are_refused_after_a_while(folders: dict[str, Path]) -> None:
    sources = gated(folders, "ab")
    with serving(sources, num_models=1, load_wait_s=0.3) as service:
        request_id, busy = ask_id(service, "a", num_tokens=1000)
        while not busy.items:
            threading.Event().wait(0.01)
        with pytest.raises(ModelUnavailableError, match="no room for the model 'b'") as caught:
            ask(service, "b").ids()
        assert caught.value.retry_after_s > 0
        assert service.language is not None
        service.language.cancel(request_id)
        with pytest.raises(CancelledError):
            busy.ids()
        assert len(ask(service, "b").ids()) == 16  # the other one is idle now
    with serving(sources, num_models=1) as service:
        busy = ask(service, "a", num_tokens=200)
        while not busy.items:
            threading.Event().wait(0.01)
        assert len(ask(service, "b").ids()) == 16  # waits for it
        assert len(busy.ids()) == 200


def test_whoever_leaves_while_it_waits_is_let_go(folders: dict[str, Path]) -> None:
    sources = gated(folders, "ab")
    sources["a"].is_open.clear()
    with serving(sources, num_models=1, max_choices=2) as service:
        assert service.language is not None
        request_id, first = ask_id(service, "a")
        _, second = ask_id(service, "b")
        assert sources["a"].begun.wait(TIMEOUT_S)
        service.language.cancel(request_id)
        with pytest.raises(CancelledError):
            first.ids()
        sources["a"].is_open.set()
        assert len(second.ids()) == 16
        assert len(ask(service, "a").ids()) == 16


def test_a_server_that_stops_ends_those_who_wait(folders: dict[str, Path]) -> None:
    sources = gated(folders, "ab")
    sources["a"].is_open.clear()
    with serving(sources, num_models=1) as service:
        waiting = [ask(service, name) for name in "ab"]
        assert sources["a"].begun.wait(TIMEOUT_S)
        threading.Timer(0.1, sources["a"].is_open.set).start()
    for each in waiting:
        with pytest.raises(CancelledError, match="stopping"):
            each.ids()


def test_a_folder_that_broke_meanwhile_fails_its_requests_only(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["a"], broken)
    sources = {"broken": Gated(broken), "b": Gated(folders["b"])}
    with serving(sources, num_models=2) as service:
        (broken / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(ModelUnavailableError, match="'broken' cannot be loaded"):
            ask(service, "broken").ids()
        assert state(service, "broken") is ModelState.UNLOADED
        assert len(ask(service, "b").ids()) == 16
        shutil.copytree(folders["a"], broken, dirs_exist_ok=True)
        assert len(ask(service, "broken").ids()) == 16


def test_what_can_never_fit_is_refused_at_the_start(folders: dict[str, Path]) -> None:
    with (
        pytest.raises(ConfigError, match=r"memory\.budget_bytes"),
        serving(gated(folders, "ab"), num_models=0),
    ):
        pass


def test_robots_miss_nothing_while_models_are_loaded(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("large")
    sources = {name: Gated(write_llama(root / name, width=256, num_layers=12)) for name in "ab"}
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    seqs = itertools.count(1)

    def drive(service: LocalService) -> None:
        service.submit(observation("arm", next(seqs)), outcomes.put)
        outcome = outcomes.get(timeout=TIMEOUT_S)
        assert isinstance(outcome, ActionChunk), outcome
        assert outcome.is_deadline_met

    # so long, since the machine may be busy with other things: a load that robots wait for takes longer
    with serving(sources, num_models=1, policy=Toy(), deadline_ms=1000.0) as service:
        sources["a"].is_open.clear()
        heard = ask(service, "a", num_tokens=2)
        assert sources["a"].begun.wait(TIMEOUT_S)
        for _ in range(50):
            drive(service)
        assert state(service, "a") is ModelState.LOADING
        sources["a"].is_open.set()
        for name in "baba":
            while not heard.items or not isinstance(heard.items[-1], Usage):
                drive(service)
            heard = ask(service, name, num_tokens=2)
        heard.ids()
        assert [len(source.models) for source in sources.values()] == [3, 2]
