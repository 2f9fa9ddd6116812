"""Replay: a fleet of robots that send recorded observations in real time, in a process of its own.

Called by `bench.robots`. Simulating and rendering 64 arms would fill the machine; a recorded arm costs its sockets and its
ticks only. Everything else is real: the client, the wire, the server, the action queue, absolute deadlines. A chunk does
not change what a robot sees next, so this measures time, not success. Knows no torch.

Every frame gets a few bytes of noise of its own: no two are equal, as no two of a camera's are.
"""

import asyncio
import multiprocessing
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ganglion.bench.baselines.lerobot import LeRobotQueue
from ganglion.bench.baselines.sense_act import SenseActQueue
from ganglion.client import Reply, ReplyError, ReplyTimeoutError
from ganglion.client.asynchronous import AsyncClient
from ganglion.clock import RealClock
from ganglion.errors import ConnectionLostError, GanglionError
from ganglion.robots.catalog import METAWORLD_ARM
from ganglion.robots.queue import ActionQueue, Chunk, Mode, QueueConfig
from ganglion.types import Execution, Float32Array

NOISE_BYTES = 8
RETRY_S = 0.2
START_LIMIT_S = 60.0
FIRST_CHUNK_S = 4.0
POLL_S = 0.2


class Scheme(StrEnum):
    """How a robot asks and what it does with the answers."""

    NEWEST = "newest"  # ours: asks by the clock, takes whichever chunk is newest
    SENSE_ACT = "sense_act"  # B0
    LEROBOT = "lerobot"  # B1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """One fleet. `interval_ticks`: NEWEST asks every so many ticks; SENSE_ACT executes so many rows of a chunk, LEROBOT asks
    for so many.
    """

    url: str
    tape: Path
    scheme: Scheme
    num_robots: int
    interval_ticks: int
    rate_hz: float = 20.0
    warm_s: float = 1.5
    run_s: float = 6.0
    max_age_s: float = 0.25
    seed: int = 0


@dataclass(slots=True)
class RobotReport:
    """What one robot saw between the end of the warm-up and the end. Times in seconds."""

    num_ticks: int = 0
    num_misses: int = 0
    num_late_ticks: int = 0  # SENSE_ACT: that began without their action, warm-up included
    num_chunks: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    lateness_ms: list[float] = field(default_factory=list)
    waited_s: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    def wait_ratio(self, period_s: float) -> float:
        """Time without an action that it may execute over time with one."""
        executed_s = max(period_s, self.num_ticks * period_s - self.waited_s)
        return self.waited_s / executed_s


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """All robots of one run."""

    config: ReplayConfig
    robots: tuple[RobotReport, ...]

    @property
    def miss_rate(self) -> float:
        """Share of ticks without a valid action of an observation that is fresh enough."""
        num_ticks = sum(robot.num_ticks for robot in self.robots)
        return sum(robot.num_misses for robot in self.robots) / max(1, num_ticks)

    @property
    def wait_ratios(self) -> list[float]:
        """Of every robot."""
        return [robot.wait_ratio(1 / self.config.rate_hz) for robot in self.robots]

    def samples(self, name: str) -> list[float]:
        """`latencies_ms` or `lateness_ms` of all."""
        return [sample for robot in self.robots for sample in getattr(robot, name)]


class Tape:
    """Recorded observations of some tasks: what cameras and joints showed, in order, and the instruction."""

    def __init__(
        self, images: Mapping[str, np.ndarray], states: Float32Array, prompts: list[str]
    ) -> None:
        """`images`: key -> uint8 [task, at, height, width, 3]; `states`: [task, at, dim]."""
        self.images, self.states, self.prompts = dict(images), states, prompts

    def save(self, path: Path) -> None:
        """Write it as one npz file."""
        arrays: dict[str, Any] = {f"image:{key}": stack for key, stack in self.images.items()}
        np.savez(path, states=self.states, prompts=np.array(self.prompts), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Tape":
        """Read what `save` wrote."""
        with np.load(path) as data:
            images = {key[6:]: data[key] for key in data.files if key.startswith("image:")}
            return cls(images, data["states"], [str(prompt) for prompt in data["prompts"]])

    def frame(self, robot: int, at: int, state_key: str) -> tuple[dict[str, Any], str]:
        """Observation number `at` of a robot, back and forth along its task's tape, and its instruction."""
        task = robot % len(self.prompts)
        length = self.states.shape[1]
        place = at % (2 * length)
        place = min(place, 2 * length - 1 - place)
        noise = np.frombuffer((robot << 32 | at).to_bytes(NOISE_BYTES, "little"), np.uint8)
        frame: dict[str, Any] = {}
        for key, stack in self.images.items():
            image = stack[task, place].copy()
            image.reshape(-1)[:NOISE_BYTES] = noise
            frame[key] = image
        frame[state_key] = self.states[task, place]
        return frame, self.prompts[task]


