"""Result: what a benchmark measured, and the JSON file that makes it a claim.

Returned by every bench module's `run`, written by cli, read by `report`. Knows no benchmark.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ganglion.errors import GanglionError
from ganglion.plan.hardware import read_hardware
from ganglion.units import format_bytes

_PACKAGES = (
    "ganglion",
    "torch",
    "numpy",
    "mujoco",
    "metaworld",
    "uvicorn",
    "websockets",
    "msgpack",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture of a result: lines over a common x axis. `names`: tick names, which make it a bar chart."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[float, ...]]
    x: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    is_log_x: bool = False
    is_log_y: bool = False

    def __post_init__(self) -> None:
        num_points = len(self.x or self.names)
        for name, values in self.series.items():
            if len(values) != num_points:
                raise ValueError(
                    f"plot {self.title!r}: {name!r} has {len(values)} of {num_points} points"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What one run measured. `metrics`: flat, the unit in each name. `n`: samples behind the main figure."""

    name: str
    metrics: Mapping[str, float]
    detail: Mapping[str, Any]
    n: int
    seed: int
    plots: tuple[Plot, ...] = field(default=())


def percentiles(values: Any, *, prefix: str) -> dict[str, float]:
    """{prefix}_p50, _p95, _p99 and _max with the unit that `prefix` does not carry left to the caller's name.

    `prefix` holds "{}" where the percentile goes: "latency_{}_ms" -> latency_p50_ms.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"no samples for {prefix!r}")
    named = {f"p{q}": float(np.percentile(array, q)) for q in (50, 95, 99)} | {
        "max": float(array.max())
    }
    return {prefix.format(name): value for name, value in named.items()}


def commit_of(folder: Path) -> str:
    """Short commit of the checkout around `folder`, "-dirty" when tracked files differ."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        is_dirty = bool(
            git("status", "--porcelain", "--untracked-files=no", "--", "src", "examples")
        )
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return f"{commit}-dirty" if is_dirty else commit


def hardware_facts() -> dict[str, Any]:
    """The machine as it goes into a result: CPU, cores, flags, RAM, GPUs."""
    hardware = read_hardware()
    gpus: list[str] = []
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        if cuda.is_available():
            gpus = [cuda.get_device_name(index) for index in range(cuda.device_count())]
    return {
        "cpu": hardware.cpu_model,
        "num_cores": len(hardware.cores),
        "flags": list(hardware.flags),
        "ram": format_bytes(hardware.total_bytes),
        "gpus": gpus,
    }


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(result: BenchResult, folder: Path, *, command: str) -> Path:
    """Write `folder`/NAME.json and return its path. Raises GanglionError for a figure that is no number."""
    bad = {name: value for name, value in result.metrics.items() if not np.isfinite(value)}
    if bad:
        raise GanglionError(
            f"bench {result.name}: metrics {bad} are not finite", next_step="fix the benchmark"
        )
    document = {
        "name": result.name,
        "commit": commit_of(Path(__file__).parent),
        "hardware": hardware_facts(),
        "command": command,
        "seed": result.seed,
        "n": result.n,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": _versions(),
        "metrics": {name: round(float(value), 6) for name, value in result.metrics.items()},
        "detail": result.detail,
        "plots": [asdict(plot) for plot in result.plots],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    text = json.dumps(document, indent=1, allow_nan=False, default=_plain)
    path.write_text(text + "\n")
    return path


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as json's own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot go into a result: {value!r}")


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every result in `folder`, by name."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(results, key=lambda result: str(result["name"]))
