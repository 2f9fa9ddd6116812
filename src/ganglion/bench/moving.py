"""Bench moving: success on moving goals by way of serving, in enough episodes to tell the ways apart.

Called by `ganglion bench moving`. Reads what `ganglion bench pipeline` measured on this machine (stage times, rates, the best split
of the cores) from docs/results and flies the co-simulation of `bench.pipeline` with it, with the policy that has learnt to
work with late chunks: nothing is timed here, so a busy machine gives the same figures.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ganglion.bench.cosim import CostTable, FlightResult
from ganglion.bench.pipeline import (
    LANES,
    LARGE,
    TASKS,
    best_lanes,
    fly_all,
    success_of,
    ways,
    with_overheads,
)
from ganglion.bench.result import BenchResult, Plot
from ganglion.errors import FieldError
from ganglion.models.registry import load_policy, policy_folder
from ganglion.types import Execution

POLICY = "metaworld-ten-late"  # the sizes of the one that was measured, for robots whose chunks come late
PIPELINE = Path("docs/results/pipeline.json")
NUM_SEEDS = 18  # of each of the four tasks
OVERLAPPED = (3, 5, 6)  # degrees of which public and private context are compared
NAMES = (
    "B0",
    "n=1 public",
    *(f"n={degree} {context}" for context in ("public", "private") for degree in OVERLAPPED),
    "n=3 public, warm start 0.4",
    "n=3 public, warm start 0.6",
    "n=2 public, warm start 0.8",
    "n=3 public, warm start 0.8",
)
Z_95 = 1.96


def run(*, quick: bool, seed: int) -> BenchResult:
    """Episodes of every way, the same seeds for all."""
    measured = _read(PIPELINE)
    dtype = str(measured["dtype"])
    rates: Mapping[str, float] = measured["decisions_per_s"]
    model = load_policy(policy_folder(LARGE), dtype=dtype)
    table = CostTable(
        unit_us={
            stage: {int(rows): us for rows, us in by_rows.items()}
            for stage, by_rows in measured["stage_unit_us"].items()
        },
        step_us=0.0,
    )
    b0 = str(measured["best_b0"])
    tables = {lanes: with_overheads(table, model, rates, b0, lanes) for lanes in LANES}
    names = ("B0", "n=3 public, warm start 0.6") if quick else NAMES
    chosen = [
        way if way.name == "B0" else replace(way, execution=Execution.PREFIX)
        for way in ways()
        if way.name in names
    ]
    lanes = {way.name: best_lanes(way.name, rates) for way in chosen[1:]}
    flights = fly_all(
        chosen,
        lanes,
        table,
        tables,
        dtype,
        seeds=1 if quick else NUM_SEEDS,
        quick=quick,
        policy=POLICY,
    )
    return _result(flights, rates, b0, lanes, seed=seed)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        detail: Mapping[str, Any] = content["detail"]
    except (OSError, ValueError, KeyError) as error:
        raise FieldError(
            str(path),
            expected="what ganglion bench pipeline wrote",
            got=repr(error),
            next_step="run ganglion bench pipeline first",
        ) from error
    return detail


def _result(
    flights: Mapping[str, Sequence[FlightResult]],
    rates: Mapping[str, float],
    b0: str,
    lanes: Mapping[str, str],
    *,
    seed: int,
) -> BenchResult:
    solved = {name: success_of(group) for name, group in flights.items()}
    ratios = {name: rates[f"{name}, {lanes[name]}"] / rates[b0] for name in lanes}
    good = [name for name in lanes if solved[name] >= solved["B0"]] or list(lanes)
    best = max(good, key=ratios.__getitem__)
    metrics = {
        "b0_success": solved["B0"],
        "success": solved[best],
        "success_ratio": solved[best] / max(solved["B0"], 1e-9),
        "rate_ratio": ratios[best],
    }
    pooled = {
        context: [
            flight for degree in OVERLAPPED for flight in flights.get(f"n={degree} {context}", ())
        ]
        for context in ("public", "private")
    }
    if all(pooled.values()):
        metrics |= {f"{context}_success": success_of(group) for context, group in pooled.items()}
        metrics |= {f"{context}_age_p99_ms": _age_p99(group) for context, group in pooled.items()}
        metrics["public_over_private"] = metrics["public_success"] / metrics["private_success"]
    return BenchResult(
        name="moving",
        metrics=metrics,
        detail={
            "best": best,
            "success": solved,
            "margin_95": {name: _margin(solved[name], len(flights[name])) for name in solved},
            "rate_ratio": ratios,
            "lanes": dict(lanes),
            "age_p99_ms": {name: _age_p99(group) for name, group in flights.items()},
            "tasks": list(TASKS),
            "policy": POLICY,
            "note": "Co-simulation on metaworld-moving at 80 Hz, unseen seeds, the same for every way, each charged what "
            "the large policy's stages took in `bench pipeline`. B0 executes naively, all others begin with what runs anyway "
            "(prefix). Ages: of the observation behind each executed action. Public and private: "
            f"degrees {', '.join(map(str, OVERLAPPED))} together.",
        },
        n=sum(len(group) for group in flights.values()),
        seed=seed,
        plots=(
            Plot(
                title="Success on moving goals",
                x_label="way to serve",
                y_label="success rate",
                names=tuple(solved),
                series={"success": tuple(solved.values())},
            ),
        ),
    )


def _age_p99(flights: Sequence[FlightResult]) -> float:
    ages = [age for flight in flights for age in flight.ages_ms]
    return float(np.percentile(ages, 99)) if ages else math.nan


def _margin(share: float, num: int) -> float:
    """Half the width of the normal 95 % interval."""
    return Z_95 * math.sqrt(share * (1 - share) / num)
