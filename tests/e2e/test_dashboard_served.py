"""The whole way: a browser's chat through edge, service and engine to a tiny decoder, alone and beside a robot."""

import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("playwright", reason="playwright is not installed: pip install ganglion[dev]")

from playwright.sync_api import Browser, expect

from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, ServeConfig
from ganglion.metrics import Metrics
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.serve.app import ServerThread
from tests.cpu.toy import Toy, observation
from tests.e2e.dashboard_camera import CHROMIUM, WHY_ABSENT, chromium
from tests.e2e.dashboard_visit import Visit
from tests.language_folder import write_llama

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=WHY_ABSENT)
NAME = "tiny-llama"
PERIOD_S = 0.05


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedLanguage:
    folder = write_llama(tmp_path_factory.mktemp("models") / NAME)
    model = load_language(folder, dtype=torch.float32, name=NAME, max_page_bytes=1 << 16)
    return ServedLanguage(model, ByteTokenizer())


@contextmanager
def serving(served: ServedLanguage, *, has_robots: bool) -> Iterator[ServerThread]:
    """A server of the decoder; with robots: beside the toy policy, whose one robot asks all the time."""
    clock, metrics, is_over = RealClock(), Metrics(), threading.Event()
    with (
        LocalService(
            Toy() if has_robots else None,
            engine=EngineConfig(language_threads=1),
            memory=MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16),
            languages=(served,),
            metrics=metrics,
        ) as service,
        ServerThread(
            service,
            config=ServeConfig(port=0),
            clock=clock,
            metrics=metrics,
            language=service.language,
            is_language_only=not has_robots,
        ) as server,
    ):

        def move() -> None:
            seq = 0
            while not is_over.wait(PERIOD_S):
                seq += 1
                service.submit(observation("arm", seq), lambda outcome: None)

        robot = threading.Thread(target=move, daemon=True)
        if has_robots:
            robot.start()
        try:
            yield server
        finally:
            is_over.set()
            if has_robots:
                robot.join()


def numbers(server: ServerThread) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@needs_chromium
@pytest.mark.parametrize("has_robots", [False, True])
def test_a_chat_is_streamed_shown_and_counted(
    browser: Browser, served: ServedLanguage, *, has_robots: bool
) -> None:
    with serving(served, has_robots=has_robots) as server:
        visit = Visit(browser, f"{server.url}/")
        page = visit.page
        expect(page.locator("#link")).to_have_text("serving")
        expect(page.locator(".model")).to_have_text([NAME])
        expect(page.locator("#no-arms")).to_be_hidden()
        if has_robots:
            expect(page.locator(".arm")).to_have_count(1)
        chat = page.locator("#chat")
        chat.get_by_label("Message").fill("hello")
        chat.get_by_label("Message").press("Enter")
        expect(page.locator(".request")).to_have_count(1, timeout=15_000)
        note = chat.locator(".chat-note")
        expect(note).to_contain_text(re.compile(r"\d+ in .* \d+ out"), timeout=30_000)
        expect(page.locator("#planners [data-part=facts]")).to_contain_text("done1")
        expect(page.locator("#timeline-legend")).to_contain_text("planners: answers")
        expect(page.locator("#pool-legend")).to_contain_text(f"{NAME}.kv")
        num_out = int(re.findall(r"(\d+) out", note.inner_text())[0])
        assert visit.complaints == []
        page.close()
        got = numbers(server)
    model = f'{{model="{NAME}"}}'
    ended = [name for name in got if name.startswith("ganglion_language_requests_total")]
    assert [got[name] for name in ended] == [1]
    # a token that ends an answer is of no text, and is not counted
    assert got[f"ganglion_language_new_tokens_total{model}"] == num_out
    assert got[f"ganglion_language_first_token_seconds_count{model}"] == 1
    kinds = {
        name: count
        for name, count in got.items()
        if name.startswith("ganglion_language_turn_seconds_count")
    }
    assert sum(kinds.values()) > 0
    if not has_robots:
        assert list(kinds) == ['ganglion_language_turn_seconds_count{kind="alone"}']
