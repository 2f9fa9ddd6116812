"""Bench delay: what late chunks cost on the moving world, in all execution modes, as arXiv 2605.08168 plots it.

Called by `ganglion bench delay`. Closed loop in process (`train.evaluate`), many arms to a forward: time is control ticks,
so a chunk is exactly d ticks late and a busy machine changes no figure. Owns which modes at which delays, and the figures.

How often a chunk is made: a mode with one chunk under way looks again when its last chunk is there, `max(3, d)` ticks later
(sync: when it has executed as many rows). The pipelined modes look every 3 ticks whatever the delay, so that several chunks
are under way. There each flow step reads the newest picture and what runs anyway by then, as in this server; but for rolled,
whose picture belongs to one tick of execution.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ganglion.bench.result import BenchResult, Plot
from ganglion.models.registry import policy_folder
from ganglion.plan.hardware import read_hardware
from ganglion.robots.metaworld import UNSEEN_SEEDS
from ganglion.robots.moving import MAX_MOVING_TICKS, MOVING_TASKS
from ganglion.train.evaluate import EvaluateConfig, TaskResult, evaluate_each
from ganglion.types import Execution

POLICY = "metaworld-ten-late"
UNTUNED = "metaworld-ten"  # what it was tuned from: never saw a late chunk
WORLD = "metaworld-moving"
DELAYS = (0, 2, 4, 8, 12, 16, 20)  # control ticks
PERIOD_TICKS = 3  # from one observation to the next, when nothing is late
CLAIMED_DELAY = 8
NUM_SEEDS = 3  # of each task, mode and delay
NUM_CLAIMED_SEEDS = 8  # where figures are claimed: without delay and at CLAIMED_DELAY
OURS = "prefix, pipelined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One line of the plot."""

    name: str
    execution: Execution
    is_pipelined: bool = False

    def ticks_per_chunk(self, delay_ticks: int) -> int:
        """From one observation to the next (sync: executed rows)."""
        return PERIOD_TICKS if self.is_pipelined else max(PERIOD_TICKS, delay_ticks)

    def config(self, base: EvaluateConfig, delay_ticks: int) -> EvaluateConfig:
        """Modes that are the same without delay have the same config there: it runs once."""
        execution = self.execution
        is_public = self.is_pipelined and execution is not Execution.ROLLED
        if delay_ticks == 0:
            is_public = False
            if execution in (Execution.SYNC, Execution.PREFIX, Execution.ROLLED):
                execution = Execution.NAIVE
        return replace(
            base,
            execution=execution,
            delay_ticks=delay_ticks,
            ticks_per_chunk=self.ticks_per_chunk(delay_ticks),
            is_context_public=is_public,
        )


MODES = (
    *(Mode(name=execution.value, execution=execution) for execution in Execution),
    *(
        Mode(name=f"{execution.value}, pipelined", execution=execution, is_pipelined=True)
        for execution in (Execution.NAIVE, Execution.PREFIX, Execution.ROLLED)
    ),
)


