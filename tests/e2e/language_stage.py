"""A stage for tests of the whole way: sockets, edge, service, engine and a tiny decoder, all in this process.

What a test can look at that a client cannot: requests under way and pages in use, so that "nothing is left" is a fact.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ganglion.clock import RealClock
from ganglion.config import ChatConfig, EngineConfig, MemoryConfig, ServeConfig
from ganglion.models.decoder_load import load_language
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.serve.app import ServerThread
from tests.language_folder import write_llama

NAME = "tiny-llama"
WAIT_S = 20.0
MEMORY = MemoryConfig(arena_bytes=1 << 24, large_page_bytes=1 << 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A served model and what stands behind it."""

    server: ServerThread
    service: LocalService

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
            language=service.language,
            is_language_only=True,
        ) as server,
    ):
        stage = Stage(server=server, service=service)
        yield stage
        stage.wait_for_rest()
