"""Auto: the config values that follow from the machine, each with its formula. Called by cli before `config.load`.

Pure: takes the hardware as data.
"""

from ganglion.config import Auto
from ganglion.plan.hardware import Hardware
from ganglion.units import GIB, MIB, format_bytes

MAX_LANES = 8  # past that, lanes of a small policy wait for each other's steps
LARGEST_AUTO_ARENA_BYTES = (
    256 * MIB
)  # about 900 contexts of the shipped policy: a fleet is 1 to 50 robots
SMALLEST_AUTO_ARENA_BYTES = 64 * MIB
LARGEST_AUTO_CHAT_ARENA_BYTES = 8 * GIB  # keys and values of a conversation are MBs, of a fleet GBs


def auto_values(
    hardware: Hardware, *, has_policy: bool = True, has_chat: bool = False, budget_bytes: int = 0
) -> dict[str, Auto]:
    """Config path -> value for this machine, and for what is served on it. `budget_bytes` 0: no bound."""
    largest_bytes = LARGEST_AUTO_CHAT_ARENA_BYTES if has_chat else LARGEST_AUTO_ARENA_BYTES
    return {
        "engine.lanes": _lanes(hardware),
        "engine.dtype": _dtype(hardware),
        "engine.language_threads": _language_threads(hardware, has_policy=has_policy),
        "memory.arena_bytes": _arena(hardware, largest_bytes, budget_bytes),
        "memory.budget_bytes": _budget(hardware),
    }


def _lanes(hardware: Hardware) -> Auto:
    num_cores = len(hardware.cores)
    if num_cores <= 2:
        # Pinned, it would wait whenever a robot's renderer sits on that core; free, the kernel moves it.
        why = f"{num_cores} cores are shared with robots and sockets: one lane, not pinned"
        return Auto(value=((),), formula=why)
    num_lanes = min(MAX_LANES, num_cores // 2)
    lanes = tuple((core,) for core in hardware.cores[-num_lanes:])
    rest = num_cores - num_lanes
    return Auto(
        value=lanes,
        formula=f"min({MAX_LANES}, {num_cores} cores // 2) lanes of 1 core, {rest} for robots and sockets",
    )


def _dtype(hardware: Hardware) -> Auto:
    if hardware.has_fast_bf16:
        flag = "amx_bf16" if "amx_bf16" in hardware.flags else "avx512_bf16"
        return Auto(value="bfloat16", formula=f"this CPU has {flag}")
    return Auto(value="float32", formula="this CPU has neither amx_bf16 nor avx512_bf16")


def _language_threads(hardware: Hardware, *, has_policy: bool) -> Auto:
    num_cores = max(1, len(hardware.cores))
    if not has_policy or num_cores <= 2:
        return Auto(value=num_cores, formula=f"{num_cores} cores; robots' steps come in between")
    return Auto(value=num_cores - 1, formula=f"{num_cores} cores - 1 for sockets")


def _budget(hardware: Hardware) -> Auto:
    available_bytes = hardware.available_bytes
    if available_bytes == 0:
        return Auto(value=0, formula="free memory is unknown here: no bound")
    value = max(SMALLEST_AUTO_ARENA_BYTES, available_bytes * 4 // 5 // MIB * MIB)
    return Auto(value=value, formula=f"4/5 of {format_bytes(available_bytes)} available")


def _arena(hardware: Hardware, largest_bytes: int, budget_bytes: int) -> Auto:
    available_bytes = hardware.available_bytes
    if available_bytes == 0:
        return Auto(value=LARGEST_AUTO_ARENA_BYTES, formula="free memory is unknown here")
    quarter = available_bytes // 4 // MIB * MIB
    value = max(SMALLEST_AUTO_ARENA_BYTES, min(largest_bytes, quarter))
    limit = format_bytes(largest_bytes)
    if 0 < budget_bytes // 2 < value:  # weights want the rest
        half = max(MIB, budget_bytes // 2 // MIB * MIB)
        return Auto(value=half, formula=f"budget of {format_bytes(budget_bytes)} / 2")
    return Auto(value=value, formula=f"min({limit}, {format_bytes(available_bytes)} available / 4)")