UNTUNED_NAIVE = f"naive, {UNTUNED}"
SERIES = (*(mode.name for mode in MODES), UNTUNED_NAIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One mode at one delay, all tasks. `mean_ticks`: to success, in full where there was none."""

    success: float
    num_solved: int
    num_episodes: int
    mean_ticks: float
    switch_jump: float
    jerk: float
    success_by_task: Mapping[str, float]


def run(*, quick: bool, seed: int) -> BenchResult:
    """All modes at all delays on the moving tasks."""
    delays = (0, CLAIMED_DELAY) if quick else DELAYS
    tasks = MOVING_TASKS[:1] if quick else MOVING_TASKS
    first = UNSEEN_SEEDS[0] + seed

    def seeds_at(delay: int) -> tuple[int, ...]:
        num_seeds = NUM_CLAIMED_SEEDS if delay in (0, CLAIMED_DELAY) else NUM_SEEDS
        return tuple(range(first, first + (1 if quick else num_seeds)))

    base = EvaluateConfig(
        world=WORLD,
        tasks=tasks,
        seeds=seeds_at(0),
        max_ticks=40 if quick else MAX_MOVING_TICKS,
        dtype="bfloat16" if read_hardware().has_fast_bf16 else "float32",
        num_parallel=1 if quick else NUM_CLAIMED_SEEDS,
        num_workers=1 if quick else 2,
    )
    configs = {
        (mode.name, delay): mode.config(replace(base, seeds=seeds_at(delay)), delay)
        for mode in MODES
        for delay in delays
    }
    points = _measure(configs, policy_folder(POLICY), base.max_ticks)
    naive = {key: config for key, config in configs.items() if key[0] == "naive"}
    points |= {
        (UNTUNED_NAIVE, delay): found
        for (_, delay), found in _measure(naive, policy_folder(UNTUNED), base.max_ticks).items()
    }
    at_zero, at_claimed = (
        {name: points[name, delay] for name in SERIES} for delay in (0, CLAIMED_DELAY)
    )
    shares = {name: share(at_claimed[name], at_zero[name]) for name in at_zero}
    metrics = {
        "success_at_8_share": shares[OURS],
        "naive_success_at_8_share": shares["naive"],
        "untuned_naive_success_at_8_share": shares[UNTUNED_NAIVE],
        "zero_delay_success": at_zero[OURS].success,
        "success_at_8": at_claimed[OURS].success,
        "naive_success_at_8": at_claimed["naive"].success,
        "untuned_naive_success_at_8": at_claimed[UNTUNED_NAIVE].success,
        "switch_jump_at_8": at_claimed[OURS].switch_jump,
        "naive_switch_jump_at_8": at_claimed["naive"].switch_jump,
        "mean_ticks_at_8": at_claimed[OURS].mean_ticks,
        "naive_mean_ticks_at_8": at_claimed["naive"].mean_ticks,
    }
    return BenchResult(
        name="delay",
        metrics=metrics,
        detail={
            "policy": POLICY,
            "untuned_policy": UNTUNED,
            "world": WORLD,
            "dtype": base.dtype,
            "seeds": {str(delay): list(seeds_at(delay)) for delay in delays},
            "tasks": list(tasks),
            "max_ticks": base.max_ticks,
            "our_mode": OURS,
            "best_mode_at_8": max(at_claimed, key=lambda name: at_claimed[name].success),
            "note": "Delay is in control ticks, from the picture to the chunk. *_share: success at a delay of 8 ticks over "
            "the same mode's success without delay. Pipelined: a new chunk every 3 ticks however late each is, flow steps on the "
            "newest picture; the others: one chunk under way. Jump: mean squared change of the motion when a chunk takes over.",
            "ticks_between_chunks": {
                mode.name: {str(delay): mode.ticks_per_chunk(delay) for delay in delays}
                for mode in MODES
            },
            "success_at_8_shares": shares,
            "points": {
                name: {str(delay): asdict(points[name, delay]) for delay in delays}
                for name in SERIES
            },
        },
        n=points[OURS, CLAIMED_DELAY].num_episodes,
        seed=seed,
        plots=_plots(points, delays),
    )


def _measure(
    configs: Mapping[tuple[str, int], EvaluateConfig], folder: Path, max_ticks: int
) -> dict[tuple[str, int], Point]:
    # slow ones first, so that no process is left with them at the end
    distinct = sorted(set(configs.values()), key=lambda config: -config.delay_ticks)
    num_results = len(distinct) * len(distinct[0].tasks)
    with tqdm(total=num_results, desc="delay", unit="task") as bar:

        def on_result(at: int, result: TaskResult) -> None:
            bar.set_postfix_str(f"{result.task} d={distinct[at].delay_ticks}")
            bar.update()

        found = evaluate_each(distinct, folder, on_result)
    by_config = {
        config: point(results, max_ticks) for config, results in zip(distinct, found, strict=True)
    }
    return {key: by_config[config] for key, config in configs.items()}


def point(results: Sequence[TaskResult], max_ticks: int) -> Point:
    """All tasks of one config in one."""
    ticks = [ticks for result in results for ticks in result.solved_ticks.values()]
    solved = [found for found in ticks if found is not None]
    return Point(
        success=len(solved) / len(ticks),
        num_solved=len(solved),
        num_episodes=len(ticks),
        mean_ticks=_mean(max_ticks if found is None else found for found in ticks),
        switch_jump=_mean(result.switch_jump for result in results),
        jerk=_mean(result.jerk for result in results),
        success_by_task={result.task: result.success_rate for result in results},
    )


def share(late: Point, undelayed: Point) -> float:
    """Success under delay over success without; 0 when nothing was solved without."""
    return late.success / undelayed.success if undelayed.success else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _plots(points: Mapping[tuple[str, int], Point], delays: Sequence[int]) -> tuple[Plot, ...]:
    def series(figure: str) -> dict[str, tuple[float, ...]]:
        return {
            name: tuple(getattr(points[name, delay], figure) for delay in delays) for name in SERIES
        }

    x, x_label = tuple(float(delay) for delay in delays), "delay, control ticks"
    return (
        Plot(
            title="Success on the moving world",
            x_label=x_label,
            y_label="success rate",
            series=series("success"),
            x=x,
        ),
        Plot(
            title="Time to success (unsolved episodes count in full)",
            x_label=x_label,
            y_label="control ticks",
            series=series("mean_ticks"),
            x=x,
        ),
        Plot(
            title="Jump of the motion when a chunk takes over",
            x_label=x_label,
            y_label="mean squared change",
            series=series("switch_jump"),
            x=x,
            is_log_y=True,
        ),
    )
