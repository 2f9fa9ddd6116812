"""Bench control: four simulated arms under real-time control through the real server and wire, camera to action.

Called by `ganglion bench control`. Measures success, misses, the stages of a request, what the wrong instruction does,
and the latency of one arm alone. The server runs in this process as in `ganglion demo`, each arm in one of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.config import EngineConfig, MemoryConfig, PolicyConfig, ServeConfig
from ganglion.errors import GanglionError
from ganglion.models.registry import load_policy, policy_folder
from ganglion.pipeline.local import LocalService
from ganglion.plan.hardware import read_hardware
from ganglion.robots.episode import EpisodePlan, EpisodeResult
from ganglion.robots.fleet import FleetConfig, run_fleet, shared_episodes
from ganglion.robots.loop import LoopConfig, Pace
from ganglion.robots.metaworld import TASKS, UNSEEN_SEEDS
from ganglion.serve.app import ServerThread

NUM_ARMS = 4
RATE_HZ = 20.0
MISLED_TICKS = 300  # three to five times what a task takes
# stage of EpisodeResult.stages_ms -> how the results call it
STAGES = {
    "render": "robot: render two views",
    "queue": "server: waiting for the first piece",
    "perceive": "server: perceive (encode, prefill)",
    "generate": "server: generate (denoise)",
    "wait": "server: between pieces",
    "infer": "server: submit to chunk",
    "round_trip": "robot: observation sent to chunk received",
    "lateness": "robot: tick behind its time",
}


def run(*, quick: bool, seed: int) -> BenchResult:
    """Every task on unseen seeds in real time, then the wrong instruction, then one arm alone."""
    num_seeds = 2 if quick else len(UNSEEN_SEEDS)
    seeds = range(UNSEEN_SEEDS[0] + seed, UNSEEN_SEEDS[0] + seed + num_seeds)
    tasks = tuple(TASKS)[:3] if quick else tuple(TASKS)
    with _server() as (url, detail):
        own = _fly(url, NUM_ARMS, [_plan(task, at) for at in seeds for task in tasks])
        alone = _fly(url, 1, [_plan(task, seeds[0]) for task in tasks[: 3 if quick else 5]])
        misled = _fly(
            url,
            NUM_ARMS,
            [
                _plan(task, at, prompt=TASKS[opposite].prompt)
                for at in seeds
                for task in tasks
                if (opposite := TASKS[task].opposite) is not None
            ],
            pace=Pace.LOCKSTEP,
            max_ticks=MISLED_TICKS,
        )
    success, wrong = _success_by_task(own), _success_by_task(misled)
    num_ticks = sum(result.num_ticks for result in own)
    latency = percentiles(_samples(alone, "round_trip"), prefix="action_latency_{}_ms")
    metrics = {
        "success_rate": sum(success.values()) / len(success),
        "worst_task_success_rate": min(success.values()),
        "wrong_instruction_success_rate": sum(wrong.values()) / len(wrong),
        "worst_wrong_instruction_success_rate": max(wrong.values()),
        "deadline_miss_rate": sum(result.num_misses for result in own) / num_ticks,
        "hold_rate": sum(result.num_holds for result in own) / num_ticks,
        **percentiles(
            [age for result in own for age in result.ages_ms], prefix="observation_age_{}_ms"
        ),
        **latency,
        **percentiles(_samples(own, "round_trip"), prefix="four_arms_latency_{}_ms"),
        "num_control_ticks": float(num_ticks),
    }
    stages = {
        name: percentiles(_samples(own, stage), prefix="{}") for stage, name in STAGES.items()
    }
    plot = Plot(
        title="Success on unseen seeds, own and opposite instruction",
        x_label="task",
        y_label="success rate",
        names=tuple(success),
        series={
            "own instruction": tuple(success.values()),
            "opposite instruction": tuple(wrong.get(task, 0.0) for task in success),
        },
    )
    return BenchResult(
        name="control",
        metrics=metrics,
        detail={
            **detail,
            "arms": NUM_ARMS,
            "rate_hz": RATE_HZ,
            "note": "20 Hz is a quarter of Meta-World's own 80 Hz. A miss is a control tick without a valid action "
            "whose observation is at most 250 ms old. The wrong instruction is measured in lockstep, not in real time, for at most 300 ticks.",
            "success_by_task": success,
            "wrong_instruction_success_by_task": wrong,
            "median_ticks_to_success": _median_ticks(own),
            "stages_ms": stages,
            "wait_ms": percentiles([result.wait_ms for result in own], prefix="{}"),
            "errors": _errors([*own, *alone, *misled]),
            "misses_by_task": {
                task: sum(r.num_misses for r in own if r.task == task) for task in success
            },
        },
        n=len(own),
        seed=seed,
        plots=(plot,),
    )


@contextmanager
def _server() -> Iterator[tuple[str, dict[str, object]]]:
    """A server as `ganglion serve` makes it; its websocket address and what it runs."""
    torch.set_num_threads(1)
    dtype = "bfloat16" if "amx_bf16" in read_hardware().flags else "float32"
    model = load_policy(policy_folder(PolicyConfig().path), dtype=dtype)
    with (
        LocalService(model, engine=EngineConfig(), memory=MemoryConfig()) as service,
        ServerThread(service, config=ServeConfig(port=0)) as edge,
    ):
        yield (
            edge.ws_url,
            {
                "policy": model.spec.name,
                "model_version": model.spec.version,
                "dtype": dtype,
                "num_flow_steps": model.spec.num_flow_steps,
            },
        )


def _plan(task: str, seed: int, prompt: str | None = None) -> EpisodePlan:
    return EpisodePlan(world=f"metaworld:{task}", seed=seed, prompt=prompt)


def _fly(
    url: str,
    num_arms: int,
    plans: Sequence[EpisodePlan],
    *,
    pace: Pace = Pace.REAL_TIME,
    max_ticks: int = 500,
) -> tuple[EpisodeResult, ...]:
    config = FleetConfig(
        url=url,
        robots=tuple(f"arm-{at}" for at in range(num_arms)),
        loop=LoopConfig(rate_hz=RATE_HZ, pace=pace, max_ticks=max_ticks),
        has_common_start=True,
    )
    result = run_fleet(config, shared_episodes(plans))
    if result.failures or len(result.episodes) != len(plans):
        reasons = "; ".join(f"{robot.robot_id}: {robot.failure}" for robot in result.failures)
        raise GanglionError(
            f"{len(result.episodes)} of {len(plans)} episodes ended ({reasons or 'no reason given'})",
            next_step="run `ganglion doctor`",
        )
    return result.episodes


def _success_by_task(results: Sequence[EpisodeResult]) -> dict[str, float]:
    return _by_task(results, lambda group: sum(r.is_success for r in group) / len(group))


def _median_ticks(results: Sequence[EpisodeResult]) -> dict[str, float]:
    solved = [result for result in results if result.success_tick is not None]
    return _by_task(
        solved, lambda group: sorted(r.success_tick or 0 for r in group)[len(group) // 2]
    )


def _by_task(
    results: Sequence[EpisodeResult], figure: Callable[[list[EpisodeResult]], float]
) -> dict[str, float]:
    names = [task for task in TASKS if any(result.task == task for result in results)]
    return {task: figure([result for result in results if result.task == task]) for task in names}


def _samples(results: Sequence[EpisodeResult], stage: str) -> list[float]:
    return [sample for result in results for sample in result.stages_ms.get(stage, ())]


def _errors(results: Sequence[EpisodeResult]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for result in results:
        for code, count in result.errors.items():
            counts[code] = counts.get(code, 0) + count
    return counts
