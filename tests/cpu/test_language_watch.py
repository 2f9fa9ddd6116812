"""What operators learn of requests for tokens: metrics after real requests, the picture, the trace; pages that move."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ganglion.config import ChatConfig, EngineConfig, MemoryConfig
from ganglion.errors import CancelledError, FieldError
from ganglion.generation import GenerateRequest, Sampling, TextDelta, Usage
from ganglion.memory.orders import Moves
from ganglion.metrics import Metrics
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.language import LanguageFront
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.residency import Stay
from ganglion.pipeline.served import InMemory, ServedLanguage
from ganglion.service import Generated, ModelState, Outcome
from ganglion.types import ActionChunk, LanguageStats, PromptPhase
from tests.cpu.toy import Toy, observation
from tests.language_folder import write_llama

NAME = "tiny-llama"
MEMORY = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16)
TIMEOUT_S = 60.0


class Ear:
    """Waits for the end of one request."""

    def __init__(self) -> None:
        self.num_deltas = 0
        self.began, self.ended = threading.Event(), threading.Event()
        self.outcome: Generated | None = None

    def __call__(self, item: Generated) -> None:
        if isinstance(item, TextDelta):
            self.num_deltas += 1
            self.began.set()
        elif isinstance(item, Usage | Exception):
            self.outcome = item
            self.ended.set()

    def wait(self) -> Generated:
        assert self.ended.wait(TIMEOUT_S)
        assert self.outcome is not None
        return self.outcome


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedLanguage:
    folder: Path = write_llama(tmp_path_factory.mktemp("models") / NAME)
    model = load_language(folder, dtype=torch.float32, name=NAME, max_page_bytes=1 << 16)
    return ServedLanguage(model, ByteTokenizer())


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def service(served: ServedLanguage, metrics: Metrics) -> Iterator[LocalService]:
    with LocalService(
        None,
        engine=EngineConfig(language_threads=1),
        memory=MEMORY,
        chat=ChatConfig(max_choices=8),
        languages=(served,),
        metrics=metrics,
    ) as service:
        yield service


def front_of(service: LocalService) -> LanguageFront:
    assert service.language is not None
    return service.language


def ask(prompt: str, *, n: int = 1, max_tokens: int = 8, trace_id: str = "") -> GenerateRequest:
    return GenerateRequest(
        model=NAME,
        prompt=tuple(prompt.encode()),
        sampling=Sampling(temperature=0.0, max_tokens=max_tokens, is_eos_ignored=True),
        num_choices=n,
        trace_id=trace_id,
    )


def run(service: LocalService, request: GenerateRequest) -> Generated:
    ear = Ear()
    front_of(service).generate(request, ear)
    return ear.wait()


def numbers(metrics: Metrics, service: LocalService) -> dict[str, float]:
    """Series -> value, as somebody who scrapes sees them."""
    metrics.observe_stats(fresh(service))
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def fresh(service: LocalService):  # type: ignore[no-untyped-def]
    """Statistics made after this call."""
    pause, before = threading.Event(), service.stats()
    for _ in range(400):
        stats = service.stats()
        if stats is not before:
            return stats
        pause.wait(0.01)
    raise AssertionError("no new picture")


def language_of(service: LocalService) -> LanguageStats:
    language = fresh(service).language
    assert isinstance(language, LanguageStats)
    return language


def test_metrics_after_real_requests(service: LocalService, metrics: Metrics) -> None:
    model = f'{{model="{NAME}"}}'
    run(service, ask("x" * 100))
    run(service, ask("x" * 100, n=2))
    with pytest.raises(FieldError):
        front_of(service).generate(ask("x" * 5000), Ear())
    got = numbers(metrics, service)
    requests = "ganglion_language_requests_total"
    assert got[f'{requests}{{model="{NAME}",outcome="length"}}'] == 2
    assert got[f'{requests}{{model="{NAME}",outcome="invalid_field"}}'] == 1
    assert got[f"ganglion_language_prompt_tokens_total{model}"] == 200
    assert 80 <= got[f"ganglion_language_cached_tokens_total{model}"] < 100
    assert got[f"ganglion_language_new_tokens_total{model}"] == 8 + 2 * 8
    for name, count in (("first_token", 2), ("queue", 2), ("request", 2), ("between_tokens", 7)):
        assert got[f"ganglion_language_{name}_seconds_count{model}"] == count
    first, whole = "first_token", "request"
    assert (
        0
        < got[f"ganglion_language_{first}_seconds_sum{model}"]
        < got[f"ganglion_language_{whole}_seconds_sum{model}"]
    )
    assert got['ganglion_language_turn_seconds_count{kind="alone"}'] > 0
    assert got[f"ganglion_language_step_seconds_count{model}"] >= 2 * 8
    assert got['ganglion_lane_seconds_total{lane="0",who="planners"}'] > 0
    assert got['ganglion_pool_kind_bytes{kind="kv",state="cached",who="planners"}'] > 0
    assert got["ganglion_language_running_rows"] == 0
    assert got["ganglion_language_preemptions_total"] == 0


def test_the_picture_shows_a_request_under_way(service: LocalService) -> None:
    ear = Ear()
    request_id = front_of(service).generate(ask("y" * 300, max_tokens=600), ear)
    assert ear.began.wait(TIMEOUT_S)
    language = language_of(service)
    (request,) = language.requests
    assert (request.request_id, request.model) == (request_id, NAME)
    assert request.phase is PromptPhase.DECODE
    assert request.num_computed_tokens == request.num_prompt_tokens == 300
    assert 0 < request.num_new_tokens < request.max_new_tokens == 600
    assert request.tokens_per_s > 0
    assert request.num_pages > 0
    assert (language.num_running, language.num_waiting) == (1, 0)
    assert language.first_token_p50_ms is not None
    assert sum(step.num_prefill_tokens for step in language.steps) >= 300
    assert language.steps[-1].num_decode_tokens == 1
    assert set(language.layouts.values()) == {NAME}
    front_of(service).cancel(request_id)
    assert isinstance(ear.wait(), CancelledError)
    after = language_of(service)
    assert (after.requests, after.num_cancelled, after.num_results) == ((), 1, 0)


def test_a_trace_says_where_the_time_went(
    service: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ganglion.trace"):
        run(service, ask("z" * 64, trace_id="chatcmpl-1"))
        run(service, ask("z" * 64))
        ear = Ear()
        request_id = front_of(service).generate(ask("secret" * 20, max_tokens=800), ear)
        assert ear.began.wait(TIMEOUT_S)
        front_of(service).cancel(request_id)
        ear.wait()
    cold, warm, cancelled = (json.loads(record.message) for record in caplog.records)
    assert (cold["id"], cold["outcome"], cold["error"]) == ("chatcmpl-1", "length", None)
    assert (cold["num_prompt_tokens"], cold["num_cached_tokens"], cold["num_new_tokens"]) == (
        64,
        0,
        8,
    )
    assert warm["num_cached_tokens"] >= 48
    parts = sum(cold[f"{part}_ms"] for part in ("queue", "prefill", "decode"))
    assert 0 < parts <= cold["total_ms"] + 0.01
    assert min(cold[f"{part}_ms"] for part in ("queue", "prefill", "decode")) >= 0
    assert (cancelled["outcome"], cancelled["request"]) == ("cancelled", request_id)
    assert 0 < cancelled["num_new_tokens"] < 800
    assert "secret" not in caplog.text


def test_robots_and_planners_are_told_apart(served: ServedLanguage, metrics: Metrics) -> None:
    with LocalService(
        Toy(),
        engine=EngineConfig(language_threads=1),
        memory=MEMORY,
        languages=(served,),
        metrics=metrics,
    ) as service:
        ear, done = Ear(), threading.Event()
        outcomes: list[Outcome] = []

        def on_done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            done.set()

        front_of(service).generate(ask("w" * 200, max_tokens=200), ear)
        for seq in range(1, 20):
            done.clear()
            service.submit(observation("arm", seq), on_done)
            assert done.wait(TIMEOUT_S)
        ear.wait()
        got = numbers(metrics, service)
    assert all(isinstance(outcome, ActionChunk) for outcome in outcomes)
    for who in ("robots", "planners"):
        assert got[f'ganglion_lane_seconds_total{{lane="0",who="{who}"}}'] > 0
    kinds = [name for name in got if name.startswith("ganglion_pool_kind_bytes")]
    assert any('who="robots"' in name for name in kinds)
    assert any('who="planners"' in name for name in kinds)
    turns = {
        kind: got.get(f'ganglion_language_turn_seconds_count{{kind="{kind}"}}', 0.0)
        for kind in ("alone", "idle", "slack", "late")
    }
    assert sum(turns.values()) > 0
    assert got["ganglion_language_slack_used_ratio_count"] == turns["slack"]


def test_models_that_come_and_go_are_counted(served: ServedLanguage, metrics: Metrics) -> None:
    fleeting = ServedLanguage(
        InMemory(model=served.source.load()),
        served.tokenizer,
        stay=Stay(is_pinned=False, ttl_s=0.05),
    )
    with LocalService(
        None,
        engine=EngineConfig(language_threads=1),
        memory=MEMORY,
        languages=(fleeting,),
        metrics=metrics,
    ) as service:
        assert isinstance(run(service, ask("abc")), Usage)
        pause = threading.Event()
        for _ in range(400):
            if front_of(service).residence(NAME).state is ModelState.UNLOADED:
                break
            pause.wait(0.01)
        got = numbers(metrics, service)
    assert got[f'ganglion_model_loads_total{{model="{NAME}",outcome="loaded"}}'] == 1
    assert got[f'ganglion_model_load_seconds_count{{model="{NAME}"}}'] == 1
    assert got[f'ganglion_model_unloads_total{{model="{NAME}",reason="idle"}}'] == 1


class Holder:
    """Somebody with one page in every large page."""

    def __init__(self, service: LocalService, layout: str) -> None:
        ledger = service._ledger
        self.layout, self.pages = layout, list(ledger.reserve(layout, 40, owner="holder"))
        ledger.release(layout, [page for page in self.pages if page % 5])
        self.pages = [page for page in self.pages if not page % 5]
        ledger.attach(self)

    def relocate(self, moves: Moves) -> None:
        if moves.concern(self.layout, self.pages):
            self.pages = list(moves.now_at(self.layout, self.pages))


def test_a_server_without_a_policy_defragments(served: ServedLanguage) -> None:
    """One page held in every large page: they come together while a request runs, with their bytes."""
    memory = MemoryConfig(arena_bytes=8 << 16, large_page_bytes=1 << 16)
    service = LocalService(
        None, engine=EngineConfig(language_threads=1), memory=memory, languages=(served,)
    )
    (layout,) = service._ledger.stats().pages_per_large
    holder = Holder(service, layout)
    bytes_of = lambda page: service._arena.pages(layout)[page // 5, page % 5]  # noqa: E731
    for at, page in enumerate(holder.pages):
        bytes_of(page).fill_(at + 1)
    assert service._ledger.stats().num_free_large_pages == 0
    with service:
        run(service, ask("abc", max_tokens=30))
        assert service._ledger.stats().num_free_large_pages >= 1
        assert len({page // 5 for page in holder.pages}) < 8
        for at, page in enumerate(holder.pages):
            assert bool((bytes_of(page) == at + 1).all())
        service._ledger.check_integrity()
