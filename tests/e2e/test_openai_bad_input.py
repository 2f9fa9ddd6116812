"""Broken and hostile requests: each is refused in OpenAI's shape, by name; the server lives, and nothing runs on."""

import http.client
import json
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ganglion.clock import RealClock
from ganglion.config import ServeConfig
from ganglion.errors import InternalError
from ganglion.serve import app
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from ganglion.serve.fake_language import FakeLanguageService, fake_language_spec
from ganglion.serve.openai import endpoint, routes, run
from tests.e2e.edge_stage import SPEC
from tests.e2e.openai_stage import TOOL, WAIT_S, chat, events, post

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
POSTS = (CHAT, COMPLETIONS, RESPONSES, "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def language():
    with FakeLanguageService(step_s=0.0002) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(language):
    with FakeService(SPEC) as service, ServerThread(service, language=language) as thread:
        yield thread


def refusal(server, path, body, **headers):
    """(status, error): one that has OpenAI's shape."""
    status, _, answer = post(server, path, body, **headers)
    assert status >= 400, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert isinstance(answer["error"]["message"], str)
    return status, answer["error"]


def wait_until(is_so):
    pause, clock = threading.Event(), RealClock()
    limit_s = clock.now_s() + WAIT_S
    while not is_so():
        assert clock.now_s() < limit_s, "it did not happen in time"
        pause.wait(0.002)


# --- bodies that are no requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "cut", "bytes", "nan", "inf", "huge", "surrogate", "deep", "nested", "digits"],
)
def test_what_is_no_json(server, path, body):
    status, error = refusal(server, path, body)
    assert (status, error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"1", b"null", b"[]", b'"text"'])
def test_what_is_no_object(server, path, body):
    status, error = refusal(server, path, body)
    assert (status, error["param"]) == (400, "body")


def test_bodies_that_are_too_large(server, monkeypatch):
    body = b'{"model": "' + b"x" * routes.MAX_BODY_BYTES + b'"}'
    assert refusal(server, CHAT, body)[0] == 413
    # Its length alone is refused: nothing of it is read.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    connection.putrequest("POST", CHAT)
    connection.putheader("content-length", str(10**15))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    connection.close()


def test_a_body_in_parts_is_counted(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    parts = (b" " * 2**20 for _ in range(routes.MAX_BODY_BYTES // 2**20 + 1))
    connection.request(
        "POST", CHAT, body=parts, encode_chunked=True, headers={"transfer-encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("path", POSTS)
def test_only_post(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 405
    assert json.loads(response.read())["error"]["code"] == "method_not_allowed"
    connection.close()


# --- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["x" * 2_000]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x"}] * 2_049}, "messages"),
        ({"model": 5}, "model"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]}, "tools[0].function.parameters.type"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)  # fmt: skip
def test_a_field_that_does_not_fit_is_named(server, language, fields, param):
    num_before = len(language.received)
    status, error = refusal(server, CHAT, chat() | fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(error["message"]) < 400
    assert len(language.received) == num_before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.org/y.png"}}]}]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content[0].type"),
        ({"tools": [TOOL], "structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_is_known_and_not_served_is_refused_by_name(server, fields, param):
    status, error = refusal(server, CHAT, chat() | fields)
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", param)


def test_unknown_fields_and_hints_are_ignored(server):
    fields = {
        "a_new_field": {"x": [1]},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "n": None,
    }
    status, _, answer = post(server, CHAT, chat("x") | fields)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "x")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["x", None]}, "prompt[1]"),
        ({"prompt": [1, 2.5]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [[1, 258]]}, "prompt[0][1]"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 2, "best_of": 4}, "best_of"),
        ({"n": 16, "prompt": ["x"] * 9}, "n"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_completions_name_the_field(server, fields, param):
    status, error = refusal(server, COMPLETIONS, {"prompt": "x"} | fields)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]},
            "input[0].call_id",
        ),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_schema", "name": "a b"}}}, "text.format.name"),
        ({"tools": [TOOL]}, "tools[0].name"),
    ],
)
def test_responses_name_the_field(server, fields, param):
    status, error = refusal(server, RESPONSES, {"input": "x"} | fields)
    assert (status, error["param"]) == (400, param)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    ["model", "messages", "prompt", "input", "n", "stop", "temperature", "tools", "tool_choice", "response_format",
     "logit_bias", "stream", "stream_options", "logprobs", "top_logprobs", "max_tokens", "seed", "text", "include",
     "instructions", "structured_outputs", "tokens", "echo", "metadata", "stop_token_ids", "truncation"]
)  # fmt: skip


