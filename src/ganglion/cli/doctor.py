"""`ganglion doctor`: what works on this machine, one line to fix what does not; made to be pasted into an issue."""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import ganglion
from ganglion.cli.main import EXTRAS, installed_version
from ganglion.config import PolicyConfig, ServeConfig
from ganglion.errors import GanglionError
from ganglion.plan.auto import auto_values
from ganglion.plan.hardware import read_hardware
from ganglion.units import format_bytes

PACKAGES = (
    "torch",
    "numpy",
    "msgpack",
    "websockets",
    "starlette",
    "uvicorn",
    "metaworld",
    "mujoco",
    "gym-pusht",
)
GL_PROBE = "import mujoco; mujoco.GLContext(16, 16).free()"
GL_FIX = "sudo apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglib2.0-0"
SMALLEST_FREE_BYTES = 2 * 1024**3


class Verdict(StrEnum):
    """How a finding counts."""

    ON = "on"
    OFF = "off"  # optional here
    BROKEN = "BROKEN"
    INFO = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `fix`: one command or sentence, for what is off or broken."""

    topic: str
    verdict: Verdict
    text: str
    fix: str = ""


def run(args: argparse.Namespace) -> int:
    """Print all findings; 1 when something is broken."""
    findings = examine()
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{finding.topic:<{width}}  {finding.verdict.value:<6}  {finding.text}")
        if finding.fix:
            print(f"{'':<{width}}          fix: {finding.fix}")
    if args.json:
        document = [asdict(finding) for finding in findings]
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    broken = [finding.topic for finding in findings if finding.verdict is Verdict.BROKEN]
    print(f"\n{'broken: ' + ', '.join(broken) if broken else 'all that is needed works'}")
    return 1 if broken else 0


def examine() -> list[Finding]:
    """Every check, cheapest first; a check that fails by itself is a finding too."""
    findings: list[Finding] = []
    checks: tuple[Callable[[], list[Finding]], ...] = (
        machine, versions, backends, operations, rendering, policy, port,
    )  # fmt: skip
    for check in checks:
        try:
            findings += check()
        except ModuleNotFoundError as error:
            root = (error.name or "").split(".")[0]
            fix = f"pip install 'ganglion[{EXTRAS[root]}]'" if root in EXTRAS else ""
            findings.append(
                Finding(
                    topic=check.__name__, verdict=Verdict.OFF, text=f"no module {root}", fix=fix
                )
            )
        except (GanglionError, OSError, RuntimeError) as error:
            findings.append(Finding(topic=check.__name__, verdict=Verdict.BROKEN, text=str(error)))
    return findings


def machine() -> list[Finding]:
    """CPU, memory, and what follows from them."""
    hardware = read_hardware()
    autos = auto_values(hardware)
    info = [
        Finding(
            topic="cpu",
            verdict=Verdict.INFO,
            text=f"{hardware.cpu_model}, {len(hardware.cores)} cores, {' '.join(hardware.flags)}",
        ),
        Finding(topic="lanes", verdict=Verdict.INFO, text=autos["engine.lanes"].formula),
        Finding(
            topic="bf16",
            verdict=Verdict.ON if hardware.has_fast_bf16 else Verdict.OFF,
            text=autos["engine.dtype"].formula,
        ),
    ]
    free_bytes = hardware.available_bytes
    is_short = 0 < free_bytes < SMALLEST_FREE_BYTES
    text = f"{format_bytes(free_bytes)} of {format_bytes(hardware.total_bytes)} available"
    fix = "free some memory: server and four arms take about 2 GiB" if is_short else ""
    info.append(
        Finding(
            topic="memory", verdict=Verdict.BROKEN if is_short else Verdict.INFO, text=text, fix=fix
        )
    )
    return info


def versions() -> list[Finding]:
    """What is installed."""
    found = {package: installed_version(package) for package in PACKAGES}
    present = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    absent = ", ".join(name for name, version in found.items() if version is None)
    system = f"python {platform.python_version()}, {platform.system()} {platform.release()}"
    text = f"ganglion {ganglion.__version__}, {system}, {present}"
    return [
        Finding(
            topic="versions",
            verdict=Verdict.INFO,
            text=text + (f"; not installed: {absent}" if absent else ""),
        )
    ]


def backends() -> list[Finding]:
    """Which devices and kernels compute here, and why the others do not."""
    import torch

    from ganglion.kernels.cpu import why_not_packed

    reason = why_not_packed(torch.bfloat16)
    text = f"torch {torch.__version__}: fused attention, weights "
    text += f"not laid out ahead ({reason})" if reason else "laid out ahead in bfloat16"
    found = [Finding(topic="cpu kernels", verdict=Verdict.ON, text=text)]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
        text = f"torch sees {', '.join(names)}, but this version computes on the CPU only"
    elif torch.version.cuda is None:
        text = "this torch was built without CUDA"
    else:
        text = f"torch was built for CUDA {torch.version.cuda}, but sees no GPU"
    found.append(Finding(topic="cuda", verdict=Verdict.OFF, text=text))
    return found


def operations() -> list[Finding]:
    """Every op of the CPU backend against the reference, within the contract's tolerance."""
    from ganglion.kernels import cpu
    from ganglion.kernels.check import check

    rows = check(cpu.backend())
    ops = sorted({row.op for row in rows})
    wrong = [row for row in rows if not row.is_ok]
    if not wrong:
        worst = max(rows, key=lambda row: row.error)
        text = f"{len(rows)} cases of {', '.join(ops)} agree with the reference; largest error "
        text += f"{worst.error:.1g} ({worst.op}, {worst.dtype}; allowed {worst.tolerance:.1g})"
        return [Finding(topic="op check", verdict=Verdict.ON, text=text)]
    return [
        Finding(
            topic="op check",
            verdict=Verdict.BROKEN,
            text=f"{row.op} {row.dtype} {row.shape}: error {row.error:.2g}, allowed {row.tolerance:.2g}",
            fix="pip install the torch version of constraints.txt; if it stays, open an issue with this report",
        )
        for row in wrong
    ]


