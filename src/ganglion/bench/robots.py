"""Bench robots: how many robots one server keeps supplied, against serving them as others do, on the same machine.

Called by `ganglion bench robots`. The fleets are recorded (`bench.replay`); up to eight arms are simulated too, for
success. A miss is a control tick without an action whose observation is at most 250 ms old, as in `bench control`. The largest fleet is
the largest one measured with less than 1 % of its ticks missed, out of fixed sizes.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ganglion.bench.baselines.bare import BareModel
from ganglion.bench.baselines.threads import ThreadsService
from ganglion.bench.replay import FleetReport, ReplayConfig, Scheme, Tape, replay
from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, PolicyConfig, ServeConfig
from ganglion.errors import GanglionError
from ganglion.models.base import Model
from ganglion.models.registry import load_policy, policy_folder
from ganglion.pipeline.ladder import Ladder, Rung, read_ladder
from ganglion.pipeline.local import LocalService
from ganglion.plan.hardware import read_hardware
from ganglion.robots.episode import EpisodePlan
from ganglion.robots.fleet import FleetConfig, run_fleet, shared_episodes
from ganglion.robots.loop import LoopConfig
from ganglion.robots.metaworld import STATE_KEY, TASKS, UNSEEN_SEEDS, VIEW_KEYS, MetaWorld
from ganglion.serve.app import ServerThread
from ganglion.service import Service
from ganglion.types import Float32Array, Observation, RobotId, SessionId

RATE_HZ = 20.0
RECORDED_TICKS = 3  # between two recorded observations
MAX_MISS_RATE = 0.01
SIZES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96)
TAPE_TASKS = ("drawer-open", "push", "button-press-topdown", "door-close")
LADDER_STEPS = (5, 3, 2, 1)  # while `bench ladder` has not measured this policy yet
LADDER = Path("docs/results/ladder.json")
NUM_SUCCESS_ARMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to serve and to ask: a server to open, and how its robots behave."""

    name: str
    serve: Callable[[], Service]  # a context manager too
    scheme: Scheme
    interval_ticks: int


@dataclass(slots=True)
class Curve:
    """What was measured of one side, by fleet size."""

    reports: dict[int, FleetReport] = field(default_factory=dict)

    @property
    def max_robots(self) -> int:
        """The largest measured fleet with few misses; 0 when even the smallest misses."""
        good = [size for size, report in self.reports.items() if report.miss_rate < MAX_MISS_RATE]
        return max(good, default=0)


class Stage:
    """Opens servers and runs fleets against them; keeps what it measured."""

    def __init__(self, tape: Path, *, is_quick: bool, seed: int) -> None:
        self._tape, self._seed = tape, seed
        self._warm_s, self._run_s = (0.4, 1.0) if is_quick else (2.0, 4.0)
        self.curves: dict[str, Curve] = {}

    def measure(self, side: Side, size: int, url: str) -> FleetReport:
        """One fleet; a size that was measured before is not measured again."""
        curve = self.curves.setdefault(side.name, Curve())
        if size not in curve.reports:
            curve.reports[size] = replay(
                ReplayConfig(
                    url=url,
                    tape=self._tape,
                    scheme=side.scheme,
                    num_robots=size,
                    interval_ticks=side.interval_ticks,
                    rate_hz=RATE_HZ,
                    warm_s=self._warm_s,
                    run_s=self._run_s,
                    seed=self._seed + size,
                )
            )
        return curve.reports[size]

    def search(self, side: Side, sizes: Sequence[int]) -> int:
        """The largest fleet with few misses: halving, since more robots never miss less."""
        with _edge(side.serve) as url:
            low, high = -1, len(sizes)
            while high - low > 1:
                middle = (low + high) // 2
                report = self.measure(side, sizes[middle], url)
                if report.miss_rate < MAX_MISS_RATE:
                    low = middle
                else:
                    high = middle
        return self.curves[side.name].max_robots

    def sweep(self, side: Side, sizes: Sequence[int]) -> None:
        """Measure all `sizes` that are not measured yet."""
        if not set(sizes) - self.curves.setdefault(side.name, Curve()).reports.keys():
            return
        with _edge(side.serve) as url:
            for size in sizes:
                self.measure(side, size, url)


