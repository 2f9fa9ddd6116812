"""Bench pipeline: what overlapping the chunks of one robot brings, against sense-infer-act and uncontrolled threads.

Called by `ganglion bench pipeline`. The policy is the large one, whose inference spans several control ticks, as it does
for real VLAs. Rate, jitter and age are measured in real time (`bench.stream`); success on the moving world in
co-simulation (`bench.cosim`), each way of serving charged what its stages took here, in the same run.
"""

import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from ganglion.bench.baselines.bare import BareModel
from ganglion.bench.cosim import Cosim, CostTable, Flight, FlightResult
from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.stream import (
    Frames,
    Stream,
    merged,
    sense_infer_act,
    served,
    uncontrolled,
)
from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, PipelineConfig
from ganglion.models.base import Model, StageBatch
from ganglion.models.registry import load_policy, policy_folder
from ganglion.pipeline.local import LocalService
from ganglion.plan.hardware import read_hardware
from ganglion.robots.catalog import open_arm
from ganglion.robots.metaworld import UNSEEN_SEEDS
from ganglion.types import CloseSession, Execution, Observation, RobotId, Row, SessionId, SpanKind

LARGE, SMALL = (
    "metaworld-ten-large",
    "metaworld-ten",
)  # the same function, one in ten times the work
RATE_HZ = 80.0  # Meta-World's own
DEGREES = (1, 2, 3, 4, 5, 6)
WARM_STARTS = (0.4, 0.6, 0.8)
NUM_THREADS = (2, 3)  # loops of B2
ROWS = (1, 2, 3, 4, 5, 6)
NUM_FLOW_STEPS = 5  # of the shipped policy
LANES = {"one lane": ((0, 1),), "a lane a core": ((0,), (1,))}
TASKS = ("push", "drawer-open", "button-press-topdown", "window-open")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to serve: its name in the results, and the pipeline's switches."""

    name: str
    pipeline: PipelineConfig
    execution: Execution = Execution.NAIVE


def ways() -> tuple[Way, ...]:
    """Sense-infer-act, degrees with the public and the private context, warm starts."""
    found = [Way(name="B0", pipeline=PipelineConfig(degree=1, context="private"))]
    for context in ("public", "private"):
        for degree in DEGREES:
            pipeline = PipelineConfig(degree=degree, context=context)
            found.append(Way(name=f"n={degree} {context}", pipeline=pipeline))
    for share in WARM_STARTS:
        for degree in (1, 2, 3):
            pipeline = PipelineConfig(degree=degree, warm_start=share)
            found.append(Way(name=f"n={degree} public, warm start {share:g}", pipeline=pipeline))
    return tuple(found)


def run(*, quick: bool, seed: int) -> BenchResult:
    """Interleaved rounds in real time, then episodes in co-simulation."""
    dtype = "bfloat16" if read_hardware().has_fast_bf16 else "float32"
    model = load_policy(policy_folder(LARGE), dtype=dtype)
    frames = Frames(model, rate_hz=RATE_HZ, seed=seed, world="metaworld:push")
    bare = BareModel(model)
    num_rounds, run_s = (1, 1.5) if quick else (3, 3.0)
    chosen = ways()[:3] if quick else ways()
    streams: dict[str, list[Stream]] = {}
    for _ in range(num_rounds):
        for threads in (1, 2):
            stream = sense_infer_act(bare, frames, run_s=run_s, num_threads=threads)
            streams.setdefault(f"B0, {threads} threads", []).append(stream)
        for loops in NUM_THREADS:
            stream = uncontrolled(bare, frames, run_s=run_s, num_loops=loops, num_threads=1)
            streams.setdefault(f"B2, {loops} loops", []).append(stream)
        for way in chosen[1:]:
            for name, lanes in LANES.items():
                stream = stream_of(model, frames, way, lanes, run_s=run_s)
                streams.setdefault(f"{way.name}, {name}", []).append(stream)
    rates = {
        name: statistics.median(s.decisions_per_s for s in group) for name, group in streams.items()
    }
    b0 = max(("B0, 1 threads", "B0, 2 threads"), key=rates.__getitem__)
    torch.set_num_threads(1 if b0 == "B0, 1 threads" else 2)
    table = measured_costs(model, frames, num_rounds=2 if quick else 15)
    tables = {lanes: with_overheads(table, model, rates, b0, lanes) for lanes in LANES}
    best = {way.name: best_lanes(way.name, rates) for way in chosen[1:]}
    success = fly_all(chosen, best, table, tables, dtype, seeds=1 if quick else 6, quick=quick)
    return _result(model, streams, rates, b0, table, success, chosen, seed=seed, dtype=dtype)


