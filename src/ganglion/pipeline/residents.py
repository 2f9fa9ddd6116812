"""Residents: brings language models into memory when they are asked for, and out of it again, while robots go on.

Owned by LanguageFront, on the engine's thread: it decides there, with `Residency`, what goes, and takes bytes from the pages
step by step. Weights are read on a thread of its own. Knows neither requests nor text.
"""

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ganglion.clock import Clock
from ganglion.engine.lane import pin_this_thread
from ganglion.errors import GanglionError, ModelUnavailableError
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.language import LanguageModel
from ganglion.models.weights import give_back_freed
from ganglion.pipeline.residency import Residency
from ganglion.pipeline.served import LanguageSource
from ganglion.service import ModelState, Residence
from ganglion.units import format_bytes

logger = logging.getLogger(__name__)

LOADER_NICENESS = 10
MIN_SHRINK_BYTES = 1 << 18  # that may move in one step where pages give way, whatever else may not
STUCK_S = 0.05  # until the next try, where pages are all held
RETRY_S = 5.0
BROKEN_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Message: the weights of a model are there."""

    name: str
    model: LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class NotLoaded:
    """Message: they cannot be read."""

    name: str
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Message: somebody's time may be over."""


ResidentsMessage = Loaded | NotLoaded | Look


class ModelCore(Protocol):
    """What this asks of the language engine."""

    def open_model(self, name: str, model: LanguageModel) -> None:
        """Requests may name it from now on."""
        ...

    def close_model(self, name: str) -> None:
        """Nobody uses it any more."""
        ...


class PageBudget:
    """How many bytes the pages may take: less is reached step by step, more is there at once."""

    def __init__(
        self, ledger: Ledger, arena: Arena, *, large_page_bytes: int, step_bytes: int
    ) -> None:
        """`step_bytes`: that may move between two steps of the engine."""
        self._ledger, self._arena = ledger, arena
        self._large_page_bytes = large_page_bytes
        self._step_bytes = max(step_bytes, MIN_SHRINK_BYTES)
        self._num_large_pages = ledger.num_large_pages

    def allow(self, page_bytes: int) -> None:
        """From now on so many."""
        self._num_large_pages = page_bytes // self._large_page_bytes
        self._ledger.set_num_large_pages(self._num_large_pages)

    @property
    def is_kept(self) -> bool:
        """Are there no more?"""
        return self._ledger.num_large_pages <= self._num_large_pages

    def shrink(self) -> bool:
        """One step towards it, between two steps of the engine; False: all pages over it are held."""
        moves = self._ledger.plan_moves(self._step_bytes, num_spare=0)
        if moves is None:
            return False
        self._arena.copy(moves.copies)
        self._arena.release(moves.released)
        return True


class Loader:
    """The thread that reads weights and gives them back: behind everything else, on any core."""

    def __init__(self, post: Callable[[ResidentsMessage], None]) -> None:
        self._post = post
        # asked here: once a lane is pinned, the threads that it starts inherit its one core
        self._allowed: Set[int] = (
            os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else frozenset()
        )
        self._thread = ThreadPoolExecutor(1, "loader", initializer=self._open)

    def load(self, name: str, source: LanguageSource) -> None:
        """Posts Loaded or NotLoaded."""
        self._thread.submit(self._load, name, source)

    def drop(self, models: list[LanguageModel]) -> None:
        """Give the memory of these back; the list is emptied, and holds the last reference."""
        self._thread.submit(_drop, models)

    def close(self) -> None:
        """Waits for the model that is being read."""
        self._thread.shutdown(cancel_futures=True)

    def _open(self) -> None:
        pin_this_thread(frozenset(), allowed=self._allowed)
        if hasattr(os, "setpriority"):  # threads have a priority of their own on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)

    def _load(self, name: str, source: LanguageSource) -> None:
        try:
            model = source.load()
        except Exception as error:
            logger.exception("%s cannot be loaded", name)
            self._post(NotLoaded(name=name, error=error))
        else:
            self._post(Loaded(name=name, model=model))