def run(*, quick: bool, seed: int) -> BenchResult:
    """Search the largest fleet of every side, then the curves of the best ones, then success with simulated arms."""
    torch.set_num_threads(1)
    dtype = "bfloat16" if "amx_bf16" in read_hardware().flags else "float32"
    model = load_policy(policy_folder(PolicyConfig().path), dtype=dtype)
    sizes = (2,) if quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        tape = Path(folder) / "tape.npz"
        record(model, TAPE_TASKS[:1] if quick else TAPE_TASKS, 4 if quick else 24, seed).save(tape)
        stage = Stage(tape, is_quick=quick, seed=seed)
        threads = _best_threads(model, tape, window_s=0.2 if quick else 1.0)
        sides = _sides(model, threads, is_quick=quick)
        largest = {side.name: stage.search(side, sizes) for side in sides}
        by_kind = {
            kind: max(
                (side for side in sides if side.name.startswith(kind)),
                key=lambda side: largest[side.name],
            )
            for kind in ("ganglion", "full quality", "sense-infer-act", "LeRobot")
        }
        plotted = (2,) if quick else (1, 8, 16, 32, 64)
        for side in by_kind.values():
            stage.sweep(side, plotted)
        success = _success(by_kind["ganglion"], seed, is_quick=quick)
    best = {kind: stage.curves[side.name] for kind, side in by_kind.items()}
    return _result(best, by_kind, stage, plotted, success, seed, model, threads)


def _result(
    best: dict[str, Curve],
    by_kind: dict[str, Side],
    stage: Stage,
    plotted: Sequence[int],
    success: dict[str, float],
    seed: int,
    model: Model,
    threads: int,
) -> BenchResult:
    ours, b0, b1 = best["ganglion"], best["sense-infer-act"], best["LeRobot"]
    strongest = max(b0.max_robots, b1.max_robots)
    at_most = ours.reports[max(ours.max_robots, min(ours.reports))]
    at_most_b0 = b0.reports[max(b0.max_robots, min(b0.reports))]
    waits, waits_b0 = at_most.wait_ratios, at_most_b0.wait_ratios
    late_ticks = sum(robot.num_late_ticks for robot in at_most_b0.robots)
    every_tick = at_most_b0.config.rate_hz * (at_most_b0.config.warm_s + at_most_b0.config.run_s)
    metrics = {
        "max_robots": float(ours.max_robots),
        "max_robots_full_quality": float(best["full quality"].max_robots),
        "sense_act_max_robots": float(b0.max_robots),
        "lerobot_max_robots": float(b1.max_robots),
        # a baseline that keeps not even one robot supplied counts as one
        "fleet_ratio": ours.max_robots / max(1, strongest),
        "fleet_ratio_sense_act": ours.max_robots / max(1, b0.max_robots),
        "fleet_ratio_lerobot": ours.max_robots / max(1, b1.max_robots),
        "miss_rate_at_max": at_most.miss_rate,
        "wait_ratio_p50": float(np.percentile(waits, 50)),
        "wait_ratio_p99": float(np.percentile(waits, 99)),
        # of ticks at whose begin the action was not there: misses, did its robots not get the tick's whole length
        "sense_act_late_tick_rate": late_ticks / (every_tick * len(at_most_b0.robots)),
        "sense_act_wait_ratio_p50": float(np.percentile(waits_b0, 50)),
        "sense_act_wait_ratio_p99": float(np.percentile(waits_b0, 99)),
        **percentiles(at_most.samples("latencies_ms") or [0.0], prefix="latency_at_max_{}_ms"),
        **success,
    }
    plot = Plot(
        title="Control ticks without a fresh action",
        x_label="robots",
        y_label="miss rate",
        x=tuple(float(size) for size in plotted),
        series={
            by_kind[kind].name: tuple(curve.reports[size].miss_rate for size in plotted)
            for kind, curve in best.items()
        },
        is_log_x=True,
    )
    return BenchResult(
        name="robots",
        metrics=metrics,
        detail={
            "policy": model.spec.name,
            "model_version": model.spec.version,
            "dtype": model.layouts[0].dtype,
            "rate_hz": RATE_HZ,
            "max_miss_rate": MAX_MISS_RATE,
            "ladder": [rung.name for rung in _ladder(model).rungs],
            "is_ladder_measured": LADDER.is_file(),
            "best_threads_of_the_bare_model": threads,
            "chosen": {kind: side.name for kind, side in by_kind.items()},
            "sides": {name: _curve_detail(curve) for name, curve in stage.curves.items()},
            "note": "Robots replay recorded observations in real time over the real wire, in a process of their own on the "
            "same cores. Each side gets its best way of asking and its best number of threads. A robot of sense-infer-act may take "
            "its action until the end of the tick in which it asked. fleet_ratio is against the better of the two baselines.",
        },
        n=sum(len(curve.reports) for curve in stage.curves.values()),
        seed=seed,
        plots=(plot,),
    )


