"""Mixed, simulated: robots and a planner in one service whose clock moves by what their work took when it was measured.

Called by `bench.mixed` and by tests. The service, its engines and its turns are those that serve; only time is simulated, so
misses do not hang on what else the machine does. The planner computes a toy of as many layers and is charged the time of
the real one. Sockets, rendering and hand-overs between threads take nothing here.
"""

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ganglion.bench.cosim import CostTable
from ganglion.bench.fleet import Workload
from ganglion.bench.generators import Pages
from ganglion.bench.shapes import TOY_DENSE
from ganglion.config import EngineConfig, MemoryConfig
from ganglion.engine.language_host import HEAD, LAYERS
from ganglion.errors import GanglionError
from ganglion.generation import GenerateRequest, LanguageSpec, Sampling, Usage
from ganglion.layout import PageLayout
from ganglion.models.base import Model, StageBatch
from ganglion.models.decoder_load import random_language
from ganglion.models.language import KvGroup, KvSpace, LanguageModel, StateGroup
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.plan.cost import interpolate
from ganglion.service import Generated, Outcome
from ganglion.spec import PolicySpec, Stage
from ganglion.types import ActionChunk, Float32Array, Observation
from ganglion.units import MIB

TURN_US = 300.0  # of the loop besides its pieces: `server: between pieces` of bench control
HEAD_ROWS = 4
MEASURED_TOKENS = (1, 2, 4, 16, 64, 128, 256, 512, 1024, 2048)


