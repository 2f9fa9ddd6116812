"""Hardware: what this machine is, read from /proc. Called by cli (auto values, doctor) and bench (results).

Pure: no torch, no probe that costs time. Accelerators are the caller's to add.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ganglion.units import KIB

# The flags that decide how fast a small policy runs on a CPU, in the kernel's spelling.
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine as this process may use it."""

    cpu_model: str
    cores: tuple[int, ...]  # ids that this process may run on
    flags: tuple[str, ...]  # of FLAGS, those present
    total_bytes: int
    available_bytes: int

    @property
    def has_fast_bf16(self) -> bool:
        """Do matrix products in bfloat16 run faster than in float32 here?"""
        return "amx_bf16" in self.flags or "avx512_bf16" in self.flags


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and the known flags of /proc/cpuinfo's first core (x86 and Arm spellings)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    words = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or fields.get("Model") or platform.processor()
    return model or platform.machine(), tuple(flag for flag in FLAGS if flag in words)


def parse_meminfo(text: str) -> tuple[int, int]:
    """Bytes in all and bytes available of /proc/meminfo; (0, 0) when it says nothing."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    total, available = (fields.get(key, "0 kB").split()[0] for key in ("MemTotal", "MemAvailable"))
    return int(total) * KIB, int(available) * KIB


def read_hardware(proc: Path = Path("/proc")) -> Hardware:
    """This machine; parts that its kernel does not tell are empty or 0."""

    def read(name: str) -> str:
        try:
            return (proc / name).read_text(errors="replace")
        except OSError:
            return ""

    model, flags = parse_cpuinfo(read("cpuinfo"))
    total_bytes, available_bytes = parse_meminfo(read("meminfo"))
    if hasattr(os, "sched_getaffinity"):
        cores = tuple(sorted(os.sched_getaffinity(0)))
    else:
        cores = tuple(range(os.cpu_count() or 1))
    return Hardware(
        cpu_model=model,
        cores=cores,
        flags=flags,
        total_bytes=total_bytes,
        available_bytes=available_bytes,
    )
