"""Streams of decisions: one robot's camera frames in real time into a server, and when which chunk came back.

Owns the four ways to serve that the pipeline benches compare, and what is read off a stream: rate, jitter, the age of
the observation behind each action, the reaction to something that changes in the picture. Frames are rendered before;
each is made unique, so that no cache knows it. Called by `bench.pipeline` and `bench.reaction`.

| name | how |
|---|---|
| ours | `LocalService`: chunks overlap, each flow step reads the newest context |
| B0 | sense, infer, act: the bare model, one observation after the other, all cores in one forward |
| B1 | LeRobot's asynchronous inference: a new observation when half of the chunk is used up, 30 chunks/s at most |
| B2 | threads that each sense and infer as they come, on the same cores |
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ganglion.bench.baselines.bare import BareModel
from ganglion.bench.baselines.lerobot import THRESHOLD
from ganglion.clock import RealClock
from ganglion.errors import GanglionError
from ganglion.models.base import Model
from ganglion.pipeline.local import LocalService
from ganglion.robots.catalog import open_arm
from ganglion.service import Outcome
from ganglion.types import ActionChunk, Execution, Observation, RobotId, SessionId

NUM_FRAMES = 64
LEROBOT_PERIOD_S = 1 / 30  # its server answers no faster (inference_latency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A chunk: when the newest observation behind it was taken, and when it was there. Seconds of the stream."""

    obs_s: float
    done_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What came back within `run_s` seconds at a control rate, in the order in which it came."""

    decisions: tuple[Decision, ...]
    run_s: float
    rate_hz: float

    @property
    def decisions_per_s(self) -> float:
        return len(self.decisions) / self.run_s

    @property
    def jitter(self) -> float:
        """Standard deviation of the intervals between chunks, over their mean."""
        gaps = np.diff([decision.done_s for decision in self.decisions])
        return float(gaps.std() / gaps.mean()) if len(gaps) > 1 else 0.0

    def ages_ms(self) -> list[float]:
        """At each control tick: how old the observation behind the newest chunk is; without one, since the start."""
        ages, newest, at = [], 0.0, 0
        for tick in range(int(self.run_s * self.rate_hz)):
            now_s = tick / self.rate_hz
            while at < len(self.decisions) and self.decisions[at].done_s <= now_s:
                newest = max(newest, self.decisions[at].obs_s)
                at += 1
            ages.append((now_s - newest) * 1e3)
        return ages

    def reactions_ms(self, *, num_changes: int, seed: int) -> list[float]:
        """From a change in the picture, at any moment, to the first control tick whose action has seen it.

        What none has seen by the end counts with what it waited until then.
        """
        rng = np.random.default_rng(seed)
        reactions = []
        for change_s in rng.uniform(0.0, self.run_s * 0.8, num_changes):
            done_s = min((d.done_s for d in self.decisions if d.obs_s >= change_s), default=None)
            seen_s = self.run_s
            if done_s is not None:
                seen_s = int(np.ceil(done_s * self.rate_hz)) / self.rate_hz
            reactions.append((seen_s - change_s) * 1e3)
        return reactions


class Frames:
    """A camera: what the arm sees while it moves at random, rendered before, one frame a control tick."""

    def __init__(self, model: Model, *, rate_hz: float, seed: int, world: str) -> None:
        self._model, self.rate_hz = model, rate_hz
        arm = open_arm(world, views={v.key: (v.height, v.width, 3) for v in model.spec.views})
        rng = np.random.default_rng(seed)
        self._frames: list[dict[str, np.ndarray]] = []
        try:
            arm.world.reset(seed)
            self._prompt = arm.world.prompt
            action = rng.uniform(-1, 1, model.spec.action_dim)
            for at in range(NUM_FRAMES):
                if at % 8 == 0:
                    action = rng.uniform(-1, 1, model.spec.action_dim)
                arm.world.apply(action.astype(np.float32))
                self._frames.append(arm.world.observe())
        finally:
            arm.world.close()

    def at(self, tick: int) -> Observation:
        """The observation of control tick `tick`."""
        spec = self._model.spec
        frame = self._frames[tick % NUM_FRAMES]
        images = {view.key: frame[view.key].copy() for view in spec.views}
        for image in images.values():
            image.reshape(-1)[:8] = np.frombuffer(tick.to_bytes(8, "little"), dtype=np.uint8)
        return Observation(
            session_id=SessionId("stream"),
            robot_id=RobotId("stream"),
            seq=tick,
            images=images,
            state=frame[spec.state_key],
            prompt=self._prompt,
            control_hz=self.rate_hz,
            seed=tick,
        )


def served(
    service: LocalService, frames: Frames, *, run_s: float, execution: Execution, delay_ticks: int
) -> Stream:
    """Ours: every tick's frame is offered; the service launches the newest when it is time."""
    clock = RealClock()
    done: list[tuple[int, float]] = []
    errors: list[GanglionError] = []

    def on_done(outcome: Outcome) -> None:
        if isinstance(outcome, ActionChunk):
            done.append((outcome.context_seq, clock.now_s()))
        elif outcome.code not in ("superseded", "cancelled"):
            errors.append(outcome)

    start_s = clock.now_s()
    num_ticks = int(run_s * frames.rate_hz)
    for tick in range(num_ticks):
        clock.sleep_until(start_s + tick / frames.rate_hz)
        observation = replace(
            frames.at(tick),
            execution=execution,
            executed_until=tick,
            inference_delay_hint=delay_ticks,
        )
        service.submit(observation, on_done)
    if errors:
        raise errors[0]
    end_s = start_s + run_s
    return Stream(
        decisions=tuple(
            Decision(obs_s=seq / frames.rate_hz, done_s=done_s - start_s)
            for seq, done_s in list(done)
            if done_s <= end_s
        ),
        run_s=run_s,
        rate_hz=frames.rate_hz,
    )


