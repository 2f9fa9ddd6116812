"""OpenAI's own client against a really bound server: chat, completions, models, tools, structured output."""

import asyncio
import json

import openai
import pytest

from ganglion.config import ServeConfig
from ganglion.errors import OutOfPagesError, OverloadedError
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from ganglion.serve.fake_language import FakeLanguageService, fake_language_spec
from tests.e2e.edge_stage import SPEC
from tests.e2e.openai_stage import STOP_TOOL, TOOL, WAIT_S

KEY = "correct horse battery staple"


@pytest.fixture(scope="module")
def language():
    specs = [fake_language_spec("echo"), fake_language_spec("org/tiny", max_tokens=64)]
    with FakeLanguageService(specs) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(language):
    with (
        FakeService(SPEC) as service,
        ServerThread(service, config=ServeConfig(port=0, api_key=KEY), language=language) as thread,
    ):
        yield thread


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=WAIT_S
    ) as it:
        yield it


def user(text):
    return [{"role": "user", "content": text}]


# --- chat --------------------------------------------------------------------------------------------------------


def test_chat_answers(client):
    answer = client.chat.completions.create(model="echo", messages=user("hällo"))
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "hällo")
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_chat_streams_and_ends_with_usage(client):
    stream = client.chat.completions.create(
        model="echo", messages=user("hällo"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "hällo"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_streams_asynchronously(server):
    async def read():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
            streams = [
                await client.chat.completions.create(
                    model="echo", messages=user(f"number {i}"), stream=True
                )
                for i in range(8)
            ]
            texts = []
            for stream in streams:
                parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
                texts.append("".join(parts))
            return texts

    assert asyncio.run(read()) == [f"number {i}" for i in range(8)]


def test_the_usage_tells_what_was_read_from_pages(client):
    for expected in (0, 1):
        answer = client.chat.completions.create(model="echo", messages=user("the same " * 9))
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert (cached > 64) == bool(expected)
    salted = client.chat.completions.create(
        model="echo", messages=user("the same " * 9), extra_body={"cache_salt": "mine"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_sampling_arrives(client, language):
    client.chat.completions.create(
        model="echo", messages=user("x"), temperature=0.5, top_p=0.9, seed=-3, n=2, stop=["y", "zz"],
        presence_penalty=1, frequency_penalty=-1, logit_bias={"65": -100, "66": 3}, max_completion_tokens=7,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2},
    )  # fmt: skip
    request = language.received[-1]
    sampling = request.sampling
    assert request.num_choices == 2
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.seed == 2**63 - 3
    assert sampling.stop == ("y", "zz")
    assert sampling.logit_bias == {65: -100.0, 66: 3.0}
    assert (sampling.max_tokens, sampling.min_tokens) == (7, 2)
    assert sampling.is_eos_ignored


def test_choices_stop_strings_and_length(client):
    answer = client.chat.completions.create(model="echo", messages=user("one two three"), n=3)
    assert [c.message.content for c in answer.choices] == [
        "one two three", "one two three (1)", "one two three (2)",
    ]  # fmt: skip
    stopped = client.chat.completions.create(model="echo", messages=user("one two"), stop=" two")
    assert stopped.choices[0].message.content == "one"
    assert stopped.choices[0].stop_reason == " two"
    short = client.chat.completions.create(model="echo", messages=user("one two"), max_tokens=3)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one", "length")


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="echo", messages=user("hé"), logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [token.bytes for token in content] == [[0x68], [0xC3], [0xA9]]
    assert content[0].token == "h"
    assert [t.token for t in content[0].top_logprobs] == ["h", "i"]
    stream = client.chat.completions.create(
        model="echo", messages=user("hé"), logprobs=True, stream=True
    )
    streamed = [
        token
        for chunk in stream
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.bytes for token in streamed] == [[0x68], [0xC3], [0xA9]]


def test_parts_of_text_and_the_developer_role(client, language):
    client.chat.completions.create(
        model="echo",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    )  # fmt: skip
    prompt = language.tokenizer("echo").decode(language.received[-1].prompt)
    assert prompt == "<|system|>be brief\n<|user|>ab\n<|assistant|>"


# --- structured output -------------------------------------------------------------------------------------------


def test_json_object_and_schema(client, language):
    answer = client.chat.completions.create(
        model="echo", messages=user("x"), response_format={"type": "json_object"}
    )
    assert json.loads(answer.choices[0].message.content) == {}
    assert language.received[-1].sampling.grammar.text == "{}"
    schema = TOOL["function"]["parameters"]
    answer = client.chat.completions.create(
        model="echo",
        messages=user("x"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "move", "schema": schema, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content) == {"arm": "left", "height_mm": 10}


def test_the_client_parses_into_a_class(client):
    pydantic = pytest.importorskip("pydantic")

    class Step(pydantic.BaseModel):
        name: str
        seconds: int

    class Plan(pydantic.BaseModel):
        steps: list[Step]
        is_safe: bool

    answer = client.chat.completions.parse(model="echo", messages=user("x"), response_format=Plan)
    assert answer.choices[0].message.parsed == Plan(steps=[], is_safe=True)


# --- tools -------------------------------------------------------------------------------------------------------


def test_a_named_tool_is_forced(client):
    answer = client.chat.completions.create(
        model="echo", messages=user("x"), tools=[TOOL, STOP_TOOL],
        tool_choice={"type": "function", "function": {"name": "move_arm"}},
    )  # fmt: skip
    message = answer.choices[0].message
    assert message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert (call.type, call.function.name) == ("function", "move_arm")
    assert json.loads(call.function.arguments) == {"arm": "left", "height_mm": 10}


@pytest.mark.parametrize("is_parallel", [True, False])
def test_some_tool_is_required(client, is_parallel):
    answer = client.chat.completions.create(
        model="echo", messages=user("x"), tools=[TOOL, STOP_TOOL], tool_choice="required",
        parallel_tool_calls=is_parallel,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "move_arm"
    assert json.loads(call.function.arguments) == {"arm": "left", "height_mm": 10}


def test_forced_calls_stream_their_arguments(client):
    with client.chat.completions.stream(
        model="echo", messages=user("x"), tools=[TOOL], tool_choice="required"
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 10
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"arm": "left", "height_mm": 10}


def test_a_model_calls_by_itself_and_reads_the_result(client, language):
    arguments = {"arm": "right", "height_mm": 40}
    text = json.dumps({"name": "move_arm", "arguments": arguments})
    language.say(f"Moving.\n<tool_call>\n{text}\n</tool_call>")
    messages = user("lift the right arm")
    answer = client.chat.completions.create(model="echo", messages=messages, tools=[TOOL])
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("Moving.", "tool_calls")
    assert json.loads(message.tool_calls[0].function.arguments) == arguments
    assert "move_arm" in language.tokenizer("echo").decode(language.received[-1].prompt)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    client.chat.completions.create(
        model="echo", messages=[*messages, message, result], tools=[TOOL]
    )
    prompt = language.tokenizer("echo").decode(language.received[-1].prompt)
    assert "<|tool|>done" in prompt
    assert message.tool_calls[0].id in prompt


def test_two_calls_of_one_answer_there_and_back(client, language):
    """Parallel calls: each with an id of its own, results in any order, whole and streamed alike."""
    said = [
        {"name": "move_arm", "arguments": {"arm": "left", "height_mm": 20}},
        {"name": "stop", "arguments": {}},
    ]
    text = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in said)
    fields = {"model": "echo", "messages": user("both"), "tools": [TOOL, STOP_TOOL]}
    language.say(text, text)
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        folded = [event.type for event in stream].count("tool_calls.function.arguments.done")
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        calls = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert [c.function.name for c in calls] == ["move_arm", "stop"]
        assert [json.loads(c.function.arguments) for c in calls] == [c["arguments"] for c in said]
        assert len({c.id for c in calls}) == 2
    assert folded == 2
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"{call.function.name} done"}
        for call in reversed(whole.message.tool_calls)
    ]
    language.say("Both are done.")
    answer = client.chat.completions.create(
        model="echo", messages=[*user("both"), whole.message, *results], tools=[TOOL, STOP_TOOL]
    )
    assert answer.choices[0].message.content == "Both are done."
    prompt = language.tokenizer("echo").decode(language.received[-1].prompt)
    assert prompt.index("<|tool|>stop done") < prompt.index("<|tool|>move_arm done")


def test_an_assistant_that_said_nothing_may_stand_in_a_conversation(client, language):
    for said in ({"content": ""}, {"content": None, "refusal": "no"}, {"content": []}):
        messages = [*user("x"), {"role": "assistant"} | said, *user("and now?")]
        answer = client.chat.completions.create(model="echo", messages=messages)
        assert answer.choices[0].message.content == "and now?"


def test_one_call_is_left_where_calls_may_not_be_parallel(client, language):
    call = json.dumps({"name": "stop", "arguments": {}})
    language.say(f"<tool_call>{call}</tool_call><tool_call>{call}</tool_call>")
    answer = client.chat.completions.create(
        model="echo", messages=user("x"), tools=[STOP_TOOL], parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls) == 1


def test_a_function_with_a_schema_of_pydantics(client, language):
    pydantic = pytest.importorskip("pydantic")

    class Move(pydantic.BaseModel):
        arm: str
        speed: float

    tool = openai.pydantic_function_tool(Move, name="move")
    language.say(
        '<tool_call>{"name": "move", "arguments": {"arm": "left", "speed": 0.5}}</tool_call>'
    )
    answer = client.chat.completions.parse(model="echo", messages=user("x"), tools=[tool])
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Move(arm="left", speed=0.5)


def test_a_format_beside_tools_gives_either(client, language):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    call = json.dumps({"name": "stop", "arguments": {}})
    messages, finishes = [], []
    for text in ('{"ok": true}', f"<tool_call>{call}</tool_call>"):
        language.say(text)
        answer = client.chat.completions.create(
            model="echo", messages=user("x"), tools=[STOP_TOOL], response_format=form
        )
        messages.append(answer.choices[0].message)
        finishes.append(answer.choices[0].finish_reason)
    assert language.received[-1].sampling.grammar.kind == "lark"
    assert messages[0].content == '{"ok": true}'
    assert messages[1].tool_calls[0].function.name == "stop"
    assert finishes == ["stop", "tool_calls"]


def test_no_tool_is_shown_where_none_may_be_called(client, language):
    client.chat.completions.create(
        model="echo", messages=user("x"), tools=[TOOL], tool_choice="none"
    )
    assert "move_arm" not in language.tokenizer("echo").decode(language.received[-1].prompt)


# --- completions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([256, 97, 98], ["ab"]),
        ([[256, 97], [98]], ["a", "b"]),
    ],
)
def test_completions_take_texts_and_tokens(client, prompt, texts):
    answer = client.completions.create(model="echo", prompt=prompt)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    stream = client.completions.create(model="echo", prompt=prompt, stream=True)
    streamed = [""] * len(texts)
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(client, max_tokens):
    """What lm-eval's local-completions asks for."""
    answer = client.completions.create(
        model="echo", prompt=[[256, 104, 195, 169]], echo=True, logprobs=1, max_tokens=max_tokens,
        temperature=0, seed=1234,
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.text == "hé" + "h" * max_tokens
    logprobs = choice.logprobs
    assert logprobs.tokens[:4] == ["token_id:256", "h", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.token_logprobs == [None] + [-0.25] * (3 + max_tokens)
    assert logprobs.top_logprobs[:2] == [None, {"h": -0.25}]
    assert logprobs.text_offset == [0, 0, 1, 2, 2][: 4 + max_tokens]
    assert answer.usage.completion_tokens == max_tokens


# --- models and errors -------------------------------------------------------------------------------------------


def test_models_are_listed(client):
    models = {model.id: model for model in client.models.list()}
    assert models["echo"].max_model_len == 4096
    assert models["org/tiny"].kind == "language"
    assert models["fake"].kind == "policy"
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-7")


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-7", messages=user("x"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "echo" in caught.value.message


def test_a_prompt_that_does_not_fit(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 64") as caught:
        client.chat.completions.create(model="org/tiny", messages=user("x" * 80))
    assert caught.value.code == "context_length_exceeded"


def test_refusals_have_the_shape_that_the_service_documents(client):
    """Fields, types and statuses as platform.openai.com has them; the classes are those of the package."""
    cases = [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"model": "gpt-7"}, openai.NotFoundError, "model"),
        ({"max_completion_tokens": 10**6}, openai.BadRequestError, "messages"),
        ({"store": True}, openai.BadRequestError, "store"),
    ]
    for fields, kind, param in cases:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**({"model": "echo", "messages": user("x")} | fields))
        error = caught.value
        assert error.body.keys() == {"message", "type", "param", "code"}
        assert (error.type, error.param) == ("invalid_request_error", param)
        assert error.response.headers["content-type"] == "application/json"
        assert error.request_id


def test_the_usage_of_a_stream_comes_once_and_last(client):
    chunks = list(
        client.chat.completions.create(
            model="echo",
            messages=user("abc"),
            stream=True,
            n=2,
            stream_options={"include_usage": True},
        )
    )
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == len("abc") + len("abc (1)")
    plain = list(client.chat.completions.create(model="echo", messages=user("abc"), stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_errors_of_the_service_have_statuses(client, language):
    language.say(OverloadedError("requests", limit=1, retry_after_s=2.5))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="echo", messages=user("x"))
    assert caught.value.response.headers["retry-after"] == "3"
    language.say(OutOfPagesError(kind="kv", need=3, free=1, evictable=1))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="echo", messages=user("x"), stream=True)
    assert caught.value.status_code == 503


def test_a_wrong_key(server):
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model="echo", messages=user("x"))
