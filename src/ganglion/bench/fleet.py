"""Bench fleet: chunks per second at 1 to 64 sessions, against serving the same requests one by one.

Called by `ganglion bench fleet`. Knows the service and the bare model; sockets and simulators are left out, since
`bench wire` and `bench control` measure them.
"""

import itertools
import statistics
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ganglion.bench.baselines.bare import BareModel
from ganglion.bench.result import BenchResult, Plot
from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, PolicyConfig
from ganglion.errors import GanglionError
from ganglion.models.base import Model
from ganglion.models.registry import load_policy, policy_folder
from ganglion.pipeline.local import LocalService
from ganglion.plan.hardware import read_hardware
from ganglion.service import Outcome
from ganglion.types import Observation, RobotId, SessionId

NUM_SESSIONS = (1, 4, 16, 64)
PROMPTS = ("open the drawer", "close the drawer", "push the puck to the goal", "close the door")


class Workload:
    """Observations that no cache has seen: fresh noise images, a few instructions."""

    def __init__(self, model: Model, seed: int) -> None:
        self._spec, self._rng = model.spec, np.random.default_rng(seed)
        self._count = itertools.count()
        self._images = {
            view.key: self._rng.integers(0, 256, (64, view.height, view.width, 3), dtype=np.uint8)
            for view in model.spec.views
        }

    def next(self, session: int) -> Observation:
        """The session's next observation; every image differs in at least its first pixels."""
        at = next(self._count)
        images = {key: stack[at % len(stack)].copy() for key, stack in self._images.items()}
        for image in images.values():
            image.reshape(-1)[:8] = np.frombuffer(at.to_bytes(8, "little"), dtype=np.uint8)
        return Observation(
            session_id=SessionId(f"arm-{session}"),
            robot_id=RobotId(f"arm-{session}"),
            seq=at,
            images=images,
            state=self._rng.standard_normal(self._spec.state_dim).astype(np.float32) * 0.1,
            prompt=PROMPTS[session % len(PROMPTS)],
            deadline_ms=60_000.0,
        )


def run(*, quick: bool, seed: int) -> BenchResult:
    """Medians over interleaved rounds; every side gets its best split of the cores."""
    hardware = read_hardware()
    dtype = "bfloat16" if "amx_bf16" in hardware.flags else "float32"
    model = load_policy(policy_folder(PolicyConfig().path), dtype=dtype)
    workload, bare = Workload(model, seed), BareModel(model)
    cores = hardware.cores
    thread_counts = sorted({1, len(cores)})
    lane_choices = {"one lane": (tuple(cores),), "a lane a core": tuple((core,) for core in cores)}
    num_rounds, window_s = (2, 1.0) if quick else (5, 3.0)
    rates: dict[tuple[str, int], list[float]] = {}
    services = {name: _service(model, lanes) for name, lanes in lane_choices.items()}
    try:
        for _ in range(num_rounds):
            for num_rows in NUM_SESSIONS:
                for threads in thread_counts:
                    torch.set_num_threads(threads)
                    rate = _bare_rate(bare, workload, num_rows, window_s)
                    rates.setdefault((f"bare, {threads} threads", num_rows), []).append(rate)
                torch.set_num_threads(1)
                for name, service in services.items():
                    rate = _served_rate(service, workload, num_rows, window_s)
                    rates.setdefault((f"served, {name}", num_rows), []).append(rate)
    finally:
        for service in services.values():
            service.close()
    medians = {key: statistics.median(samples) for key, samples in rates.items()}

    def best(prefix: str, num_rows: int) -> float:
        return max(
            rate for (n, rows), rate in medians.items() if n.startswith(prefix) and rows == num_rows
        )

    one_by_one = best("bare", 1)
    metrics = {"one_by_one_chunks_per_s": one_by_one}
    for num_rows in NUM_SESSIONS:
        served, bound = best("served", num_rows), best("bare", num_rows)
        metrics[f"served_{num_rows}_sessions_chunks_per_s"] = served
        metrics[f"bare_{num_rows}_rows_chunks_per_s"] = bound
        metrics[f"speedup_{num_rows}_sessions"] = served / one_by_one
        metrics[f"bare_speedup_{num_rows}_rows"] = bound / one_by_one
        metrics[f"share_of_bare_gain_{num_rows}"] = served / bound
    metrics["share_of_bare_gain"] = metrics["share_of_bare_gain_16"]
    plot = Plot(
        title="Chunks per second",
        x_label="sessions",
        y_label="chunks/s",
        x=tuple(float(n) for n in NUM_SESSIONS),
        series={
            "served": tuple(best("served", n) for n in NUM_SESSIONS),
            "bare model, batched": tuple(best("bare", n) for n in NUM_SESSIONS),
            "one by one": tuple(one_by_one for _ in NUM_SESSIONS),
        },
        is_log_x=True,
    )
    return BenchResult(
        name="fleet",
        metrics=metrics,
        detail={
            "dtype": model.layouts[0].dtype,
            "num_flow_steps": model.spec.num_flow_steps,
            "rounds": num_rounds,
            "window_s": window_s,
            "chunks_per_s": {f"{name}, {n} rows": rates[name, n] for name, n in rates},
            "baseline": "the same model without engine or pages, one request at a time",
        },
        n=num_rounds,
        seed=seed,
        plots=(plot,),
    )


def _service(model: Model, lanes: Sequence[Sequence[int]]) -> LocalService:
    engine = EngineConfig(
        lanes=tuple(tuple(lane) for lane in lanes), step_budget_us=200_000, max_rows=64
    )
    service = LocalService(model, engine=engine, memory=MemoryConfig())
    service.start()
    return service


def _bare_rate(bare: BareModel, workload: Workload, num_rows: int, window_s: float) -> float:
    clock = RealClock()
    bare.infer([workload.next(row) for row in range(num_rows)])
    start_s, num_chunks = clock.now_s(), 0
    while (run_s := clock.now_s() - start_s) < window_s:
        bare.infer([workload.next(row) for row in range(num_rows)])
        num_chunks += num_rows
    return num_chunks / run_s


def _served_rate(
    service: LocalService, workload: Workload, num_sessions: int, window_s: float
) -> float:
    """Every session sends its next observation as soon as its chunk is there."""
    clock, lock, idle = RealClock(), threading.Lock(), threading.Semaphore(0)
    done_s: list[float] = []
    errors: list[GanglionError] = []
    end_s = clock.now_s() + window_s * 1.2

    def sender(session: int) -> Callable[[Outcome], None]:
        def on_done(outcome: Outcome) -> None:
            now_s = clock.now_s()
            with lock:
                done_s.append(now_s)
                if isinstance(outcome, GanglionError):
                    errors.append(outcome)
            if now_s < end_s and not errors:
                service.submit(workload.next(session), on_done)
            else:
                idle.release()

        return on_done

    for session in range(num_sessions):
        service.submit(workload.next(session), sender(session))
    for _ in range(num_sessions):
        idle.acquire()
    if errors:
        raise errors[0]
    start_s = end_s - window_s  # the first fifth warms the batch up
    counted = [at for at in done_s if start_s <= at < end_s]
    return len(counted) / window_s