def _curve_detail(curve: Curve) -> dict[str, object]:
    return {
        str(size): {
            "miss_rate": round(report.miss_rate, 5),
            "wait_ratio_p99": round(float(np.percentile(report.wait_ratios, 99)), 4),
            "latency_p50_ms": _percentile(report.samples("latencies_ms"), 50),
            "latency_p99_ms": _percentile(report.samples("latencies_ms"), 99),
            "client_lateness_p99_ms": _percentile(report.samples("lateness_ms"), 99),
            "chunks_per_s": round(
                sum(robot.num_chunks for robot in report.robots) / report.config.run_s, 1
            ),
            "errors": _errors(report),
        }
        for size, report in sorted(curve.reports.items())
    }


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return round(float(np.percentile(values, percent)), 2) if values else None


def _errors(report: FleetReport) -> dict[str, int]:
    counts: dict[str, int] = {}
    for robot in report.robots:
        for code, count in robot.errors.items():
            counts[code] = counts.get(code, 0) + count
    return counts


# --- sides -----------------------------------------------------------------------------------------------------


def _sides(model: Model, threads: int, *, is_quick: bool) -> list[Side]:
    cores = read_hardware().cores
    lanes = {"one thread": ((),), f"{len(cores)} threads": (tuple(cores),)}
    ladder = _ladder(model)

    def ours(split: tuple[tuple[int, ...], ...], rungs: Ladder | None) -> Callable[[], Service]:
        return lambda: LocalService(
            model, engine=EngineConfig(lanes=split), memory=MemoryConfig(), ladder=rungs
        )

    def one_by_one() -> Service:
        return ThreadsService(model, threads_each=threads)

    def newest(name: str, serve: Callable[[], Service], interval: int) -> Side:
        return Side(
            name=f"{name}, an observation every {interval} ticks",
            serve=serve,
            scheme=Scheme.NEWEST,
            interval_ticks=interval,
        )

    splits = list(itertools.islice(lanes.items(), 1 if is_quick else None))
    own = [
        newest(f"{kind}, {name}", ours(split, rungs), 4)
        for name, split in splits
        for kind, rungs in (("ganglion", ladder), ("full quality", None))
    ]
    if not is_quick:
        name, split = splits[0]
        own.append(newest(f"ganglion, {name}", ours(split, ladder), 3))
    sense_act = [
        Side(
            name=f"sense-infer-act, {rows} rows a chunk",
            serve=one_by_one,
            scheme=Scheme.SENSE_ACT,
            interval_ticks=rows,
        )
        for rows in ((5,) if is_quick else (4, 5))
    ]
    lerobot = [
        Side(
            name=f"LeRobot asynchronous, {rows} actions a chunk",
            serve=one_by_one,
            scheme=Scheme.LEROBOT,
            interval_ticks=rows,
        )
        for rows in ((5,) if is_quick else (4, 5))
    ]
    return [*own, *sense_act, *lerobot]


def _ladder(model: Model) -> Ladder:
    """What `bench ladder` measured of this policy, else fixed rungs."""
    if LADDER.is_file():
        return read_ladder(LADDER, model.spec)
    most = model.spec.num_flow_steps
    return Ladder(
        rungs=tuple(Rung(num_flow_steps=steps) for steps in LADDER_STEPS if steps <= most)
    )


@contextmanager
def _edge(serve: Callable[[], Service]) -> Iterator[str]:
    """The service behind the real edge; its websocket address."""
    with ExitStack() as stack:
        service = serve()
        assert isinstance(service, LocalService | ThreadsService)
        stack.enter_context(service)
        edge = stack.enter_context(ServerThread(service, config=ServeConfig(port=0)))
        yield edge.ws_url


