"""A stage for tests of the whole way: sockets, edge, service, engine and a tiny decoder, all in this process.

What a test can look at that a client cannot: requests under way and pages in use, so that "nothing is left" is a fact.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ganglion.clock import RealClock
from ganglion.config import ChatConfig, EngineConfig, MemoryConfig, ServeConfig
from ganglion.errors import GanglionError
from ganglion.generation import GenerateRequest, TextDelta, Usage
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.serve.app import ServerThread
from ganglion.service import Generated, LanguageService, OnGenerated
from ganglion.types import RequestId
from tests.language_folder import write_llama

NAME = "tiny-llama"
WAIT_S = 60.0  # far more than a quiet machine needs
MEMORY = MemoryConfig(arena_bytes=1 << 24, large_page_bytes=1 << 16)


@dataclass(slots=True)
class Trail:
    """What one request was given, in order, with the place at which its client was given up."""

    num_deltas: int = 0
    num_after_cancel: int = 0
    is_cancelled: bool = False
    end: Usage | GanglionError | None = None


class Watched:
    """A LanguageService that keeps a trail of each request."""

    def __init__(self, inner: LanguageService) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.trails: dict[RequestId, Trail] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(self, request: GenerateRequest, on_generated: OnGenerated) -> RequestId:
        """As LanguageService.generate."""
        trail = Trail()

        def heard(item: Generated) -> None:
            assert trail.end is None, f"after the end: {item}"
            if isinstance(item, TextDelta):
                trail.num_deltas += 1
                trail.num_after_cancel += trail.is_cancelled
            elif isinstance(item, Usage | GanglionError):
                trail.end = item
            on_generated(item)

        request_id = self._inner.generate(request, heard)
        with self._lock:
            self.trails[request_id] = trail
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        """As LanguageService.cancel."""
        self._inner.cancel(request_id)
        with self._lock:
            self.trails[request_id].is_cancelled = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A served model and what stands behind it."""

    server: ServerThread
    service: LocalService
    watched: Watched

    @property
    def url(self) -> str:
        """The server's, without /v1."""
        return self.server.url

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        assert self.service.language is not None
        return len(self.service.language._open)

    @property
    def num_used_pages(self) -> int:
        """Pages that somebody holds."""
        return sum(self.service._ledger.stats().num_used_pages.values())

    def wait_for_rest(self) -> None:
        """Return when nothing is under way and no page is held. Fails after a while, with the numbers."""
        wait_until(
            lambda: self.num_open == 0 and self.num_used_pages == 0,
            lambda: f"{self.num_open} requests and {self.num_used_pages} pages are left",
        )
        self.service._ledger.check_integrity()


def wait_until(is_so: Callable[[], bool], told: Callable[[], str] = lambda: "") -> None:
    """Look every few milliseconds; fails after WAIT_S."""
    pause, clock = threading.Event(), RealClock()
    limit_s = clock.now_s() + WAIT_S
    while not is_so():
        assert clock.now_s() < limit_s, told() or "it did not happen in time"
        pause.wait(0.002)


def _watched(service: LocalService) -> Watched:
    assert service.language is not None
    return Watched(service.language)


@contextmanager
def language_stage(
    folder: Path,
    *,
    width: int = 32,
    num_layers: int = 1,
    max_tokens: int = 0,
    max_choices: int = 512,
) -> Iterator[Stage]:
    """Write a tiny decoder to `folder` / NAME and serve it; nothing may be left when a test ends.

    `max_tokens`: of a request, 0: the model's 1024. `max_choices`: that may be under way or wait.
    """
    path = write_llama(folder / NAME, width=width, num_layers=num_layers)
    model = load_language(path, dtype=torch.float32, name=NAME, max_page_bytes=1 << 16)
    with (
        LocalService(
            None,
            engine=EngineConfig(language_threads=1),
            memory=MEMORY,
            chat=ChatConfig(max_choices=max_choices),
            languages=(ServedLanguage(model, ByteTokenizer(), max_tokens=max_tokens),),
        ) as service,
        ServerThread(
            service,
            config=ServeConfig(port=0),
            language=(watched := _watched(service)),
            is_language_only=True,
        ) as server,
    ):
        stage = Stage(server=server, service=service, watched=watched)
        yield stage
        stage.wait_for_rest()
