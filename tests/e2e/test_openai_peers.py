"""lm-eval, langchain and litellm, each as its users install it, against the real engine: `make clients` makes their environment."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from tests.e2e.command import ROOT
from tests.e2e.language_stage import NAME, language_stage

PYTHON = ROOT / ".peers" / "clients" / "bin" / "python"
PROGRAMS = Path(__file__).parent / "clients"
TIMEOUT_S = 240.0
WIDTH = 64
TASK = [
    {"question": "What lifts a cup?", "choices": ["an arm", "a door"], "gold": 0},
    {"question": "def f(x):", "choices": ["return x", "pass", "\u00e9t\u00e9"], "gold": 1},
    {"question": "Which hand?", "choices": ["left", "right"], "gold": 1},
]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .peers/clients here: make clients")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def stage(folder):
    with language_stage(folder, width=WIDTH, num_layers=2) as it:
        yield it


def told_by(program, *args, home):
    """What a program printed last; whatever it wants from the network is refused."""
    home.mkdir()
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    proxies = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    ended = subprocess.run(
        [PYTHON, PROGRAMS / program, *map(str, args)],
        env=proxies
        | offline
        | {"HF_HOME": str(home), "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3_000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reference(folder, stage):
    return transformers.LlamaForCausalLM.from_pretrained(folder / NAME, dtype=torch.float32)


def scored(reference, context, continuation):
    """The sum of log-probabilities of `continuation`, and whether greedy decoding would have written it."""
    ids = list((context + continuation).encode())
    first = len(context.encode())
    with torch.inference_mode():
        log_probs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows, targets = log_probs[first - 1 : -1], torch.tensor(ids[first:])
    is_greedy = bool((rows.argmax(-1) == targets).all())
    return float(rows.gather(1, targets[:, None]).sum()), is_greedy


def test_lm_eval_scores_as_a_direct_computation(stage, reference, folder):
    file = folder / "task.json"
    file.write_text(json.dumps(TASK), encoding="utf-8")
    home = folder / "lm-eval"
    told = told_by("lm_eval_task.py", stage.url, NAME, file, home, home=home)
    assert (told["backend"], told["is_tokenized"]) == ("remote", True)
    num_right = 0
    for document, scores in zip(TASK, told["scores"], strict=True):
        expected = [scored(reference, document["question"], " " + c) for c in document["choices"]]
        assert [score for score, _ in scores] == pytest.approx([s for s, _ in expected], abs=2e-3)
        assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
        best = max(range(len(expected)), key=lambda choice: expected[choice][0])
        num_right += best == document["gold"]
    assert told["accuracy"] == pytest.approx(num_right / len(TASK))
    assert len(told["texts"]) == len(TASK)
    stage.wait_for_rest()


def test_langchain(stage, folder):
    told = told_by("langchain_calls.py", stage.url, NAME, home=folder / "langchain")
    first, second, third = told["vectors"]
    assert len(first) == WIDTH
    assert first == pytest.approx(third, abs=1e-5)
    assert first != pytest.approx(second, abs=1e-3)
    for name in ("call", "streamed_call"):
        assert told[name]["arm"] in ("left", "right")
        assert told[name]["height_mm"] in (10, 20)
    assert told["call"] == told["streamed_call"]
    assert told["num_pieces"] > 10
    assert told["after_tokens"] <= 8
    for name in ("plan", "called_plan"):
        assert told[name]["target"] in ("door", "drawer")
    assert told["response_tokens"] <= 8
    assert told["num_response_pieces"] >= 2
    assert told["num_logprobs"] <= 4
    assert told["num_batch"] == 3
    assert told["num_async_pieces"] >= 2
    assert isinstance(told["text"], str)
    stage.wait_for_rest()


def test_litellm(stage, folder):
    told = told_by("litellm_calls.py", stage.url, NAME, home=folder / "litellm")
    assert [len(vector) for vector in told["vectors"]] == [WIDTH] * 2
    assert told["streamed"] == told["content"]
    assert 0 < told["num_tokens"] <= 8
    assert told["num_async"] <= 3
    assert told["call"]["arm"] in ("left", "right")
    assert isinstance(told["flag"]["ok"], bool)
    assert told["text_tokens"] <= 4
    assert told["too_long"] == "ContextWindowExceededError"
    assert told["unknown"] == "NotFoundError"
    assert told["wrong"] == "BadRequestError"
    stage.wait_for_rest()