class Driver(Protocol):
    """A robot's queue of actions under one scheme."""

    def tick(self, now_s: float) -> tuple[int, bool]:
        """Begin a tick: misses, and whether to send an observation."""
        ...

    def offer(self, actions: Float32Array, seen_s: float, now_s: float) -> int:
        """A chunk for the observation taken at `seen_s` came; misses that this makes."""
        ...

    def lose(self) -> None:
        """A request ended without a chunk."""
        ...


class NewestQueue:
    """`robots.queue` as `robots.loop` uses it: asks every `interval_ticks`, whatever is still under way."""

    def __init__(self, *, interval_ticks: int, max_age_s: float) -> None:
        self._queue = ActionQueue(METAWORLD_ARM, QueueConfig(miss_age_s=max_age_s))
        self._interval_ticks = interval_ticks
        self._tick = 0
        self._ticks: dict[float, int] = {}  # of observations under way, by their time

    @property
    def num_ticks(self) -> int:
        """Ticks so far."""
        return self._tick

    def tick(self, now_s: float) -> tuple[int, bool]:
        command = self._queue.step(self._tick, now_s=now_s)
        is_asking = self._tick % self._interval_ticks == 0
        if is_asking:
            self._ticks[now_s] = self._tick
            if len(self._ticks) > 64:
                del self._ticks[next(iter(self._ticks))]
        self._tick += 1
        return int(command.is_miss), is_asking

    def offer(self, actions: Float32Array, seen_s: float, now_s: float) -> int:
        tick = self._ticks.get(seen_s)
        if tick is not None:
            chunk = Chunk(actions=actions, obs_tick=tick, obs_s=seen_s, version="")
            if self._queue.mode is Mode.SAFE_STOP and self._queue.is_good(chunk, now_s=now_s):
                self._queue.resume()  # as the loop of a simulated arm does
            self._queue.offer(chunk, now_s=now_s)
        return 0

    def lose(self) -> None:
        """The next observation goes out by the clock."""


def replay(config: ReplayConfig) -> FleetReport:
    """Run the fleet in a process of its own; its report. Raises GanglionError when robots failed."""
    # spawn: the server's threads do not survive a fork
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_here, (config,))


def run_here(config: ReplayConfig) -> FleetReport:
    """Run the fleet in this process."""
    robots = asyncio.run(_run(config))
    return FleetReport(config=config, robots=tuple(robots))


async def _run(config: ReplayConfig) -> list[RobotReport]:
    tape = Tape.load(config.tape)
    rng = random.Random(config.seed)
    robots = [_Robot(config, tape, index, phase=rng.random()) for index in range(config.num_robots)]
    try:
        async with asyncio.timeout(START_LIMIT_S):
            for robot in robots:  # one by one: 64 handshakes at once are no fleet's start
                await robot.connect()
        async with asyncio.TaskGroup() as group:
            for robot in robots:
                group.create_task(robot.run())
    except TimeoutError as error:
        raise GanglionError(
            f"{config.num_robots} robots did not connect within {START_LIMIT_S:g} s",
            next_step="run `ganglion doctor`",
        ) from error
    finally:
        for robot in robots:
            await robot.close()
    return [robot.report for robot in robots]


