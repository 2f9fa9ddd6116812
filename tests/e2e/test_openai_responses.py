"""`/v1/responses` by OpenAI's own client, against a really bound server."""

import json

import openai
import pytest

from ganglion.errors import InternalError, OutOfPagesError
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from ganglion.serve.fake_language import FakeLanguageService
from tests.e2e.edge_stage import SPEC
from tests.e2e.openai_stage import TOOL, WAIT_S

FLAT_TOOL = {"type": "function", **TOOL["function"]}
ARGUMENTS = {"arm": "left", "height_mm": 10}


@pytest.fixture(scope="module")
def language():
    with FakeLanguageService(step_s=0.0005) as fake:
        yield fake


@pytest.fixture(scope="module")
def client(language):
    with (
        FakeService(SPEC) as service,
        ServerThread(service, language=language) as server,
        openai.OpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_S
        ) as it,
    ):
        yield it


def told(language):
    return language.tokenizer("echo").decode(language.received[-1].prompt)


def test_text_in_text_out(client, language):
    answer = client.responses.create(model="echo", input="hällo", instructions="be brief")
    assert answer.output_text == "hällo"
    assert (answer.status, answer.store) == ("completed", False)
    assert answer.usage.output_tokens == 6
    assert answer.usage.total_tokens == answer.usage.input_tokens + 6
    assert told(language).startswith("<|system|>be brief\n<|user|>hällo\n")


def test_too_few_tokens_leave_it_incomplete(client):
    answer = client.responses.create(model="echo", input="hello", max_output_tokens=4)
    assert answer.output_text == "hell"
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_the_events_of_a_text(client):
    events = list(client.responses.create(model="echo", input="hi", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "hi"
    assert events[0].response.output == []
    assert events[2].item.content == []


def test_the_clients_own_stream_folds_it(client):
    with client.responses.stream(model="echo", input="hello there") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "hello there"


def test_a_conversation_of_items(client, language):
    language.say(
        f"Moving. <tool_call>{json.dumps({'name': 'move_arm', 'arguments': ARGUMENTS})}</tool_call>"
    )
    items = [{"role": "user", "content": [{"type": "input_text", "text": "lift it"}]}]
    answer = client.responses.create(model="echo", input=items, tools=[FLAT_TOOL])
    message, call = answer.output
    assert message.content[0].text == "Moving."
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "move_arm",
        ARGUMENTS,
    )
    items += [item.model_dump(exclude_none=True) for item in answer.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "done"})
    client.responses.create(model="echo", input=items, tools=[FLAT_TOOL])
    assert f'<|assistant|>Moving.\n<|call|>{{"id": "{call.call_id}"' in told(language)
    assert "<|tool|>done" in told(language)


def test_the_events_of_a_forced_call(client):
    events = list(
        client.responses.create(
            model="echo", input="x", tools=[FLAT_TOOL], stream=True,
            tool_choice={"type": "function", "name": "move_arm"},
        )
    )  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds[2] == "response.output_item.added"
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == ARGUMENTS
    assert len(deltas) > 10


def test_an_answer_parsed_into_a_class(client):
    pydantic = pytest.importorskip("pydantic")

    class Step(pydantic.BaseModel):
        name: str
        seconds: int

    answer = client.responses.parse(model="echo", input="x", text_format=Step)
    assert answer.output_parsed == Step(name="text", seconds=0)


def test_logprobs(client):
    answer = client.responses.create(
        model="echo", input="hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = answer.output[0].content[0].logprobs
    assert [item.token for item in logprobs] == ["h", "i"]
    assert len(logprobs[0].top_logprobs) == 2


def test_a_failure_before_the_first_event_has_a_status(client, language):
    language.say(InternalError("secret path /home"))
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model="echo", input="x", stream=True)
    assert "secret" not in str(caught.value)


def test_a_failure_in_the_middle_is_an_event(client, language):
    stream = client.responses.create(
        model="echo",
        input="x",
        max_output_tokens=4_000,
        extra_body={"ignore_eos": True},
        stream=True,
    )
    first = next(stream)
    language.fail(OutOfPagesError(kind="kv", need=3, free=1, evictable=1))
    *_, done, last = stream
    assert first.type == "response.created"
    assert (done.type, done.item.status) == ("response.output_item.done", "incomplete")
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert "need 3 kv pages" in last.response.error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("store", True),
        ("background", True),
        ("conversation", "c"),
    ],
)
def test_state_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo", input="x", **{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")
