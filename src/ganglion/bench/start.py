"""Bench start: from `git clone` to a moving arm, from the command to a moving arm, and from it to a language model's token.

Called by `ganglion bench start`. Runs the README's own command, `make demo`, as a newcomer would; the first run installs
everything into an environment of its own, so it also measures the package index and the network. The language model is
Qwen3-0.6B in shape, its weights random, bfloat16, in the page cache.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ganglion.bench.first_token import Started, start, warm, weight_bytes
from ganglion.bench.result import BenchResult
from ganglion.bench.shapes import DENSE, TOY_DENSE, shape_folder
from ganglion.clock import RealClock
from ganglion.errors import GanglionError

DEMO_SECONDS, QUICK_DEMO_SECONDS = 20, 3
NUM_SECOND_STARTS = 3
TIMEOUT_S = 1800
NUM_LANGUAGE_STARTS = 3
LANGUAGE = {**DENSE, "vocab_size": 151936}  # 0.6 B with its whole vocabulary
SMALLEST = "tiny-dense"  # what a server takes without a model worth mentioning


def run(*, quick: bool, seed: int) -> BenchResult:
    """First start in a fresh clone, then second starts in the same one; quick: one of this checkout only, and a toy."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / "Makefile").is_file():
        raise GanglionError(
            "bench start needs a git checkout with its Makefile",
            next_step="git clone the project and run it there",
        )
    language, detail = _language(is_quick=quick, seed=seed)
    if quick:
        seconds, _ = _start(checkout, seed, demo_s=QUICK_DEMO_SECONDS)
        language["second_start_s"] = seconds
        return _result(language, detail | {"second_starts_s": [seconds]}, n=1, seed=seed)
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
            **language,
        },
        {
            "clone_s": clone_s,
            "first_run": first,
            "second_starts_s": again,
            "command": "make demo",
            "arms": "four, headless",
            **detail,
        },
        n=len(again),
        seed=seed,
    )


def _result(metrics: dict[str, float], detail: dict[str, Any], *, n: int, seed: int) -> BenchResult:
    return BenchResult(name="start", metrics=metrics, detail=detail, n=n, seed=seed)


def _language(*, is_quick: bool, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and detail of `ganglion serve chat=FOLDER`, from the process's start to the first token over HTTP."""
    folder = shape_folder(TOY_DENSE if is_quick else LANGUAGE, seed=seed)
    warm(folder)
    clock, flags = RealClock(), ("--dtype", "bfloat16")
    empty = start(SMALLEST, clock=clock, flags=flags)
    starts = [
        start(str(folder), clock=clock, flags=flags)
        for _ in range(1 if is_quick else NUM_LANGUAGE_STARTS)
    ]
    sum_bytes = weight_bytes(folder)

    def over_weights(value_of: Callable[[Started], int]) -> float:
        return (max(map(value_of, starts)) - value_of(empty)) / sum_bytes

    metrics = {
        "first_token_s": statistics.median(each.first_token_s for each in starts),
        "first_token_max_s": max(each.first_token_s for each in starts),
        "first_token_empty_s": empty.first_token_s,
    }
    if not is_quick:  # a toy's weights are less than what a start takes more than another
        metrics["peak_over_weights"] = over_weights(lambda each: each.peak_bytes)
        metrics["own_over_weights"] = over_weights(lambda each: each.own_bytes)
    detail = {
        "language_command": "ganglion serve chat=FOLDER --dtype bfloat16",
        "language_starts": [asdict(each) for each in starts],
        "language_empty": asdict(empty),
        "weight_bytes": sum_bytes,
        "note": "The language model's files are in the page cache. Memory is that of the process less that of a server "
        f"with {SMALLEST}: peak_over_weights counts mapped files, own_over_weights does not.",
    }
    return metrics, detail


def _start(
    checkout: Path, seed: int, *, demo_s: int = DEMO_SECONDS
) -> tuple[float, dict[str, Any]]:
    """Seconds from `make demo` to the first action that an arm executed, and what the demo wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.json"
        flags = f"--headless --seconds {demo_s} --seed {seed} --port 0 --json {file}"
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
