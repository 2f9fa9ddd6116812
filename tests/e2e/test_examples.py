"""Every example is served as the documentation says, and what the server prints is what works."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from ganglion.client import Client
from tests.e2e.command import ENVIRONMENT, ROOT, Running, ganglion

VIEW, STATE = "observation.images.corner", "observation.state"


def observation(*, bright_row: int, bright_column: int) -> dict[str, np.ndarray]:
    view = np.zeros((80, 80, 3), np.uint8)
    view[bright_row, bright_column] = 255
    return {VIEW: view, STATE: np.zeros(4, np.float32)}


def test_a_policy_of_ones_own_is_served_and_answers_each_robot() -> None:
    lines = (ROOT / "examples" / "my_policy.py").read_text().splitlines()
    assert len(lines) <= 32
    with Running(
        "serve", "policy=examples/my_policy.py:MyPolicy", "--port", "0", until="Ctrl-C"
    ) as server:
        url = server.find(r"robots +(ws://\S+)")
        with Client(url, robot_id="one") as one, Client(url, robot_id="two") as two:
            assert one.metadata["policy"] == "my-policy"
            right = one.infer(observation(bright_row=0, bright_column=79), prompt="grab it")
            left = two.infer(observation(bright_row=79, bright_column=0), prompt="go")
        np.testing.assert_allclose(right.actions[0], [0.975, 1.0, 0.0, 1.0], atol=1e-6)
        np.testing.assert_allclose(left.actions[9], [-1.0, -0.975, 0.0, -1.0], atol=1e-6)
    assert "stopping" in server.text


def test_the_printed_curl_line_and_client_work_as_they_stand() -> None:
    with Running(
        "serve", "policy=examples/my_policy.py:MyPolicy", "--port", "0", until="Ctrl-C"
    ) as server:
        curl = server.find(r"try +(curl .*)$")
        answer = subprocess.run(
            curl.split(), capture_output=True, text=True, timeout=20, check=True
        )
        assert json.loads(answer.stdout)["data"][0]["id"] == "my-policy"
        code = server.find(r"client +((?:.*\n)+?) *robot ")
        client = textwrap.dedent(" " * 13 + code)
        assert len(client.strip().splitlines()) <= 6
        done = subprocess.run(
            [sys.executable, "-c", client],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stdout.strip() == "(10, 4)"


def test_a_policy_that_cannot_be_served_is_refused_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    def __call__(self, observations): ...\n")
    cases = {
        "mine.py:Other": "has no class 'Other'",
        "mine.py:Mine": "is no policy: it needs `spec: PolicySpec`",
        "mine.py": "names a file but no class",
        "absent.py:Mine": "no file absent.py",
        "absent-checkpoint": "expected a folder or one of metaworld-ten",
    }
    for path, message in cases.items():
        done = ganglion("serve", f"policy={path}", "--port", "0", timeout_s=60, cwd=tmp_path)
        assert done.returncode == 1, path
        assert message in done.stderr, path
        assert "Traceback" not in done.stderr, path


def test_another_address_than_loopback_needs_a_key() -> None:
    done = ganglion(
        "serve",
        "policy=examples/my_policy.py:MyPolicy",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        timeout_s=60,
    )
    assert done.returncode == 1
    assert "key" in done.stderr
    assert "next: " in done.stderr
