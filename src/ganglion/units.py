"""Units: constants, parsing and printing of bytes and durations. Used by config, plan and cli. Pure."""

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
US_PER_S = 1_000_000

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
}


def parse_bytes(text: str) -> int:
    """Bytes of "512 MiB", "2GiB", "1000000". Raises ValueError naming the text and the accepted units."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ValueError(
            f"{text!r} is not a size; write a number and one of B, KiB, MiB, GiB, kB, MB, GB"
        )
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def format_bytes(num_bytes: int) -> str:
    """Human form with binary units: 1536 -> "1.5 KiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
