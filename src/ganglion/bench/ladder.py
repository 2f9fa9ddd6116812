"""Bench ladder: what each quality costs and loses, measured offline; the server's quality ladder is read from the result.

Called by `ganglion bench ladder`. A rung is a number of flow steps. For each: success in closed loop in lockstep (the world
waits, so a busy machine changes nothing), on tasks that stand still and on tasks that move, and milliseconds of a chunk
alone and in a full batch. What the policy does without its gripper view is measured beside it. Resolution is no rung:
the policy's view positions are learned for one size, and it refuses others.
"""

import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ganglion.bench.fleet import Workload
from ganglion.bench.result import BenchResult, Plot
from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, PipelineConfig, PolicyConfig, ServeConfig
from ganglion.errors import GanglionError
from ganglion.layout import PageLayout
from ganglion.models.base import Model, StageBatch
from ganglion.models.registry import load_policy, policy_folder
from ganglion.pipeline.ladder import LEAST_SUCCESS_SHARE, Ladder, Rung
from ganglion.pipeline.local import LocalService
from ganglion.plan.hardware import read_hardware
from ganglion.robots.episode import EpisodePlan, EpisodeResult
from ganglion.robots.fleet import FleetConfig, run_fleet, shared_episodes
from ganglion.robots.loop import LoopConfig, Pace
from ganglion.robots.metaworld import GRIPPER_KEY, TASKS, UNSEEN_SEEDS
from ganglion.robots.moving import MOVING_TASKS
from ganglion.serve.app import ServerThread
from ganglion.service import Outcome
from ganglion.spec import PolicySpec, Stage
from ganglion.types import Float32Array, Observation

FULL_BATCH = 16
NUM_ARMS = 2
MAX_TICKS = 300
NUM_SEEDS, NUM_MOVING_SEEDS = 2, 4  # episodes of each task
GREY = 128


