"""Rates: this machine's measured rates, kept between runs. Called by `ganglion plan`."""

import json
import os
from dataclasses import asdict
from math import isfinite
from pathlib import Path

from ganglion.clock import RealClock
from ganglion.plan.hardware import Hardware
from ganglion.plan.roofline import Rates


def rates_file() -> Path:
    """Where they are kept: the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "ganglion" / "rates.json"


def machine_rates(hardware: Hardware, *, dtype: str, num_threads: int, again: bool) -> Rates:
    """Kept rates of this CPU, dtype and number of threads; else, or `again`, measured now and kept."""
    from importlib.metadata import version

    key = f"{hardware.cpu_model} / {len(hardware.cores)} cores / {dtype} / {num_threads} threads / {version('torch')}"
    file = rates_file()
    kept = _read(file)
    if not again and (known := _rates(kept.get(key))) is not None:
        return known
    from ganglion.kernels.probe import probe  # torch: only when something is measured

    probed = probe(RealClock(), dtype=dtype, num_threads=num_threads)
    rates = Rates(dtype=dtype, num_threads=num_threads, **asdict(probed))
    kept[key] = asdict(rates)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(kept, indent=1) + "\n")
        scratch.replace(file)
    except OSError:
        pass  # a home that cannot be written to: measured again next time
    return rates


def _read(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rates(entry: object) -> Rates | None:
    """An entry as it was written; None for anything else, which is then measured again."""
    if not isinstance(entry, dict):
        return None
    try:
        flops = {int(rows): float(rate) for rows, rate in entry["flops_per_s"].items()}
        rates = Rates(**{**entry, "flops_per_s": flops})
        numbers = (rates.read_bytes_per_s, rates.call_us, *flops.values())
        is_sane = bool(flops) and all(isfinite(number) and number > 0 for number in numbers)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return rates if is_sane else None