class _Robot:
    """One recorded robot: its connection, its ticks on absolute deadlines, its queue."""

    def __init__(self, config: ReplayConfig, tape: Tape, index: int, *, phase: float) -> None:
        self._config, self._tape, self._index, self._phase = config, tape, index, phase
        self._clock = RealClock()
        self._client = AsyncClient(config.url, robot_id=f"replay-{index}")
        self._driver = driver(config)
        self._seen_s: dict[int, float] = {}  # observations under way and just answered, by number
        self._num_sent = 0
        self._is_measured = self._is_over = False
        self.report = RobotReport()

    async def connect(self) -> None:
        await self._client.reconnect()
        self._state_key = next(iter(self._client.metadata["state"]))

    async def close(self) -> None:
        await self._client.close()

    async def run(self) -> None:
        """First a chunk, then the ticks: an arm is under control from its first chunk on."""
        period_s = 1 / self._config.rate_hz
        await asyncio.sleep(self._phase * self._config.interval_ticks * period_s)
        await self._warm_up()
        receiver = asyncio.create_task(self._receive())
        try:
            await self._run_ticks(period_s)
        finally:
            self._is_over = True
            await receiver

    async def _warm_up(self) -> None:
        """The first chunk makes the instruction known to the server, as an episode's start does.

        A robot that an overloaded server leaves without one begins all the same: it misses its ticks.
        """
        end_s = self._clock.now_s() + FIRST_CHUNK_S
        while self._clock.now_s() < end_s:
            frame, prompt = self._frame()
            try:
                await self._client.infer(
                    frame, prompt=prompt, timeout_s=FIRST_CHUNK_S, **self._hints(0)
                )
            except (ReplyError, ReplyTimeoutError) as error:
                self._count(error)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _run_ticks(self, period_s: float) -> None:
        config, start_s = self._config, self._clock.now_s()
        num_warm = round(config.warm_s * config.rate_hz)
        tick = 0
        while tick < num_warm + round(config.run_s * config.rate_hz):
            deadline_s = start_s + tick * period_s
            await asyncio.sleep(max(0.0, deadline_s - self._clock.now_s()))
            now_s = self._clock.now_s()
            self._is_measured = tick >= num_warm
            late_s = now_s - deadline_s
            num_overruns = int(late_s / period_s)  # this process was held up: nothing was commanded
            num_misses, is_asking = self._driver.tick(now_s)
            if self._is_measured:
                self.report.lateness_ms.append(late_s * 1e3)
                self.report.num_ticks += 1 + num_overruns
            self._miss(num_misses + num_overruns, period_s)
            if is_asking:
                await self._ask(now_s, tick)
            tick += 1 + num_overruns
        if isinstance(self._driver, SenseActQueue):
            self.report.num_late_ticks = self._driver.num_late_ticks

    async def _ask(self, now_s: float, tick: int) -> None:
        frame, prompt = self._frame()
        try:
            seq = await self._client.request(frame, prompt=prompt, **self._hints(tick))
        except ConnectionLostError as error:  # from here on it misses
            self._count(error)
            return
        self._seen_s[seq] = now_s
        if len(self._seen_s) > 64:
            del self._seen_s[next(iter(self._seen_s))]

    async def _receive(self) -> None:
        while not self._is_over:  # no cancel: Python 3.11's wait_for may swallow it
            try:
                answer = await self._client.poll(timeout_s=POLL_S)
            except ConnectionLostError:
                return
            now_s = self._clock.now_s()
            if isinstance(answer, Reply):
                self._take(answer, now_s)
            elif isinstance(answer, ReplyError):
                self._count(answer)
                self._driver.lose()

    def _take(self, reply: Reply, now_s: float) -> None:
        seen_s = self._seen_s.get(reply.context_seq)
        if seen_s is None:
            return
        if self._is_measured:
            self.report.num_chunks += 1
            self.report.latencies_ms.append(reply.round_trip_ms)
            if self._config.scheme is Scheme.SENSE_ACT:
                self.report.waited_s += now_s - seen_s  # it stands still while it waits
        self._miss(self._driver.offer(reply.actions, seen_s, now_s), 1 / self._config.rate_hz)

    def _miss(self, num_misses: int, period_s: float) -> None:
        if self._is_measured:
            self.report.num_misses += num_misses
            if self._config.scheme is not Scheme.SENSE_ACT:
                self.report.waited_s += num_misses * period_s

    def _count(self, error: GanglionError) -> None:
        code = error.code.value
        self.report.errors[code] = self.report.errors.get(code, 0) + 1

    def _frame(self) -> tuple[dict[str, Any], str]:
        self._num_sent += 1
        return self._tape.frame(self._index, self._num_sent, self._state_key)

    def _hints(self, tick: int) -> dict[str, Any]:
        hints: dict[str, Any] = {
            "control_hz": self._config.rate_hz,
            "deadline_ms": self._config.max_age_s * 1e3,
        }
        if self._config.scheme is Scheme.NEWEST:
            hints |= {"executed_until": tick, "execution": Execution.PREFIX.value}
            hints["inference_delay_hint"] = 1
        return hints


def driver(config: ReplayConfig) -> Driver:
    """The queue of `config`'s scheme."""
    num, age_s = config.interval_ticks, config.max_age_s
    match config.scheme:
        case Scheme.NEWEST:
            return NewestQueue(interval_ticks=num, max_age_s=age_s)
        case Scheme.SENSE_ACT:
            return SenseActQueue(num_rows=num, max_age_s=age_s)
        case Scheme.LEROBOT:
            return LeRobotQueue(chunk_rows=num, max_age_s=age_s)
