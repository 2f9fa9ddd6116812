"""Compare: two results of one bench, metric by metric. Called by cli; knows JSON files only."""

import json
from pathlib import Path
from typing import Any

from ganglion.errors import GanglionError


def read(path: Path) -> dict[str, Any]:
    """One result file. Raises GanglionError when it is not one."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GanglionError(
            f"{path}: not a result file: {error}", next_step="name a file that ganglion bench wrote"
        ) from error
    if not isinstance(document, dict) or not {"name", "metrics", "commit"} <= document.keys():
        raise GanglionError(
            f"{path}: not a result file: it lacks name, metrics or commit",
            next_step="name a file that ganglion bench wrote",
        )
    return document


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A table of old, new and new / old. Raises GanglionError for results of two different benches."""
    if old["name"] != new["name"]:
        raise GanglionError(
            f"cannot compare bench {old['name']!r} with bench {new['name']!r}",
            next_step="name two results of one bench",
        )
    names = [*old["metrics"], *(name for name in new["metrics"] if name not in old["metrics"])]
    width = max(len(name) for name in names)
    lines = [f"{'metric':<{width}} {'old':>12} {'new':>12} {'new/old':>8}"]
    if old.get("hardware") != new.get("hardware"):
        lines.insert(0, "the two ran on different hardware")
    for name in names:
        before, after = old["metrics"].get(name), new["metrics"].get(name)
        ratio = f"{after / before:8.3f}" if before and after is not None else f"{'-':>8}"
        shown = ["-" if value is None else f"{value:.6g}" for value in (before, after)]
        lines.append(f"{name:<{width}} {shown[0]:>12} {shown[1]:>12} {ratio}")
    return "\n".join(lines)