def _best_threads(model: Model, tape: Path, *, window_s: float) -> int:
    """Threads with which the bare model answers one request the fastest."""
    bare, recorded, clock = BareModel(model), Tape.load(tape), RealClock()
    rates = {}
    for threads in sorted({1, len(read_hardware().cores)}):
        torch.set_num_threads(threads)
        end_s, count = clock.now_s() + window_s, 0
        while clock.now_s() < end_s:
            bare.infer([_observation(recorded, count)])
            count += 1
        rates[threads] = count
    torch.set_num_threads(1)
    return max(rates, key=lambda threads: rates[threads])


# --- recording and success ---------------------------------------------------------------------------------------


def record(model: Model, tasks: Sequence[str], num_frames: int, seed: int) -> Tape:
    """What arms under this policy see, every RECORDED_TICKS ticks from an episode's start."""
    bare = BareModel(model)
    images: dict[str, list[np.ndarray]] = {key: [] for key in VIEW_KEYS}
    states: list[Float32Array] = []
    for task in tasks:
        world = MetaWorld(task=task)
        try:
            world.reset(UNSEEN_SEEDS[0] + seed)
            seen = []
            for at in range(num_frames):
                views = world.observe()
                seen.append(views)
                observation = Observation(
                    session_id=SessionId(task),
                    robot_id=RobotId(task),
                    seq=at,
                    images={key: views[key].astype(np.uint8, copy=False) for key in VIEW_KEYS},
                    state=np.asarray(views[STATE_KEY], np.float32),
                    prompt=world.prompt,
                    seed=at,
                )
                for action in bare.infer([observation])[0][:RECORDED_TICKS]:
                    world.apply(action)
        finally:
            world.close()
        for key in VIEW_KEYS:
            images[key].append(np.stack([views[key] for views in seen]).astype(np.uint8))
        states.append(np.stack([np.asarray(views[STATE_KEY], np.float32) for views in seen]))
    return Tape(
        {key: np.stack(stacks) for key, stacks in images.items()},
        np.stack(states),
        [TASKS[task].prompt for task in tasks],
    )


def _observation(tape: Tape, at: int) -> Observation:
    frame, prompt = tape.frame(0, at, STATE_KEY)
    return Observation(
        session_id=SessionId("bare"),
        robot_id=RobotId("bare"),
        seq=at,
        images={key: frame[key] for key in VIEW_KEYS},
        state=frame[STATE_KEY],
        prompt=prompt,
    )


def _success(side: Side, seed: int, *, is_quick: bool) -> dict[str, float]:
    """Simulated arms, rendered here, closed loop in real time."""
    num_arms = 1 if is_quick else NUM_SUCCESS_ARMS
    tasks = tuple(TASKS)[: 1 if is_quick else NUM_SUCCESS_ARMS]
    seeds = range(UNSEEN_SEEDS[0] + seed, UNSEEN_SEEDS[0] + seed + (1 if is_quick else 2))
    plans = [EpisodePlan(world=f"metaworld:{task}", seed=at) for at in seeds for task in tasks]
    with _edge(side.serve) as url:
        config = FleetConfig(
            url=url,
            robots=tuple(f"arm-{at}" for at in range(num_arms)),
            loop=LoopConfig(rate_hz=RATE_HZ, max_ticks=60 if is_quick else 300),
            has_common_start=True,
        )
        result = run_fleet(config, shared_episodes(plans))
    if result.failures or len(result.episodes) != len(plans):
        reasons = "; ".join(f"{robot.robot_id}: {robot.failure}" for robot in result.failures)
        raise GanglionError(
            f"{len(result.episodes)} of {len(plans)} episodes ended ({reasons or 'no reason given'})",
            next_step="run `ganglion doctor`",
        )
    num_ticks = sum(episode.num_ticks for episode in result.episodes)
    return {
        "simulated_arms": float(num_arms),
        "simulated_success_rate": sum(e.is_success for e in result.episodes) / len(plans),
        "simulated_miss_rate": sum(e.num_misses for e in result.episodes) / max(1, num_ticks),
    }