class EventClock:
    """A simulated clock that calls what is due while it moves: events happen on time, whatever is being computed."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now_ns(self) -> int:
        return self._now_ns

    def now_s(self) -> float:
        return self._now_ns * 1e-9

    def sleep_until(self, deadline_s: float) -> None:
        deadline_ns = round(deadline_s * 1e9)
        while self._events and self._events[0][0] <= deadline_ns:
            at_ns, _, call = heapq.heappop(self._events)
            self._now_ns = max(self._now_ns, at_ns)
            call()
        self._now_ns = max(self._now_ns, deadline_ns)

    def advance(self, delta_us: float) -> None:
        """Work took so long."""
        self.sleep_until(self.now_s() + delta_us * 1e-6)

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call it when the clock comes by; `call` must not move the clock."""
        heapq.heappush(self._events, (round(time_s * 1e9), next(self._numbers), call))

    def skip(self) -> None:
        """Nothing to compute: on to the next event. Raises IndexError without one."""
        self.sleep_until(self._events[0][0] * 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageCosts:
    """Microseconds of one layer by tokens of a batch, and of the head by rows."""

    layer_us: Mapping[int, float]
    head_us: Mapping[int, float]
    num_layers: int


class ChargedPolicy:
    """A policy whose stages take what the table says."""

    def __init__(self, inner: Model, table: CostTable, clock: EventClock) -> None:
        self._inner, self._table, self._clock = inner, table, clock

    @property
    def spec(self) -> PolicySpec:
        return self._inner.spec

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        return self._inner.layouts

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._inner.stages

    def key(self, stage: Stage, observation: Observation) -> bytes:
        return self._inner.key(stage, observation)

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        out = self._inner.run(stage, batch)
        self._clock.advance(
            self._table.piece_us(stage.name, num_rows=len(batch.rows), num_units=batch.num_units)
        )
        return out

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._inner.emit(pages, observations)


class ChargedLanguage:
    """A LanguageModel whose layers and head take what was measured of another one with as many layers."""

    def __init__(self, inner: LanguageModel, costs: LanguageCosts, clock: EventClock) -> None:
        assert inner.spec.num_layers == costs.num_layers, (inner.spec.num_layers, costs.num_layers)
        self._inner, self._costs, self._clock = inner, costs, clock

    @property
    def spec(self) -> LanguageSpec:
        return self._inner.spec

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        return self._inner.groups

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._inner.embed(token_ids)

    def run(self, hidden: Tensor, positions: Tensor, kv: KvSpace, layers: range) -> Tensor:
        out = self._inner.run(hidden, positions, kv, layers)
        self._clock.advance(interpolate(self._costs.layer_us, len(hidden)) * len(layers))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        self._clock.advance(interpolate(self._costs.head_us, len(hidden)))
        return self._inner.logits(hidden)


def measured_language(pages: Pages, *, num_tokens: Sequence[int], seed: int) -> LanguageCosts:
    """Prompts of each size through the engine, alone, then some at once; twice, with the torch threads that are set."""
    random, spec = np.random.default_rng(seed), pages.model.spec

    def serve(num_rows: int, size: int) -> None:
        for prompt in random.integers(0, spec.vocab_size, (num_rows, size)).tolist():
            pages.submit(prompt, 1)
        while pages.engine.has_work:
            pages.step()

    for _ in range(2):
        for size in num_tokens:
            serve(1, size)
        serve(HEAD_ROWS, 1)
    return LanguageCosts(
        layer_us={size: pages.estimate_us(LAYERS, size) for size in num_tokens},
        head_us={rows: pages.estimate_us(HEAD, rows) for rows in (1, HEAD_ROWS)},
        num_layers=spec.num_layers,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What robots and the planner's users ask."""

    num_robots: int
    rate_hz: float
    deadline_ms: float
    num_prompts: int
    num_prompt_tokens: int
    num_new_tokens: int
    num_open: int  # prompts at a time
    seed: int


@dataclass(slots=True, kw_only=True)
class Sightings:
    """Of one robot: when observations were sent, and when chunks came that know them; seconds."""

    sent: dict[int, float] = field(default_factory=dict)
    came: list[tuple[float, int]] = field(default_factory=list)

    def waits_ms(self, *, never_ms: float) -> list[float]:
        """How long each observation waited for a chunk that rests on it or a newer one."""
        waits = []
        for seq, at_s in self.sent.items():
            after = [came_s - at_s for came_s, came_seq in self.came if came_seq >= seq]
            waits.append(min(after) * 1e3 if after else never_ms)
        return waits


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSide:
    """Waits of all observations, and what the planner got done."""

    waits_ms: tuple[float, ...]
    num_tokens: int
    run_s: float

    def miss_rate(self, deadline_ms: float) -> float:
        """Of observations; 0 without robots."""
        return sum(wait > deadline_ms for wait in self.waits_ms) / max(1, len(self.waits_ms))

    @property
    def tokens_per_s(self) -> float:
        """Of the planner, simulated."""
        return self.num_tokens / self.run_s


def simulate(
    policy: Model,
    table: CostTable,
    costs: LanguageCosts,
    engine: EngineConfig,
    traffic: Traffic,
) -> SimulatedSide:
    """All prompts, while robots send. One lane, and no threads: the costs say what threads are worth."""
    torch.set_num_threads(1)
    clock = EventClock()
    toy = random_language(
        {**TOY_DENSE, "num_hidden_layers": costs.num_layers, "max_position_embeddings": 32768},
        dtype=torch.float32,
        name="planner",
        seed=traffic.seed,
    )
    service = LocalService(
        ChargedPolicy(policy, table, clock),
        engine=replace(engine, lanes=((),), language_threads=1),
        memory=MemoryConfig(arena_bytes=512 * MIB),
        languages=(ServedLanguage(ChargedLanguage(toy, costs, clock), ByteTokenizer()),),
        clock=clock,
    )
    service.start_here()
    try:
        return _Run(service, policy, clock, traffic).run()
    finally:
        service.close()


class _Run:
    """One run's events."""

    def __init__(
        self, service: LocalService, policy: Model, clock: EventClock, traffic: Traffic
    ) -> None:
        self._service, self._clock, self._traffic = service, clock, traffic
        self._workload = Workload(policy, traffic.seed)
        self._random = np.random.default_rng(traffic.seed)
        self._robots = [Sightings() for _ in range(traffic.num_robots)]
        self._num_asked = self._num_ended = self._num_tokens = 0
        self._is_over = False

    def run(self) -> SimulatedSide:
        start_s = self._clock.now_s()
        period_s = 1 / self._traffic.rate_hz
        for robot in range(len(self._robots)):
            self._send(robot, start_s + robot * period_s / len(self._robots))
        for _ in range(self._traffic.num_open):
            self._ask()
        self._turn_until(lambda: self._num_ended == self._traffic.num_prompts)
        run_s = self._clock.now_s() - start_s
        self._is_over = True
        end_s = self._clock.now_s() + 2 * self._traffic.deadline_ms * 1e-3
        is_late: list[bool] = []
        self._clock.call_at(end_s, lambda: is_late.append(True))
        self._turn_until(lambda: bool(is_late))
        return SimulatedSide(
            waits_ms=tuple(
                wait for robot in self._robots for wait in robot.waits_ms(never_ms=float("inf"))
            ),
            num_tokens=self._num_tokens,
            run_s=run_s,
        )

    def _turn_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            if self._service.turn():
                self._clock.advance(TURN_US)
            elif not is_done():
                self._clock.skip()

    def _send(self, robot: int, at_s: float) -> None:
        """One observation then, and the next one a period later."""

        def send() -> None:
            if self._is_over:
                return
            observation = replace(self._workload.next(robot), deadline_ms=self._traffic.deadline_ms)
            self._robots[robot].sent[observation.seq] = at_s
            self._service.submit(observation, lambda outcome: self._hear(robot, outcome))
            self._send(robot, at_s + 1 / self._traffic.rate_hz)

        self._clock.call_at(at_s, send)

    def _hear(self, robot: int, outcome: Outcome) -> None:
        if isinstance(outcome, ActionChunk):
            self._robots[robot].came.append((self._clock.now_s(), outcome.context_seq))

    def _ask(self) -> None:
        if self._num_asked == self._traffic.num_prompts:
            return
        self._num_asked += 1
        front = self._service.language
        assert front is not None, "made with a language model"
        prompt = self._random.integers(0, 256, self._traffic.num_prompt_tokens).tolist()
        sampling = Sampling(
            temperature=0.0, max_tokens=self._traffic.num_new_tokens, is_eos_ignored=True
        )
        front.generate(
            GenerateRequest(model="planner", prompt=tuple(prompt), sampling=sampling),
            self._on_generated,
        )

    def _on_generated(self, item: Generated) -> None:
        if isinstance(item, GanglionError):
            raise item
        if isinstance(item, Usage):
            self._num_ended += 1
            self._num_tokens += (
                item.num_prompt_tokens - item.num_cached_tokens + item.num_completion_tokens
            )
            self._ask()