@given(
    path=st.sampled_from(POSTS),
    fields=st.dictionaries(NAMES, JSON_VALUES, max_size=4),
    is_whole=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_makes_the_server_fail(server, path, fields, is_whole):
    base = {
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "input": "x",
        "tokens": [1],
    }
    status, _, answer = post(server, path, base | fields if is_whole else fields)
    assert status < 500, answer
    if status >= 400:
        assert set(answer["error"]) == {"message", "type", "param", "code"}


# --- clients that leave, services that fail ----------------------------------------------------------------------


def open_stream(server, body) -> socket.socket:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    raw.sendall(head.encode() + data)
    return raw


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_its_generation(server, language, is_streamed):
    num_before = len(language.cancelled)
    body = chat("x", stream=is_streamed, max_tokens=4_000, ignore_eos=True)
    raw = open_stream(server, body)
    if is_streamed:
        assert b"200" in raw.recv(100)
    else:
        wait_until(lambda: language.num_running == 1)
    raw.close()
    wait_until(lambda: language.num_running == 0)
    assert len(language.cancelled) == num_before + 1


def test_a_client_that_leaves_before_the_first_token(server, language):
    language.block()
    try:
        raw = open_stream(server, chat("x", stream=True))
        wait_until(lambda: language.num_running == 1)
        raw.close()
        wait_until(lambda: language.num_running == 0)
    finally:
        language.unblock()


def test_one_failing_prompt_of_several_ends_them_all(server, language):
    language.say("ok", InternalError("secret"), "ok")
    status, error = refusal(
        server, COMPLETIONS, {"prompt": ["a", "b", "c"], "ignore_eos": True, "max_tokens": 3_000}
    )
    assert (status, error["code"]) == (500, "internal_error")
    assert "secret" not in error["message"]
    wait_until(lambda: language.num_running == 0)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(server, language):
    raw = open_stream(server, chat("x", stream=True, max_tokens=4_000, ignore_eos=True))
    data = raw.recv(1_000)
    language.fail(InternalError("secret"))
    while part := raw.recv(65_536):
        data += part
        if b'"error"' in data:
            break
    raw.close()
    body = data.partition(b"\r\n\r\n")[2]
    assert b"[DONE]" not in body
    assert b"secret" not in body
    assert b'{"error":{"message":"the server failed on this request' in body


def test_a_stream_that_waits_is_open_and_one_that_never_reads_is_cut_off(monkeypatch):
    monkeypatch.setattr(endpoint, "PING_S", 0.2)
    monkeypatch.setattr(run, "MAX_UNREAD", 1_000)
    spec = fake_language_spec(max_tokens=200_000)
    with (
        FakeLanguageService([spec]) as language,
        FakeService(SPEC) as service,
        ServerThread(service, language=language) as server,
    ):
        language.block()
        raw = open_stream(server, chat("x", stream=True, max_tokens=150_000, ignore_eos=True))
        data = b""
        while b": waiting" not in data:
            data += raw.recv(1_000)
        assert data.startswith(b"HTTP/1.1 200")
        language.unblock()
        wait_until(lambda: language.num_running == 0)
        assert len(language.cancelled) == 1
        raw.close()


def test_a_server_that_stops_says_so_in_the_stream(monkeypatch):
    monkeypatch.setattr(app, "STOP_TIMEOUT_S", 1)
    with FakeLanguageService() as language, FakeService(SPEC) as service:
        with ServerThread(service, language=language) as server:
            raw = open_stream(server, chat("a", stream=True))
            assert b"chatcmpl" in raw.recv(10_000)
            raw.close()
            language.block()
            raw = open_stream(server, chat("b", stream=True))
            wait_until(lambda: language.num_running == 1)
            assert b"200" in raw.recv(1_000)
        data = b""
        while part := raw.recv(10_000):
            data += part
        raw.close()
        assert b"the server is stopping" in data
        wait_until(lambda: language.num_running == 0)
        language.unblock()


def test_paths_that_nobody_serves(server):
    status, error = refusal(server, "/v1/moderations", {"input": "x"})
    assert (status, error["code"]) == (404, "unknown_url")
    assert "/openapi.json" in error["message"]
    with FakeService(SPEC) as service, ServerThread(service) as policy_only:
        status, error = refusal(policy_only, CHAT, chat())
        assert status == 404
        assert "chat=MODEL" in error["message"]


def test_a_full_service_says_when_to_come_back():
    with (
        FakeLanguageService(max_waiting=1) as language,
        FakeService(SPEC) as service,
        ServerThread(service, language=language) as server,
    ):
        language.block()
        raw = open_stream(server, chat("x"))
        wait_until(lambda: language.num_running == 1)
        status, headers, answer = post(server, CHAT, chat("x"))
        language.unblock()
        raw.close()
    assert (status, headers["retry-after"]) == (429, "1")
    assert answer["error"]["code"] == "rate_limit_exceeded"


def test_several_prompts_where_only_some_fit_run_none():
    with (
        FakeLanguageService(max_waiting=2) as language,
        FakeService(SPEC) as service,
        ServerThread(service, language=language) as server,
    ):
        language.block()
        assert refusal(server, COMPLETIONS, {"prompt": ["a", "b", "c"]})[0] == 429
        language.unblock()
        wait_until(lambda: language.num_running == 0)
        assert len(language.cancelled) == 2


def test_keys_are_asked_for_in_openais_shape(language):
    with (
        FakeService(SPEC) as service,
        ServerThread(service, config=ServeConfig(port=0, api_key="k"), language=language) as server,
    ):
        for path in POSTS:
            status, error = refusal(server, path, chat())
            assert (status, error["code"]) == (401, "invalid_api_key")
        assert post(server, CHAT, chat("x"), authorization="Bearer k")[0] == 200
        assert refusal(server, CHAT, chat(), host="evil.example")[0] == 403


def test_a_stream_ends_with_done(server):
    status, headers, data = post(server, CHAT, chat("ab", stream=True))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-request-id"].startswith("chatcmpl-")
    *chunks, done = events(data)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "ab"


def test_many_streams_at_once_while_robots_are_served(server, language):
    """Every stream is whole and in order."""
    results = {}

    def read(index):
        text = f"stream {index} " * 5
        _, _, data = post(server, CHAT, chat(text, stream=True))
        chunks = events(data)[:-1]
        results[index] = (
            "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
        )

    threads = [threading.Thread(target=read, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(16), True)


# --- tokens and the document -------------------------------------------------------------------------------------


def test_tokens_there_and_back(server):
    _, _, answer = post(server, "/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert answer["tokens"] == [256, 104, 195, 169]
    assert (answer["count"], answer["max_model_len"]) == (4, 4096)
    _, _, back = post(server, "/detokenize", {"tokens": answer["tokens"]})
    assert back == {"prompt": "hé"}
    _, _, chatted = post(server, "/tokenize", chat("hi"))
    assert chatted["count"] == len("<|user|>hi\n<|assistant|>") + 1


def test_a_body_that_comes_by_drops_has_an_end(server, monkeypatch):
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT_S", 0.4)
    monkeypatch.setattr(endpoint, "BODY_S", 1.0)
    for pause_s, words in (
        (0.05, b"no whole body for 1 s"),
        (5.0, b"no part of the body for 0.4 s"),
    ):
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=pause_s)
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        raw.sendall(b"host: 127.0.0.1\r\ncontent-length: 9999\r\n\r\n{")
        data = b""
        while b"\r\n\r\n" not in data or not data.endswith(b"}}"):
            try:
                data += raw.recv(4_096)
            except TimeoutError:
                raw.sendall(b" ")
        raw.close()
        assert data.startswith(b"HTTP/1.1 408")
        assert words in data
