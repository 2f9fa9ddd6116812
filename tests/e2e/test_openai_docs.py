"""The sessions of docs/openai.md, as they stand there, against the real engine and a tiny model."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.e2e.command import ROOT
from tests.e2e.language_stage import NAME, language_stage
from tests.e2e.openai_stage import post
from tests.e2e.test_openai_peers import PYTHON as CLIENTS_PYTHON

PAGE = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CURL = re.search(r"^curl .*-d '(.*)'$", PAGE, re.MULTILINE)
OTHERS = ("langchain", "litellm")  # in an environment of their own
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    # A short context bounds the answers of a random model that are not bounded by the page.
    with language_stage(tmp_path_factory.mktemp("models"), max_tokens=640) as it:
        yield it


def name_of(block):
    return re.findall(r"^(?:from|import) (\S+)", block, re.MULTILINE)[-1]


def test_the_page_has_sessions():
    assert len(BLOCKS) >= 6
    assert CURL is not None


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_session(stage, tmp_path, block):
    is_other = any(f"import {name}" in block or f"from {name}" in block for name in OTHERS)
    if is_other and not CLIENTS_PYTHON.exists():
        pytest.skip("no .peers/clients here: make clients")
    text = block.replace("http://127.0.0.1:8000", stage.url).replace("Qwen3-0.6B", NAME)
    assert (text == block) == ("ganglion.Engine" in block), "it asks this server, or none"
    file = tmp_path / "session.py"
    file.write_text(text, encoding="utf-8")
    environment = {n: v for n, v in os.environ.items() if "PROXY" not in n.upper()}
    ended = subprocess.run(
        [CLIENTS_PYTHON if is_other else sys.executable, file],
        env=environment | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3_000:]
    stage.wait_for_rest()


def test_the_body_of_curl(stage):
    assert CURL is not None
    status, _, answer = post(stage.server, "/v1/chat/completions", json.loads(CURL[1]))
    assert (status, answer["model"]) == (200, NAME)