def rendering() -> list[Finding]:
    """Can simulated arms render? Tried in a process of its own: a driver that crashes must not take us along."""
    if installed_version("mujoco") is None:
        fix = "pip install 'ganglion[sim]'"
        return [
            Finding(topic="rendering", verdict=Verdict.OFF, text="no simulator installed", fix=fix)
        ]
    tried = []
    names = [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]
    for name in names:
        done = subprocess.run(
            [sys.executable, "-c", GL_PROBE],
            env={**os.environ, "MUJOCO_GL": name},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode == 0:
            return [
                Finding(topic="rendering", verdict=Verdict.ON, text=f"headless OpenGL by {name}")
            ]
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        tried.append(f"{name}: {last}")
    return [Finding(topic="rendering", verdict=Verdict.BROKEN, text="; ".join(tried), fix=GL_FIX)]


def port() -> list[Finding]:
    """Is the default port free?"""
    config = ServeConfig()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            return [
                Finding(
                    topic="port",
                    verdict=Verdict.OFF,
                    text=f"{config.host}:{config.port}: {error.strerror}",
                    fix="ganglion serve --port 0 takes a free one",
                )
            ]
    return [Finding(topic="port", verdict=Verdict.ON, text=f"{config.host}:{config.port} is free")]


def policy() -> list[Finding]:
    """Does the shipped policy load and answer, and how fast?"""
    from ganglion.cli.policy import load_model
    from ganglion.clock import RealClock

    clock = RealClock()
    start_s = clock.now_s()
    hardware = read_hardware()
    dtype = str(auto_values(hardware)["engine.dtype"].value)
    spec = load_model(PolicyConfig(), dtype=dtype).spec
    took_s = clock.now_s() - start_s
    text = f"{spec.name}, version {spec.version[:12]}, loads in {took_s:.1f} s as {dtype}"
    return [Finding(topic="policy", verdict=Verdict.ON, text=text)]