def sense_infer_act(bare: BareModel, frames: Frames, *, run_s: float, num_threads: int) -> Stream:
    """B0."""
    torch.set_num_threads(num_threads)
    return _loop(bare, frames, run_s=run_s, num_loops=1, next_s=None)


def lerobot(bare: BareModel, frames: Frames, *, run_s: float, num_threads: int) -> Stream:
    """B1. Its similarity filter is off: it compares joint states in degrees, and these are metres."""
    torch.set_num_threads(num_threads)
    horizon_s = bare.spec.horizon / frames.rate_hz

    def next_s(decision: Decision) -> float:
        used_up_s = decision.obs_s + (1 - THRESHOLD) * horizon_s
        return max(used_up_s, decision.done_s)

    return _loop(bare, frames, run_s=run_s, num_loops=1, next_s=next_s, least_s=LEROBOT_PERIOD_S)


def uncontrolled(
    bare: BareModel, frames: Frames, *, run_s: float, num_loops: int, num_threads: int
) -> Stream:
    """B2."""
    torch.set_num_threads(num_threads)
    return _loop(bare, frames, run_s=run_s, num_loops=num_loops, next_s=None)


def _loop(
    bare: BareModel,
    frames: Frames,
    *,
    run_s: float,
    num_loops: int,
    next_s: Callable[[Decision], float] | None,
    least_s: float = 0.0,
) -> Stream:
    """`num_loops` threads that infer on the newest frame, again and again."""
    clock, lock = RealClock(), threading.Lock()
    decisions: list[Decision] = []
    bare.infer([frames.at(0)])
    start_s = clock.now_s()

    def run() -> None:
        while (now_s := clock.now_s() - start_s) < run_s:
            tick = int(now_s * frames.rate_hz)
            bare.infer([frames.at(tick)])
            if least_s:
                clock.sleep_until(start_s + now_s + least_s)
            decision = Decision(obs_s=tick / frames.rate_hz, done_s=clock.now_s() - start_s)
            with lock:
                decisions.append(decision)
            if next_s is not None:
                clock.sleep_until(start_s + next_s(decision))

    threads = [threading.Thread(target=run) for _ in range(num_loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Stream(
        decisions=tuple(d for d in sorted(decisions, key=lambda d: d.done_s) if d.done_s <= run_s),
        run_s=run_s,
        rate_hz=frames.rate_hz,
    )


def merged(streams: Sequence[Stream], figure: Callable[[Stream], list[float]]) -> list[float]:
    """A figure's samples of all rounds."""
    return [sample for stream in streams for sample in figure(stream)]
