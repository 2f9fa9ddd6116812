from pathlib import Path

import pytest

from ganglion.config import load
from ganglion.plan.auto import auto_values
from ganglion.plan.hardware import Hardware, parse_cpuinfo, parse_meminfo, read_hardware
from ganglion.units import GIB, MIB


def machine(
    *, num_cores: int, flags: tuple[str, ...] = (), available_bytes: int = 8 * GIB
) -> Hardware:
    return Hardware(
        cpu_model="test",
        cores=tuple(range(num_cores)),
        flags=flags,
        total_bytes=16 * GIB,
        available_bytes=available_bytes,
    )


@pytest.mark.parametrize(
    ("num_cores", "lanes"),
    [(1, ((),)), (2, ((),)), (4, ((2,), (3,))), (64, tuple((core,) for core in range(56, 64)))],
)
def test_lanes_leave_cores_for_robots(num_cores: int, lanes: tuple[tuple[int, ...], ...]) -> None:
    auto = auto_values(machine(num_cores=num_cores))["engine.lanes"]
    assert auto.value == lanes
    assert f"{num_cores} cores" in auto.formula


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [(("avx2", "amx_bf16"), "bfloat16"), (("avx512_bf16",), "bfloat16"), (("avx512f",), "float32")],
)
def test_bf16_only_where_it_is_fast(flags: tuple[str, ...], dtype: str) -> None:
    assert auto_values(machine(num_cores=2, flags=flags))["engine.dtype"].value == dtype


@pytest.mark.parametrize(
    ("available_bytes", "arena_bytes"),
    [(0, 256 * MIB), (8 * GIB, 256 * MIB), (600 * MIB, 150 * MIB), (100 * MIB, 64 * MIB)],
)
def test_the_arena_takes_a_quarter_at_most(available_bytes: int, arena_bytes: int) -> None:
    auto = auto_values(machine(num_cores=2, available_bytes=available_bytes))["memory.arena_bytes"]
    assert auto.value == arena_bytes


def test_auto_values_pass_the_checks_of_the_config() -> None:
    resolved = load(autos=auto_values(read_hardware()))
    origins = {setting.path: setting.origin for setting in resolved.settings}
    assert origins["engine.lanes"].startswith("auto: ")
    assert resolved.config.engine.dtype in ("bfloat16", "float32")


def test_cpuinfo_of_x86_and_arm() -> None:
    x86 = (
        "processor: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 amx_bf16 amx_tile\n\nprocessor: 1\n"
    )
    assert parse_cpuinfo(x86) == ("Xeon", ("avx2", "amx_bf16"))
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\nModel\t\t: Raspberry Pi 5\n"
    assert parse_cpuinfo(arm) == ("Raspberry Pi 5", ("asimd", "bf16"))


def test_meminfo_and_a_machine_without_proc(tmp_path: Path) -> None:
    assert parse_meminfo("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n") == (2 * MIB, 1 * MIB)
    assert parse_meminfo("") == (0, 0)
    empty = read_hardware(tmp_path)
    assert empty.total_bytes == 0
    assert empty.cpu_model
    assert empty.cores


@pytest.mark.parametrize(
    ("budget_bytes", "arena_bytes"), [(0, 2 * GIB), (16 * GIB, 2 * GIB), (1 * GIB, 512 * MIB)]
)
def test_a_budget_leaves_half_to_weights(budget_bytes: int, arena_bytes: int) -> None:
    autos = auto_values(machine(num_cores=2), has_chat=True, budget_bytes=budget_bytes)
    assert autos["memory.arena_bytes"].value == arena_bytes
