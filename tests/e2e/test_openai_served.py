"""OpenAI's client, the edge, the service, the engine and a real model together: what grammars force, what logprobs say."""

import json

import openai
import pydantic
import pytest
import torch
import transformers

from tests.e2e.command import Running
from tests.e2e.openai_stage import STOP_TOOL, TOOL
from tests.language_folder import write_llama

MODEL = "tiny-llama"
USER = [{"role": "user", "content": "lift the left arm"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def client(folder):
    line = ("serve", f"chat={folder}", "--port", "0", "--dtype", "float32")
    with Running(*line, "--arena-bytes", "64 MiB", until="Ctrl-C stops") as server:
        url = server.find(r"OpenAI +(\S+)")
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as it:
            yield it


def check(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "stop":
        assert arguments == {}
    else:
        assert call.function.name == "move_arm"
        assert set(arguments) == {"arm", "height_mm"}
        assert arguments["arm"] in ("left", "right")
        assert arguments["height_mm"] >= 10


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_of_a_random_model_fit_their_schemas(client, seed):
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[TOOL, STOP_TOOL], tool_choice="required", seed=seed,
        parallel_tool_calls=False, max_tokens=700,
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    check(call)


def test_a_forced_call_streams(client):
    with client.chat.completions.stream(
        model=MODEL, messages=USER, tools=[TOOL], seed=1, max_tokens=700,
        tool_choice={"type": "function", "function": {"name": "move_arm"}},
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 10
    check(final.choices[0].message.tool_calls[0])


def test_a_class_is_filled(client):
    class Step(pydantic.BaseModel):
        is_last: bool
        seconds: int

    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, response_format=Step, seed=1, max_tokens=600
    )
    assert isinstance(answer.choices[0].message.parsed, Step)
    response = client.responses.parse(
        model=MODEL, input="x", text_format=Step, max_output_tokens=600, extra_body={"seed": 1}
    )
    assert isinstance(response.output_parsed, Step)


def test_the_prompt_is_scored_as_transformers_scores_it(client, folder):
    """What lm-eval's loglikelihood rests on."""
    prompt = "def main(argv):\n    return len(argv)\n"
    answer = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=0
    )
    ids = torch.tensor([list(prompt.encode())])
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        log_probs = model(ids).logits[0].log_softmax(-1)
    expected = [float(log_probs[i, ids[0, i + 1]]) for i in range(len(prompt) - 1)]
    found = answer.choices[0].logprobs
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    best = [max(top.values()) for top in found.top_logprobs[1:]]
    assert best == pytest.approx(log_probs[:-1].max(-1).values.tolist(), abs=1e-4)
    assert answer.choices[0].text == prompt


def test_a_seed_repeats_an_answer_streamed_or_not(client):
    fields = {"model": MODEL, "prompt": "once", "seed": 11, "n": 2, "max_tokens": 24}
    whole = [choice.text for choice in client.completions.create(**fields).choices]
    streamed = ["", ""]
    for chunk in client.completions.create(**fields, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == whole
    assert whole[0] != whole[1]


def test_clients_that_leave_make_room(client):
    """Each would fill the context; twenty of them left behind would take a long time."""
    for _ in range(20):
        stream = client.completions.create(
            model=MODEL, prompt="x", max_tokens=1_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=4, timeout=5)
    assert answer.usage.completion_tokens <= 4


def test_a_grammar_that_cannot_be_matched(client):
    with pytest.raises(openai.BadRequestError, match="zzz"):
        client.chat.completions.create(
            model=MODEL, messages=USER,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "zzz"}}},
        )  # fmt: skip