def best_lanes(way: str, rates: Mapping[str, float]) -> str:
    """The split of the cores that serves it best."""
    return max(LANES, key=lambda lanes: rates[f"{way}, {lanes}"])


def with_overheads(
    table: CostTable, model: Model, rates: Mapping[str, float], b0: str, lanes: str
) -> CostTable:
    """What two busy cores take from each other, and what n = 1 takes over the bare stages."""
    contention = max(1.0, 2 * rates[b0] / rates["B2, 2 loops"])
    alone_us = alone_us_of(model, table)
    if len(LANES[lanes]) > 1:  # the views beside each other
        encode_us = _encode_us(model, table)
        alone_us += contention * max(encode_us) - sum(encode_us)
    served_us = 1e6 / rates[f"{ways()[1].name}, {lanes}"]
    num_steps = -(-alone_us // EngineConfig().step_budget_us)
    step_us = max(0.0, served_us - alone_us) / num_steps
    return replace(table, step_us=step_us, contention=contention)


def stream_of(
    model: Model,
    frames: Frames,
    way: Way,
    lanes: tuple[tuple[int, ...], ...],
    *,
    run_s: float,
) -> Stream:
    """One stretch of real time through a server of its own; its first half second is not counted."""
    torch.set_num_threads(1)
    service = LocalService(
        model,
        engine=EngineConfig(lanes=lanes),
        memory=MemoryConfig(),
        pipeline=way.pipeline,
    )
    fly = partial(served, service, frames, execution=way.execution, delay_ticks=8)
    with service:
        fly(run_s=0.5)
        service.control(CloseSession(session_id=SessionId("stream"), robot_id=RobotId("stream")))
        return fly(run_s=run_s)


def measured_costs(model: Model, frames: Frames, *, num_rounds: int) -> CostTable:
    """Medians of every stage alone, by rows, with the torch threads that are set."""
    clock = RealClock()
    unit_us: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        for num_rows in ROWS:
            rows = tuple(frames.at(at) for at in range(num_rows))
            for name, samples in _stage_samples(model, rows, num_rounds, clock).items():
                unit_us.setdefault(name, {})[num_rows] = statistics.median(samples)
    return CostTable(unit_us=unit_us, step_us=0.0)


def _stage_samples(
    model: Model, observations: Sequence[Observation], num_rounds: int, clock: RealClock
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    rows = tuple(Row(observation=seen, first_unit=0, is_new=True) for seen in observations)
    for _ in range(num_rounds + 1):
        outputs: dict[str, torch.Tensor] = {}
        for stage in model.stages:
            reads = {name: outputs[name] for name in stage.reads}
            if stage.is_divisible:
                layout = next(x for x in model.layouts if x.name == stage.layout)
                reads[stage.name] = torch.zeros(len(rows), stage.num_pages, *layout.shape)
            num_units = 1 if stage.is_divisible else stage.num_units
            start_s = clock.now_s()
            outputs[stage.name] = model.run(
                stage, StageBatch(rows=rows, reads=reads, num_units=num_units)
            )
            samples.setdefault(stage.name, []).append((clock.now_s() - start_s) * 1e6 / num_units)
    return {name: values[1:] for name, values in samples.items()}


# --- success -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Episodes of one task under one way, for a worker process."""

    way: Way
    table: CostTable
    num_lanes: int
    policy: str
    dtype: str
    task: str
    seeds: tuple[int, ...]
    max_ticks: int


def fly_all(
    chosen: Sequence[Way],
    lanes_of: Mapping[str, str],
    bare: CostTable,
    tables: Mapping[str, CostTable],
    dtype: str,
    *,
    seeds: int,
    quick: bool,
    policy: str = SMALL,
) -> dict[str, list[FlightResult]]:
    """Episodes of the moving tasks by way, `policy` computing; two worker processes.

    Degrees that keep the same number of chunks under way fly the same episodes: once is enough.
    """
    tasks = TASKS[:1] if quick else TASKS
    twins = {way.name: _first_alike(way, chosen, lanes_of) for way in chosen}
    orders = [
        Order(
            way=way,
            table=tables[lanes_of[way.name]] if way.name in lanes_of else bare,
            num_lanes=len(LANES[lanes_of[way.name]]) if way.name in lanes_of else 1,
            policy=policy,
            dtype=dtype,
            task=task,
            seeds=tuple(UNSEEN_SEEDS)[:seeds],
            max_ticks=40 if quick else 500,
        )
        for task in tasks
        for way in chosen
        if twins[way.name] == way.name
    ]
    results: dict[str, list[FlightResult]] = {way.name: [] for way in chosen}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name, flights in tqdm(pool.imap_unordered(fly, orders), "episodes", len(orders)):
            results[name] += flights
    return {name: results[twin] for name, twin in twins.items()}


def _first_alike(way: Way, chosen: Sequence[Way], lanes_of: Mapping[str, str]) -> str:
    """The first way that launches its chunks just as this one does."""

    def alike(other: Way) -> tuple[object, ...]:
        pipeline, lanes = other.pipeline, lanes_of[other.name]
        steps = NUM_FLOW_STEPS - round(pipeline.warm_start * NUM_FLOW_STEPS)
        is_overlapped = pipeline.degree > steps and len(LANES[lanes]) > 1
        between = -(-steps // pipeline.degree)
        launches = (is_overlapped, between, -(-steps // between))
        return (*launches, pipeline.context, pipeline.warm_start, lanes)

    if way is chosen[0]:
        return way.name
    return next(other.name for other in chosen[1:] if alike(other) == alike(way))


def fly(order: Order) -> tuple[str, list[FlightResult]]:
    """Run in a worker."""
    torch.set_num_threads(1)
    model = load_policy(policy_folder(order.policy), dtype=order.dtype)
    flight = Flight(
        pipeline=order.way.pipeline,
        execution=order.way.execution,
        rate_hz=RATE_HZ,
        max_ticks=order.max_ticks,
        num_lanes=order.num_lanes,
    )
    arm = open_arm(f"metaworld-moving:{order.task}")
    try:
        cosim = Cosim(model, order.table, flight)
        return order.way.name, [cosim.fly(arm, at) for at in order.seeds]
    finally:
        arm.world.close()


def success_of(flights: Sequence[FlightResult]) -> float:
    """Share of solved episodes."""
    return sum(flight.success_tick is not None for flight in flights) / len(flights)


# --- figures -------------------------------------------------------------------------------------------------------


def _result(
    model: Model,
    streams: dict[str, list[Stream]],
    rates: dict[str, float],
    b0: str,
    table: CostTable,
    success: dict[str, list[FlightResult]],
    chosen: Sequence[Way],
    *,
    seed: int,
    dtype: str,
) -> BenchResult:
    def best_lane(way: str) -> str:
        return f"{way}, {best_lanes(way, rates)}"

    def age_p99(name: str) -> float:
        return float(np.percentile(merged(streams[name], Stream.ages_ms), 99))

    solved = {name: success_of(flights) for name, flights in success.items()}
    plain = [way for way in chosen[1:] if way.pipeline.context == "public"]
    good = [way for way in plain if solved[way.name] >= solved["B0"]] or plain
    best = max(good, key=lambda way: rates[best_lane(way.name)])
    best_stream = best_lane(best.name)
    b2 = max((name for name in streams if name.startswith("B2")), key=rates.__getitem__)
    bound = bound_of(model, table, best.pipeline)
    metrics = {
        "b0_decisions_per_s": rates[b0],
        "decisions_per_s": rates[best_stream],
        "rate_ratio": rates[best_stream] / rates[b0],
        "bound_rate_ratio": bound,
        "share_of_bound": rates[best_stream] / rates[b0] / bound,
        "success_ratio": solved[best.name] / max(solved["B0"], 1e-9),
        "b0_success": solved["B0"],
        "success": solved[best.name],
        "jitter": statistics.median(s.jitter for s in streams[best_stream]),
        "jitter_threads": statistics.median(s.jitter for s in streams[b2]),
        "age_p99_ms": age_p99(best_stream),
        "b0_age_p99_ms": age_p99(b0),
        "age_p99_ratio": age_p99(best_stream) / age_p99(b0),
    }
    for way in chosen[1:]:
        key = way.name.replace("n=", "n").replace(",", "").replace(" ", "_").replace(".", "")
        metrics[f"{key}_rate_ratio"] = rates[best_lane(way.name)] / rates[b0]
        metrics[f"{key}_success"] = solved[way.name]
    degrees = sorted({way.pipeline.degree for way in plain if not way.pipeline.warm_start})
    plots = (
        Plot(
            title="Decisions per second of one robot",
            x_label="degree n",
            y_label="decisions/s",
            x=tuple(float(n) for n in degrees),
            series={
                "public context": tuple(rates[best_lane(f"n={n} public")] for n in degrees),
                "sense-infer-act": tuple(rates[b0] for _ in degrees),
            },
        ),
        Plot(
            title="Success on moving goals",
            x_label="degree n",
            y_label="success rate",
            x=tuple(float(n) for n in degrees),
            series={
                context: tuple(solved.get(f"n={n} {context}", 0.0) for n in degrees)
                for context in ("public", "private")
            }
            | {"sense-infer-act": tuple(solved["B0"] for _ in degrees)},
        ),
    )
    return BenchResult(
        name="pipeline",
        metrics=metrics,
        detail={
            "policy": LARGE,
            "dtype": dtype,
            "rate_hz": RATE_HZ,
            "best": best_stream,
            "best_b0": b0,
            "best_b2": b2,
            "execution": best.execution.value,
            "decisions_per_s": rates,
            "jitter": {n: statistics.median(s.jitter for s in g) for n, g in streams.items()},
            "age_p99_ms": {name: age_p99(name) for name in streams},
            "success": solved,
            "ticks_to_success": {
                name: statistics.median(f.success_tick for f in flights if f.success_tick)
                if any(f.success_tick for f in flights)
                else None
                for name, flights in success.items()
            },
            "stage_unit_us": {name: dict(rows) for name, rows in table.unit_us.items()},
            "tasks": list(TASKS),
            "note": "Success: co-simulation on metaworld-moving, unseen seeds, the small policy computing, the large "
            "one's measured stage times charged; both compute the same function. Bound: L_B0 / max(t_p, K t_g(n) / n) with "
            "the best way's K and n. B0: the bare model without engine, its best number of torch threads.",
        },
        n=sum(len(flights) for flights in success.values()),
        seed=seed,
        plots=plots,
    )


def bound_of(model: Model, table: CostTable, pipeline: PipelineConfig) -> float:
    """L_B0 / max(t_p, K t_g(n) / n): as if perception and generation ran beside each other for nothing."""
    generate = model.stages[-1]
    steps = generate.num_units - round(pipeline.warm_start * generate.num_units)
    depth = min(pipeline.degree, steps)
    perceive_us = perceive_us_of(model, table)
    step_us = table.piece_us(generate.name, num_rows=depth, num_units=steps) / depth
    return alone_us_of(model, table) / max(perceive_us, step_us)


def perceive_us_of(model: Model, table: CostTable) -> float:
    """t_p: the stages before the last, but for the instruction, which is known."""
    return sum(
        table.piece_us(stage.name, num_rows=1, num_units=stage.num_units)
        for stage in model.stages[:-1]
        if not (stage.is_shared and stage.kind is SpanKind.PREFILL)
    )


def _encode_us(model: Model, table: CostTable) -> list[float]:
    """Of each view."""
    return [
        table.piece_us(stage.name, num_rows=1, num_units=stage.num_units)
        for stage in model.stages
        if stage.kind is SpanKind.ENCODE
    ]


def alone_us_of(model: Model, table: CostTable) -> float:
    """L: one observation after the other."""
    generate = model.stages[-1]
    return perceive_us_of(model, table) + table.piece_us(
        generate.name, num_rows=1, num_units=generate.num_units
    )
