"""Bench mixed: two robots at 20 Hz beside a stream of long prompts, in one server; with language models cut short and not.

Called by `ganglion bench mixed`. Robots send recorded-looking noise on a clock of their own and never wait for a reply.
An observation is missed when no chunk that rests on it or a newer one was there by its deadline. The same once more in
simulated time (`bench.mixed_sim`), which other programs on the machine do not disturb.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ganglion.bench.fleet import Workload
from ganglion.bench.generators import Pages
from ganglion.bench.mixed_sim import (
    HEAD_ROWS,
    MEASURED_TOKENS,
    Traffic,
    measured_language,
    simulate,
)
from ganglion.bench.pipeline import measured_costs
from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.shapes import DENSE, TOY_DENSE
from ganglion.bench.stream import Frames
from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, PolicyConfig
from ganglion.errors import GanglionError
from ganglion.generation import GenerateRequest, Sampling, Usage
from ganglion.models.base import Model
from ganglion.models.decoder_load import random_language
from ganglion.models.language import LanguageModel
from ganglion.models.registry import DTYPES, load_policy, policy_folder
from ganglion.models.text_tokenizer import ByteTokenizer
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.plan.auto import auto_values
from ganglion.plan.hardware import read_hardware
from ganglion.service import Generated, Outcome
from ganglion.types import ActionChunk
from ganglion.units import GIB

NUM_ROBOTS, RATE_HZ, DEADLINE_MS = 2, 20.0, 100.0
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS, NUM_OPEN = 2000, 32, 2
UNSLICED_US = 10_000_000
WAIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the ways to run both: what was missed, and how fast the planner went."""

    num_sent: int
    num_missed: int
    latencies_ms: tuple[float, ...]
    tokens_per_s: float

    @property
    def miss_rate(self) -> float:
        """Of observations; 0 without robots."""
        return self.num_missed / self.num_sent if self.num_sent else 0.0