class Blindfolded:
    """A policy that sees grey where one of its views was. Wraps any model."""

    def __init__(self, inner: Model, view_key: str) -> None:
        self._inner, self._view_key = inner, view_key

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
        return self._inner.key(stage, self._grey(observation))

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        rows = tuple(replace(row, observation=self._grey(row.observation)) for row in batch.rows)
        return self._inner.run(stage, replace(batch, rows=rows))

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._inner.emit(pages, observations)

    def _grey(self, observation: Observation) -> Observation:
        grey = np.full_like(observation.images[self._view_key], GREY)
        return replace(observation, images={**observation.images, self._view_key: grey})


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one way of computing a chunk costs and reaches."""

    success: float
    moving_success: float
    alone_ms: float
    full_batch_ms: float
    episodes: int

    @property
    def overall(self) -> float:
        """Mean of the tasks that stand still and those that move."""
        return (self.success + self.moving_success) / 2


def run(*, quick: bool, seed: int) -> BenchResult:
    """Each rung, then the policy without its gripper view."""
    torch.set_num_threads(1)
    dtype = "bfloat16" if "amx_bf16" in read_hardware().flags else "float32"
    model = load_policy(policy_folder(PolicyConfig().path), dtype=dtype)
    most = model.spec.num_flow_steps
    steps = (most, 1) if quick else tuple(range(most, 0, -1))
    qualities = {num: _quality(model, num, seed, is_quick=quick) for num in steps}
    blind = _quality(Blindfolded(model, GRIPPER_KEY), most, seed, is_quick=quick)
    best = max(quality.overall for quality in qualities.values())
    kept = [q for q in qualities.values() if q.overall >= LEAST_SUCCESS_SHARE * best]
    lowest = min(kept, key=lambda quality: quality.full_batch_ms)
    metrics: dict[str, float] = {}
    for num, quality in qualities.items():
        metrics[f"success_rate_{num}_steps"] = quality.success
        metrics[f"moving_success_rate_{num}_steps"] = quality.moving_success
        metrics[f"chunk_{num}_steps_ms"] = quality.alone_ms
        metrics[f"chunk_{num}_steps_full_batch_ms"] = quality.full_batch_ms
    metrics |= {
        "success_rate_without_gripper_view": blind.overall,
        "chunk_without_gripper_view_ms": blind.alone_ms,
        "lowest_rung_success_share": lowest.overall / best if best else 1.0,
        "lowest_rung_speedup": qualities[most].full_batch_ms / lowest.full_batch_ms,
    }
    rungs = [
        {
            "num_flow_steps": num,
            # under load more chunks of one robot at once would be more work
            "max_degree": 0 if num == most else 1,
            "success_rate": quality.overall,
            "chunk_ms": quality.full_batch_ms,
        }
        for num, quality in qualities.items()
    ]
    plot = Plot(
        title="What fewer flow steps lose",
        x_label="flow steps",
        y_label="success rate",
        x=tuple(float(num) for num in sorted(qualities)),
        series={
            "standing goals": tuple(qualities[num].success for num in sorted(qualities)),
            "moving goals": tuple(qualities[num].moving_success for num in sorted(qualities)),
        },
    )
    return BenchResult(
        name="ladder",
        metrics=metrics,
        detail={
            "policy": model.spec.name,
            "model_version": model.spec.version,
            "dtype": model.layouts[0].dtype,
            "rungs": rungs,
            "full_batch": FULL_BATCH,
            "without_gripper_view": {
                "success_rate": blind.success,
                "moving_success_rate": blind.moving_success,
            },
            "note": "Success in lockstep, a chunk every 3 ticks, used one tick after its observation; milliseconds of chunks served in process. "
            "No rung changes the resolution: the policy takes one size of views only.",
        },
        n=sum(quality.episodes for quality in qualities.values()),
        seed=seed,
        plots=(plot,),
    )


def _quality(model: Model, num_flow_steps: int, seed: int, *, is_quick: bool) -> Quality:
    first = UNSEEN_SEEDS[0] + seed
    standing = [f"metaworld:{task}" for task in tuple(TASKS)[: 1 if is_quick else None]]
    moving = [f"metaworld-moving:{task}" for task in MOVING_TASKS[: 1 if is_quick else None]]
    with _service(model, num_flow_steps) as service:
        alone_ms, full_batch_ms = _chunk_ms(service, model, seed, is_quick=is_quick)
        with ServerThread(service, config=ServeConfig(port=0)) as edge:
            max_ticks = 20 if is_quick else MAX_TICKS
            num_standing, num_moving = (1, 1) if is_quick else (NUM_SEEDS, NUM_MOVING_SEEDS)
            stood = _fly(edge.ws_url, standing, range(first, first + num_standing), max_ticks)
            moved = _fly(edge.ws_url, moving, range(first, first + num_moving), max_ticks)
    return Quality(
        success=sum(result.is_success for result in stood) / len(stood),
        moving_success=sum(result.is_success for result in moved) / len(moved),
        alone_ms=alone_ms,
        full_batch_ms=full_batch_ms,
        episodes=len(stood) + len(moved),
    )


@contextmanager
def _service(model: Model, num_flow_steps: int) -> Iterator[LocalService]:
    """A server on this one rung."""
    service = LocalService(
        model,
        engine=EngineConfig(step_budget_us=200_000),
        memory=MemoryConfig(),
        pipeline=PipelineConfig(degree=1),
        ladder=Ladder(rungs=(Rung(num_flow_steps=num_flow_steps, max_degree=1),)),
    )
    with service:
        yield service


def _chunk_ms(
    service: LocalService, model: Model, seed: int, *, is_quick: bool
) -> tuple[float, float]:
    """Milliseconds of a chunk alone and in a full batch: medians over rounds, after one that warms up."""
    workload, rounds = Workload(model, seed), 1 if is_quick else 12
    times: dict[int, list[float]] = {1: [], FULL_BATCH: []}
    for at in range(rounds + 1):
        for num_rows, samples in times.items():
            round_ms = _round_ms(service, workload, num_rows)
            if at:
                samples.append(round_ms / num_rows)
    return statistics.median(times[1]), statistics.median(times[FULL_BATCH])


def _round_ms(service: LocalService, workload: Workload, num_rows: int) -> float:
    """From the submission of one observation of each of `num_rows` sessions to the last chunk."""
    clock, done = RealClock(), threading.Semaphore(0)
    outcomes: list[Outcome] = []

    def on_done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.release()

    observations = [workload.next(row) for row in range(num_rows)]
    start_s = clock.now_s()
    for observation in observations:
        service.submit(observation, on_done)
    for _ in observations:
        done.acquire()
    run_ms = (clock.now_s() - start_s) * 1e3
    for outcome in outcomes:
        if isinstance(outcome, GanglionError):
            raise outcome
    return run_ms


def _fly(
    url: str, worlds: Sequence[str], seeds: Sequence[int], max_ticks: int
) -> tuple[EpisodeResult, ...]:
    plans = [EpisodePlan(world=world, seed=seed) for seed in seeds for world in worlds]
    config = FleetConfig(
        url=url,
        robots=tuple(f"arm-{at}" for at in range(NUM_ARMS)),
        loop=LoopConfig(pace=Pace.LOCKSTEP, max_ticks=max_ticks),
    )
    result = run_fleet(config, shared_episodes(plans))
    if result.failures or len(result.episodes) != len(plans):
        reasons = "; ".join(f"{robot.robot_id}: {robot.failure}" for robot in result.failures)
        raise GanglionError(
            f"{len(result.episodes)} of {len(plans)} episodes ended ({reasons or 'no reason given'})",
            next_step="run `ganglion doctor`",
        )
    return result.episodes
