"""A newcomer's first ten minutes, as the README and the quickstart tell them, with a clock beside it.

One test a minute of the table; the last one adds the times up. Commands run as a person would run them.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ganglion.clock import RealClock
from tests.e2e.command import ENVIRONMENT, ROOT, Running, ganglion

LIMIT_S = 600.0
TOOK_S: dict[str, float] = {}


def can_render() -> bool:
    """Meta-World needs OpenGL without a screen; `make` installs it or names it."""
    if importlib.util.find_spec("mujoco") is None:
        return False
    probe = "import mujoco; mujoco.GLContext(16, 16).free()"
    return any(
        subprocess.run(
            [sys.executable, "-c", probe],
            env={**os.environ, "MUJOCO_GL": name},
            capture_output=True,
            timeout=60,
            check=False,
        ).returncode
        == 0
        for name in ("egl", "osmesa")
    )


needs_gl = pytest.mark.skipif(not can_render(), reason="no headless OpenGL here; see .ci/system gl")


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest) -> Iterator[None]:
    clock = RealClock()
    start_s = clock.now_s()
    yield
    TOOK_S[request.node.name] = clock.now_s() - start_s


@needs_gl
def test_minute_0_the_demo_moves_arms(tmp_path: Path) -> None:
    seconds = 15
    done = ganglion(
        *("demo", "--headless", "--arms", "2", "--tasks", "drawer-open,window-open"),
        *("--seconds", str(seconds), "--port", "0", "--json", str(tmp_path / "demo.json")),
        timeout_s=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"dashboard +http://127\.0\.0\.1:\d+/", done.stdout)
    assert "25%" in done.stdout  # 20 Hz is quarter speed, said where users see it
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["failures"] == []
    # The machine may be busy: what counts here is that both arms move under control.
    assert report["num_ticks"] > 2 * seconds * 20 * 0.3, report
    assert report["miss_rate"] < 0.5, report
    assert report["seconds_to_first_action"] < 30


def test_minute_2_the_doctor_says_what_works(tmp_path: Path) -> None:
    done = ganglion("doctor", "--json", str(tmp_path / "doctor.json"), timeout_s=120)
    findings = {item["topic"]: item for item in json.loads((tmp_path / "doctor.json").read_text())}
    assert {"cpu", "memory", "versions", "cpu kernels", "cuda", "op check"} <= set(findings)
    assert {"rendering", "policy", "port"} <= set(findings)
    assert findings["policy"]["verdict"] == "on", done.stdout
    broken = [item for item in findings.values() if item["verdict"] == "BROKEN"]
    assert all(item["fix"] for item in broken), broken
    assert done.returncode == (1 if broken else 0)
    assert len(done.stdout.splitlines()) < 40


def test_minute_4_and_5_the_shipped_policy_is_served_and_answers() -> None:
    with Running("serve", "--port", "0", until="Ctrl-C") as server:
        assert "engine.lanes = " in server.text
        assert "(auto: " in server.text
        curl = server.find(r"try +(curl .*)$")
        answer = subprocess.run(
            curl.split(), capture_output=True, text=True, timeout=20, check=True
        )
        assert json.loads(answer.stdout)["data"][0]["id"] == "metaworld-ten"
        code = textwrap.dedent(" " * 13 + server.find(r"client +((?:.*\n)+?) *robot "))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.strip() == "(48, 4)"


@needs_gl
def test_minute_5_a_robot_of_another_process_solves_its_task(tmp_path: Path) -> None:
    with Running("serve", "--port", "0", until="Ctrl-C") as server:
        url = server.find(r"robots +(ws://\S+)")
        done = ganglion(
            *("run", "--url", url, "--world", "metaworld:drawer-open", "--rate", "10"),
            *("--json", str(tmp_path / "run.json")),
            timeout_s=120,
        )
        assert done.returncode == 0, done.stderr
        assert "drawer-open" in done.stdout
        (episode,) = json.loads((tmp_path / "run.json").read_text())["episodes"]
        assert episode["is_success"], done.stdout


def test_minute_7_bench_quick_prints_the_table_of_the_readme() -> None:
    done = ganglion("bench", "--quick", "pool", "wire", timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    readme = (ROOT / "README.md").read_text()
    header = "| what | measured | bar | baseline | n |"
    assert header in done.stdout
    assert header in readme or "Not measured yet" in readme
    assert "allocate a page" in done.stdout
    assert "round trip minus model time" in done.stdout


def test_minute_8_the_architecture_page_traces_a_request() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for module in re.findall(
        r"`((?:robots|serve|pipeline|engine|memory|models|plan)/\w+\.py)`", page
    ):
        assert (ROOT / "src" / "ganglion" / module).exists(), module
    assert "sequenceDiagram" in page


def test_minute_10_a_policy_is_edited_and_served(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "my_policy.py").read_text()
    (tmp_path / "my_policy.py").write_text(text.replace('name="my-policy"', 'name="mine"'))
    with Running(
        "serve", "policy=my_policy.py:MyPolicy", "--port", "0", until="Ctrl-C", cwd=tmp_path
    ) as server:
        assert "serving mine (plain" in server.text


def test_all_of_it_fits_into_ten_minutes() -> None:
    assert sum(TOOK_S.values()) < LIMIT_S, TOOK_S