class Robots:
    """Threads that send at a fixed rate until told to stop, and note which chunks came when."""

    def __init__(self, service: LocalService, model: Model, *, num_robots: int, seed: int) -> None:
        self._service, self._workload = service, Workload(model, seed)
        self._clock, self._stopped, self._lock = RealClock(), threading.Event(), threading.Lock()
        self._sent: list[dict[int, float]] = [{} for _ in range(num_robots)]
        self._came: list[list[tuple[float, int]]] = [[] for _ in range(num_robots)]
        self._threads = [
            threading.Thread(target=self._run, args=(at,), daemon=True) for at in range(num_robots)
        ]

    def start(self) -> None:
        """Begin, half a period apart."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more observations; those under way may still come."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._clock.sleep_until(self._clock.now_s() + 2 * DEADLINE_MS * 1e-3)

    def missed(self) -> tuple[int, int, list[float]]:
        """Observations sent, those missed, and how long each waited for a chunk that knows it, ms."""
        num_sent = num_missed = 0
        latencies: list[float] = []
        for sent, came in zip(self._sent, self._came, strict=True):
            for seq, at_s in sent.items():
                waits = [came_s - at_s for came_s, came_seq in came if came_seq >= seq]
                num_sent += 1
                wait_ms = min(waits, default=WAIT_S) * 1e3
                num_missed += wait_ms > DEADLINE_MS
                latencies.append(wait_ms)
        return num_sent, num_missed, latencies

    def _run(self, robot: int) -> None:
        period_s = 1 / RATE_HZ
        start_s = self._clock.now_s() + robot * period_s / max(1, len(self._threads))
        tick = 0
        while not self._stopped.is_set():
            self._clock.sleep_until(start_s + tick * period_s)
            with self._lock:  # one workload for all
                observation = replace(self._workload.next(robot), deadline_ms=DEADLINE_MS)
            self._sent[robot][observation.seq] = self._clock.now_s()
            self._service.submit(observation, lambda outcome: self._hear(robot, outcome))
            tick += 1

    def _hear(self, robot: int, outcome: Outcome) -> None:
        if isinstance(outcome, ActionChunk):
            self._came[robot].append((self._clock.now_s(), outcome.context_seq))


def run(*, quick: bool, seed: int) -> BenchResult:
    """The planner alone, both with slices, both without; quick: a toy planner and few prompts."""
    hardware = read_hardware()
    autos = auto_values(hardware, has_chat=True)
    dtype: str = autos["engine.dtype"].value
    policy = load_policy(policy_folder(PolicyConfig().path), dtype=dtype)
    config = TOY_DENSE if quick else DENSE
    language = random_language(config, dtype=DTYPES[dtype], name="planner", seed=seed)
    num_prompts, num_tokens = (2, 64) if quick else (8, NUM_PROMPT_TOKENS)
    engine = EngineConfig(
        lanes=autos["engine.lanes"].value,
        language_threads=autos["engine.language_threads"].value,
        dtype=dtype,
    )
    unsliced = replace(engine, step_budget_us=UNSLICED_US, language_slice_us=UNSLICED_US)

    def side(config: EngineConfig, *, num_robots: int) -> Side:
        with _serving(policy, language, config) as service:
            return _run(service, policy, num_robots, num_prompts, num_tokens, seed)

    alone = side(engine, num_robots=0)
    sliced = side(engine, num_robots=NUM_ROBOTS)
    whole = side(unsliced, num_robots=NUM_ROBOTS)
    simulated = _simulated(
        policy, language, engine, (num_prompts, num_tokens), is_quick=quick, seed=seed
    )
    return BenchResult(
        name="mixed",
        metrics={
            "robot_miss_rate": sliced.miss_rate,
            "robot_miss_rate_unsliced": whole.miss_rate,
            "robot_wait_p50_ms": float(np.percentile(sliced.latencies_ms, 50)),
            "robot_wait_p99_ms": float(np.percentile(sliced.latencies_ms, 99)),
            "robot_wait_p99_ms_unsliced": float(np.percentile(whole.latencies_ms, 99)),
            "planner_tokens_per_s": sliced.tokens_per_s,
            "planner_tokens_per_s_alone": alone.tokens_per_s,
            "planner_tokens_per_s_unsliced": whole.tokens_per_s,
            "planner_kept_share": sliced.tokens_per_s / alone.tokens_per_s,
            **simulated,
        },
        detail=_detail(engine, num_prompts=num_prompts, num_tokens=num_tokens, dtype=dtype)
        | {"num_sent": sliced.num_sent, "num_missed": sliced.num_missed},
        n=sliced.num_sent,
        seed=seed,
        plots=(
            Plot(
                title=f"Observations without a chunk within {DEADLINE_MS:.0f} ms",
                x_label="",
                y_label="share of observations",
                names=("planner in slices", "planner in one piece"),
                series={"missed": (sliced.miss_rate, whole.miss_rate)},
            ),
        ),
    )


def _simulated(
    policy: Model,
    language: LanguageModel,
    engine: EngineConfig,
    prompts: tuple[int, int],
    *,
    is_quick: bool,
    seed: int,
) -> dict[str, float]:
    """Metrics of the same three sides in simulated time; `prompts`: how many, of how many tokens."""
    torch.set_num_threads(1)
    frames = Frames(policy, rate_hz=RATE_HZ, seed=seed, world="metaworld:push")
    table = measured_costs(policy, frames, num_rounds=1 if is_quick else 10)
    torch.set_num_threads(engine.language_threads)
    pages = Pages(language, arena_bytes=GIB, max_rows=HEAD_ROWS)
    sizes = MEASURED_TOKENS[:4] if is_quick else MEASURED_TOKENS
    costs = measured_language(pages, num_tokens=sizes, seed=seed)
    pages.engine.close()
    traffic = Traffic(
        num_robots=NUM_ROBOTS,
        rate_hz=RATE_HZ,
        deadline_ms=DEADLINE_MS,
        num_prompts=prompts[0],
        num_prompt_tokens=prompts[1],
        num_new_tokens=NUM_NEW_TOKENS,
        num_open=NUM_OPEN,
        seed=seed,
    )
    unsliced = replace(engine, step_budget_us=UNSLICED_US, language_slice_us=UNSLICED_US)
    alone = simulate(policy, table, costs, engine, replace(traffic, num_robots=0))
    sliced = simulate(policy, table, costs, engine, traffic)
    whole = simulate(policy, table, costs, unsliced, traffic)
    return {
        "simulated_robot_miss_rate": sliced.miss_rate(DEADLINE_MS),
        "simulated_robot_miss_rate_unsliced": whole.miss_rate(DEADLINE_MS),
        "simulated_planner_kept_share": sliced.tokens_per_s / alone.tokens_per_s,
    }


@contextmanager
def _serving(
    policy: Model, language: LanguageModel, engine: EngineConfig
) -> Iterator[LocalService]:
    served = ServedLanguage(language, ByteTokenizer())
    memory = MemoryConfig(arena_bytes=2 * GIB)
    with LocalService(policy, engine=engine, memory=memory, languages=(served,)) as service:
        yield service


def _run(
    service: LocalService,
    policy: Model,
    num_robots: int,
    num_prompts: int,
    num_tokens: int,
    seed: int,
) -> Side:
    """`num_prompts` new prompts, NUM_OPEN at a time, while robots send."""
    front, clock = service.language, RealClock()
    assert front is not None, "made with a language model"
    random = np.random.default_rng(seed)
    room, ended = threading.Semaphore(NUM_OPEN), threading.Semaphore(0)
    counted: list[int] = []
    errors: list[GanglionError] = []

    def on_generated(item: Generated) -> None:
        if isinstance(item, Usage):
            counted.append(
                item.num_prompt_tokens - item.num_cached_tokens + item.num_completion_tokens
            )
        elif isinstance(item, GanglionError):
            errors.append(item)
        else:
            return
        room.release()
        ended.release()

    robots = Robots(service, policy, num_robots=num_robots, seed=seed)
    robots.start()
    start_s = clock.now_s()
    for _ in range(num_prompts):
        room.acquire()
        request = GenerateRequest(
            model="planner",
            prompt=tuple(random.integers(0, 256, num_tokens).tolist()),
            sampling=Sampling(temperature=0.0, max_tokens=NUM_NEW_TOKENS, is_eos_ignored=True),
        )
        front.generate(request, on_generated)
    for _ in range(num_prompts):
        ended.acquire()
    run_s = clock.now_s() - start_s
    robots.stop()
    if errors:
        raise errors[0]
    num_sent, num_missed, latencies = robots.missed()
    return Side(
        num_sent=num_sent,
        num_missed=num_missed,
        latencies_ms=tuple(latencies),
        tokens_per_s=sum(counted) / run_s,
    )


def _detail(engine: EngineConfig, **more: Any) -> dict[str, Any]:
    return more | {
        "num_robots": NUM_ROBOTS,
        "rate_hz": RATE_HZ,
        "deadline_ms": DEADLINE_MS,
        "num_new_tokens": NUM_NEW_TOKENS,
        "num_open_prompts": NUM_OPEN,
        "language_slice_us": engine.language_slice_us,
        "language_share": engine.language_share,
        "language_threads": engine.language_threads,
        "unsliced": "steps of the planner end with the whole prompt",
    }
