"""Bench start: from `git clone` to a moving arm, and from the command to a moving arm when all is installed.

Called by `ganglion bench start`. Runs the README's own command, `make demo`, as a newcomer would; the first run installs
everything into an environment of its own, so it also measures the package index and the network.
"""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ganglion.bench.result import BenchResult
from ganglion.clock import RealClock
from ganglion.errors import GanglionError

DEMO_SECONDS = 20
NUM_SECOND_STARTS = 3
TIMEOUT_S = 1800


def run(*, quick: bool, seed: int) -> BenchResult:
    """First start in a fresh clone, then second starts in the same one; quick: second starts of this checkout only."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / "Makefile").is_file():
        raise GanglionError(
            "bench start needs a git checkout with its Makefile",
            next_step="git clone the project and run it there",
        )
    if quick:
        seconds, _ = _start(checkout, seed)
        return _result({"second_start_s": seconds}, {"second_starts_s": [seconds]}, seed)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "ganglion"
        clock = RealClock()
        start_s = clock.now_s()
        _call(["git", "clone", "-q", str(checkout), str(clone)], Path(folder))
        clone_s = clock.now_s() - start_s
        first_s, first = _start(clone, seed)
        again = [_start(clone, seed)[0] for _ in range(NUM_SECOND_STARTS)]
    return _result(
        {
            "clone_to_moving_arm_s": clone_s + first_s,
            "second_start_s": statistics.median(again),
            "second_start_max_s": max(again),
        },
        {"clone_s": clone_s, "first_run": first, "second_starts_s": again},
        seed,
    )


def _result(metrics: dict[str, float], detail: dict[str, Any], seed: int) -> BenchResult:
    return BenchResult(
        name="start",
        metrics=metrics,
        detail=detail | {"command": "make demo", "arms": "four, headless"},
        n=len(detail["second_starts_s"]),
        seed=seed,
    )


def _start(checkout: Path, seed: int) -> tuple[float, dict[str, Any]]:
    """Seconds from `make demo` to the first action that an arm executed, and what the demo wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.json"
        flags = f"--headless --seconds {DEMO_SECONDS} --seed {seed} --port 0 --json {file}"
        clock = RealClock()
        start_s = clock.now_s()
        _call(["make", "-s", "demo", f"ARGS={flags}"], checkout)
        whole_s = clock.now_s() - start_s
        document: dict[str, Any] = json.loads(file.read_text())
    first_action_s = document["seconds_to_first_action"]
    if first_action_s is None:
        raise GanglionError("no arm moved in the demo", next_step="run `ganglion doctor`")
    return whole_s - (document["seconds"] - first_action_s), document


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise GanglionError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}",
            next_step="run it by hand",
        )