class Residents:
    """One load at a time: the pages and idle models give way, then the weights are read, then requests are told."""

    def __init__(
        self,
        core: ModelCore,
        sources: Mapping[str, LanguageSource],
        residency: Residency,
        pages: PageBudget,
        clock: Clock,
        post: Callable[[ResidentsMessage], None],
        *,
        metrics: Metrics,
        wait_s: float,
        later: Callable[[float, ResidentsMessage], None],
    ) -> None:
        """`wait_s`: for room. `later`: posts a message in so many seconds. Pinned models are in `core` already."""
        self._core, self._sources, self._residency = core, dict(sources), residency
        self._pages, self._clock, self._wait_s, self._later = pages, clock, wait_s, later
        self._post, self._metrics = post, metrics
        self._loader: Loader | None = None  # made for the first model that is loaded late
        self._models: dict[str, LanguageModel] = {}  # those that may go again
        self._wanted: dict[str, float] = {}  # name -> since when
        self._making_room: tuple[str, float] | None = None  # for whom, since when
        self._reading = ""
        self._began_s = 0.0  # of the load under way
        self._is_stuck = False
        self._look_at_s: float | None = None
        self.on_ready: Callable[[str], None] = lambda name: None
        self.on_failed: Callable[[str, GanglionError], None] = lambda name, error: None
        self.busy: Callable[[], Collection[str]] = frozenset
        if any(not residency.models[name].stay.is_pinned for name in self._sources):
            self._loader = Loader(post)

    # --- from any thread -----------------------------------------------------------------------------------------

    def residence(self, name: str) -> Residence:
        """Where a model is."""
        terms = self._residency.models[name]
        return Residence(
            state=self._residency.state(name), stay=str(terms.stay), weight_bytes=terms.weight_bytes
        )

    # --- on the engine's thread ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Do pages give way just now?"""
        return self._making_room is not None and not self._is_stuck

    def is_loaded(self, name: str) -> bool:
        """Can it be run?"""
        return self._residency.state(name) is ModelState.LOADED

    def want(self, name: str) -> None:
        """A request waits for this model: `on_ready` or `on_failed` is called."""
        if self._residency.state(name) is ModelState.UNLOADED:
            self._wanted.setdefault(name, self._clock.now_s())
            self._advance()

    def unwant(self, name: str) -> None:
        """Nobody waits for it any more. What is being read already is read to its end."""
        self._wanted.pop(name, None)

    def count(self, name: str, num_tokens: int) -> None:
        """A request of this model ended."""
        self._residency.count(name, num_tokens, self._clock.now_s())
        self._advance()

    def handle(self, message: ResidentsMessage) -> None:
        """Apply one message."""
        match message:
            case Loaded(name=name, model=model):
                self._reading = ""
                now_s = self._clock.now_s()
                self._residency.finish(name, now_s)
                self._metrics.model_loads.inc(model=name, outcome="loaded")
                self._metrics.model_load_seconds.observe(now_s - self._began_s, model=name)
                self._models[name] = model
                self._core.open_model(name, model)
                logger.info("%s is loaded", name)
                self.on_ready(name)
            case NotLoaded(name=name, error=error):
                self._reading = ""
                self._give_up(
                    name,
                    ModelUnavailableError(
                        f"the model {name!r} cannot be loaded ({type(error).__name__}): the server's log says why",
                        retry_after_s=BROKEN_RETRY_S,
                    ),
                )
            case Look():
                self._look_at_s = None
                self._is_stuck = False
                for name in self._residency.expired(self._clock.now_s(), busy=self.busy()):
                    self._unload(name, "nobody asked for it", reason="idle")
                self._allow()
        self._advance()

    def step(self) -> None:
        """Between two steps of the engine: pages give way to the model that is to be loaded."""
        if self._making_room is None or self._is_stuck:
            return
        name, since_s = self._making_room
        if self._pages.is_kept:
            self._making_room, self._reading = None, name
            assert self._loader is not None, "made with the first model that may go"
            self._loader.load(name, self._sources[name])
        elif not self._pages.shrink():
            if self._clock.now_s() - since_s > self._wait_s:
                self._making_room = None
                self._give_up(name, self._no_room(name))
                self._advance()
            else:
                self._is_stuck = True
                self._look_in(STUCK_S)

    def close(self) -> None:
        """No model is read any more; what waits is not told."""
        self._wanted.clear()
        self._making_room = None
        if self._loader is not None:
            self._loader.close()
        self._models.clear()

    def _advance(self) -> None:
        """Begin to load what has waited longest and has room."""
        now_s = self._clock.now_s()
        for name, since_s in list(self._wanted.items()):
            if self._making_room is not None or self._reading:
                break
            room = self._residency.room(name, now_s, busy=self.busy())
            if room is not None:
                del self._wanted[name]
                self._begin(name, room.evicted)
            elif now_s - since_s >= self._wait_s:
                del self._wanted[name]
                self._fail(name, self._no_room(name))
        self._arm(now_s)

    def _begin(self, name: str, evicted: Collection[str]) -> None:
        for other in evicted:
            self._unload(other, f"{name} needs its bytes", reason="room")
        self._residency.begin(name)
        self._allow()
        self._began_s = self._clock.now_s()
        self._making_room, self._is_stuck = (name, self._began_s), False
        logger.info(
            "loading %s: %s of weights, %s left for pages",
            name,
            format_bytes(self._residency.models[name].weight_bytes),
            format_bytes(self._residency.page_bytes),
        )

    def _unload(self, name: str, why: str, *, reason: str) -> None:
        self._metrics.model_unloads.inc(model=name, reason=reason)
        self._core.close_model(name)
        self._residency.drop(name)
        assert self._loader is not None, "made with the first model that may go"
        self._loader.drop([self._models.pop(name)])
        logger.info("%s is unloaded: %s", name, why)

    def _give_up(self, name: str, error: GanglionError) -> None:
        self._residency.drop(name)
        self._allow()
        self._fail(name, error)

    def _fail(self, name: str, error: GanglionError) -> None:
        self._metrics.model_loads.inc(model=name, outcome=error.code)
        self.on_failed(name, error)

    def _allow(self) -> None:
        self._pages.allow(self._residency.page_bytes)

    def _no_room(self, name: str) -> ModelUnavailableError:
        terms = self._residency.models[name]
        return ModelUnavailableError(
            f"no room for the model {name!r}: it needs {format_bytes(terms.weight_bytes)}, and what is in memory was busy "
            f"for {self._wait_s:g} s",
            retry_after_s=RETRY_S,
        )

    def _arm(self, now_s: float) -> None:
        """Look again when the next time is over."""
        busy = self.busy()
        times_s = [since_s + self._wait_s for since_s in self._wanted.values()]
        for name in self._models:
            left_s = self._residency.left_s(name, now_s)
            if left_s is not None and name not in busy:
                times_s.append(now_s + left_s)
        if times_s:
            self._look_in(max(0.0, min(times_s) - now_s))

    def _look_in(self, delay_s: float) -> None:
        at_s = self._clock.now_s() + delay_s
        if self._look_at_s is None or at_s < self._look_at_s:
            self._look_at_s = at_s
            self._later(delay_s, Look())


def _drop(models: list[LanguageModel]) -> None:
    """Weights are large blocks; what the allocator kept of the smaller ones goes back to the system, too.

    No garbage is collected here: that holds up every thread, for a second where much was imported.
    """
    models.clear()
    give_back_freed()
