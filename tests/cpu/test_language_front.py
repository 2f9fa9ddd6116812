"""LanguageFront over the real engine and a small decoder: text, stop strings, cancelling, limits, no page left behind."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ganglion.clock import SimulatedClock
from ganglion.config import ChatConfig, EngineConfig, MemoryConfig
from ganglion.engine.drafter import DraftCounts
from ganglion.engine.language_record import Progress
from ganglion.engine.language_requests import Ended
from ganglion.errors import CancelledError, ConfigError, FieldError, GanglionError, OverloadedError
from ganglion.generation import (
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Sampling,
    TextDelta,
    TokenDelta,
    Usage,
)
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.language import LanguageFront, LanguageMessage
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.service import Generated, Outcome
from ganglion.types import ActionChunk, LanguageStepRecord, RequestId
from tests.cpu.toy import Toy, observation
from tests.language_folder import continuation, write_llama

NAME = "tiny-llama"
MEMORY = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16)
TIMEOUT_S = 60.0


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

    def wait(self) -> Usage:
        assert self._end.wait(TIMEOUT_S), "no end"
        outcome = self.items[-1]
        if isinstance(outcome, GanglionError):
            raise outcome
        assert isinstance(outcome, Usage)
        return outcome

    def deltas(self, choice: int = 0) -> list[TextDelta]:
        return [d for d in self.items if isinstance(d, TextDelta) and d.choice == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(choice))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def served(folder: Path) -> ServedLanguage:
    model = load_language(folder, dtype=torch.float32, name=NAME, max_page_bytes=1 << 16)
    return ServedLanguage(model, ByteTokenizer())


@pytest.fixture
def service(served: ServedLanguage) -> Iterator[LocalService]:
    with LocalService(
        None,
        engine=EngineConfig(language_threads=1),
        memory=MEMORY,
        chat=ChatConfig(max_choices=8),
        languages=(served,),
    ) as service:
        yield service
        pool = service._ledger.stats()
        assert not any(pool.num_used_pages.values()), "pages are left behind"


def front_of(service: LocalService) -> LanguageFront:
    assert service.language is not None
    return service.language


def ask(prompt: str, *, n: int = 1, **sampling: object) -> GenerateRequest:
    values = {"temperature": 0.0, "max_tokens": 24, "is_eos_ignored": True, **sampling}
    return GenerateRequest(
        model=NAME,
        prompt=tuple(prompt.encode()),
        sampling=Sampling(**values),  # type: ignore[arg-type]
        num_choices=n,
    )


def test_text_is_what_transformers_continues_with(service: LocalService, folder: Path) -> None:
    heard = Heard()
    front_of(service).generate(ask("def f(x):\n", n=2), heard)
    usage = heard.wait()
    ids = continuation(folder, "def f(x):\n", 24)
    for choice in range(2):
        deltas = heard.deltas(choice)
        assert [t for delta in deltas for t in delta.token_ids] == ids
        assert heard.text(choice) == bytes(t for t in ids if t < 256).decode(errors="replace")
        assert [delta.finish for delta in deltas][-1] is FinishReason.LENGTH
        assert not any(delta.finish for delta in deltas[:-1])
    assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (10, 48)


def test_a_stop_string_ends_its_choice_only(service: LocalService) -> None:
    whole, cut = Heard(), Heard()
    front_of(service).generate(ask("abc", seed=5, temperature=1.0, n=3, logit_bias=LETTERS), whole)
    whole.wait()
    text = whole.text(1)
    stop = text[9:12]
    front_of(service).generate(
        ask("abc", seed=5, temperature=1.0, n=3, logit_bias=LETTERS, stop=(stop,)), cut
    )
    usage = cut.wait()
    for choice in range(3):
        full = whole.text(choice)
        assert cut.text(choice) == (full[: full.index(stop)] if stop in full else full)
    assert cut.deltas(1)[-1].finish is FinishReason.STOP
    assert cut.deltas(1)[-1].stop == stop
    num_tokens = sum(len(d.token_ids) for c in range(3) for d in cut.deltas(c))
    assert usage.num_completion_tokens == num_tokens


LETTERS = dict.fromkeys(b"abcdefgh", 50.0)


def test_a_grammar_holds_and_a_bad_one_is_refused_at_once(service: LocalService) -> None:
    heard = Heard()
    pattern = Grammar(kind=GrammarKind.REGEX, text="[0-9]{3}-(yes|no)")
    front_of(service).generate(
        ask("n", temperature=1.0, grammar=pattern, n=2, is_eos_ignored=False), heard
    )
    heard.wait()
    for choice in range(2):
        number, _, word = heard.text(choice).partition("-")
        assert number.isdigit()
        assert word in ("yes", "no")
    with pytest.raises(FieldError, match="regex"):
        front_of(service).generate(
            ask("n", grammar=Grammar(kind=GrammarKind.REGEX, text="(")), heard
        )


def test_cancelled_requests_end_once_and_give_their_pages_back(service: LocalService) -> None:
    front = front_of(service)
    heard = [Heard() for _ in range(4)]
    ids = [front.generate(ask(f"{i}" * 50, max_tokens=500), h) for i, h in enumerate(heard)]
    for request_id in ids:
        front.cancel(request_id)
        front.cancel(request_id)
    front.cancel(RequestId(999_999))
    for each in heard:
        with pytest.raises(CancelledError):
            each.wait()
    after = Heard()
    front.generate(ask("still here"), after)
    after.wait()


def test_more_than_may_wait_is_refused_and_counted_back(service: LocalService) -> None:
    front = front_of(service)
    heard = Heard()
    request_id = front.generate(ask("x", n=8, max_tokens=900), heard)
    with pytest.raises(OverloadedError, match="8"):
        front.generate(ask("y"), Heard())
    front.cancel(request_id)
    with pytest.raises(CancelledError):
        heard.wait()
    again = Heard()
    front.generate(ask("y", n=8), again)
    again.wait()


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (GenerateRequest(model="other", prompt=(1,), sampling=Sampling()), "tiny-llama"),
        (GenerateRequest(model=NAME, prompt=(), sampling=Sampling()), "at least one token"),
        (GenerateRequest(model=NAME, prompt=(1,) * 1024, sampling=Sampling()), "1024 tokens"),
        (GenerateRequest(model=NAME, prompt=(260,), sampling=Sampling()), "0..259"),
        (GenerateRequest(model=NAME, prompt=(1,), sampling=Sampling(top_p=2.0)), "top_p"),
    ],
)
def test_what_cannot_be_run_is_named(
    service: LocalService, request_: GenerateRequest, what: str
) -> None:
    with pytest.raises(FieldError, match=what):
        front_of(service).generate(request_, Heard())


def test_a_request_for_more_than_fits_gets_what_fits(service: LocalService) -> None:
    heard = Heard()
    front_of(service).generate(ask("x" * 1000, max_tokens=5000), heard)
    assert heard.wait().num_completion_tokens == 24
    assert heard.deltas()[-1].finish is FinishReason.LENGTH


def test_stopping_the_server_ends_what_is_open(served: ServedLanguage) -> None:
    heard = Heard()
    service = LocalService(None, engine=EngineConfig(), memory=MEMORY, languages=(served,))
    with service:
        assert service.stats().is_ready
        front_of(service).generate(ask("x", max_tokens=1000), heard)
    with pytest.raises(CancelledError, match="stopping"):
        heard.wait()
    with pytest.raises(CancelledError, match="stopping"):
        front_of(service).generate(ask("x"), Heard())


def test_two_models_of_one_name_are_refused(served: ServedLanguage) -> None:
    with pytest.raises(ConfigError, match="one name"):
        LocalService(None, engine=EngineConfig(), memory=MEMORY, languages=(served, served))


class Script:
    """An engine that says what a test wants."""

    def __init__(self) -> None:
        self.items: list[TokenDelta | Ended] = []
        self.records: list[LanguageStepRecord] = []
        self.num_preemptions = 0
        self.draft_counts = DraftCounts()
        self.stopped: list[tuple[RequestId, int]] = []

    def submit(self, request_id: RequestId, request: GenerateRequest, **more: object) -> None:
        pass

    def cancel(self, request_id: RequestId, reason: GanglionError | None = None) -> None:
        self.items.append(Ended(request_id=request_id, outcome=reason or CancelledError("gone")))

    def stop(self, request_id: RequestId, choice: int) -> None:
        self.stopped.append((request_id, choice))

    def step(self, budget_us: int) -> bool:
        return False

    def drain(self) -> list[TokenDelta | Ended]:
        items, self.items = self.items, []
        return items

    def preempt_latest(self) -> bool:
        return False

    def progress(self) -> dict[RequestId, Progress]:
        return {}


def test_several_tokens_at_once_are_cut_where_the_stop_string_ends(served: ServedLanguage) -> None:
    """Speculation hands several tokens over at once; a reader sees none after the stop string."""
    script, mail = Script(), list[LanguageMessage]()
    front = LanguageFront(script, {NAME: served}, SimulatedClock(), mail.append, max_choices=4)
    heard = Heard()
    request_id = front.generate(ask("x", stop=("END",), min_tokens=3), heard)
    front.handle(mail.pop())
    for text in ("END", "h\u00e9", "EN", "D after"):
        ids = tuple(text.encode())
        script.items.append(TokenDelta(request_id=request_id, choice=0, token_ids=ids))
        front.step(1)
    assert heard.text() == "ENDh\u00e9"  # the first came before `min_tokens`
    last = heard.deltas()[-1]
    assert (last.finish, last.stop, last.token_ids) == (FinishReason.STOP, "END", tuple(b"END"))
    assert script.stopped == [(request_id, 0)]
    made = Usage(num_prompt_tokens=1, num_cached_tokens=0, num_completion_tokens=15)
    script.items.append(Ended(request_id=request_id, outcome=made))
    front.step(1)
    assert heard.wait() == replace(made, num_completion_tokens=15 - len(" after"))
    assert not front.has_work


def test_robots_and_conversations_share_a_full_pool(served: ServedLanguage, folder: Path) -> None:
    """A pool that conversations fill: robots get their chunks, and the conversations are what they would have been."""
    memory = MemoryConfig(arena_bytes=7 << 16, large_page_bytes=1 << 16, defrag_step_bytes=0)
    prompts = [letter * 230 for letter in "abc"]
    heard = [Heard() for _ in prompts]
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    with LocalService(
        Toy(), engine=EngineConfig(language_threads=1), memory=memory, languages=(served,)
    ) as service:
        front, pause = front_of(service), threading.Event()
        for prompt, each in zip(prompts, heard, strict=True):
            front.generate(ask(prompt, max_tokens=60), each)
        while not heard[0].items:  # the first answers, the others want the rest of the pool
            pause.wait(0.001)
        for seq in range(1, 100):
            service.submit(observation("arm", seq), outcomes.put)
            outcome = outcomes.get(timeout=TIMEOUT_S)
            assert isinstance(outcome, ActionChunk), outcome
        for each in heard:
            each.wait()
    for prompt, each in zip(prompts, heard, strict=True):
        ids = [token for delta in each.deltas() for token in delta.token_ids]
        assert ids == continuation(folder, prompt, 60)
