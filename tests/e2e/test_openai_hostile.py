"""Clients that ask for too much, leave, stall or never come back, against the real engine: one typed error each, nothing left.

What the edge alone refuses is in `test_openai_bad_input`; here is what must also reach, or not reach, the engine.
"""

import asyncio
import json
import socket
import sys
import threading

import openai
import pytest

from ganglion.errors import CancelledError
from ganglion.serve import app
from ganglion.serve.openai import run
from tests.e2e.language_stage import NAME, WAIT_S, language_stage, wait_until
from tests.e2e.openai_stage import TOOL, events

MAX_TOKENS = 1_024
LONG = {"model": NAME, "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    with language_stage(tmp_path_factory.mktemp("models")) as it:
        yield it


@pytest.fixture(scope="module")
def client(stage):
    with openai.OpenAI(
        base_url=stage.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_S
    ) as it:
        yield it


@pytest.fixture(autouse=True)
def _nothing_is_left(stage):
    stage.wait_for_rest()
    yield
    stage.wait_for_rest()


def send(stage, body, path="/v1/completions", *, receive_bytes=None) -> socket.socket:
    """A request on a socket of its own, its answer unread."""
    data = json.dumps(body).encode()
    raw = socket.socket()
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    raw.settimeout(WAIT_S)
    raw.connect(("127.0.0.1", stage.server.port))
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    return raw


def read_all(raw: socket.socket) -> bytes:
    """Until the stream's last chunk."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = raw.recv(1 << 16)
        if not part:
            break
        data += part
    raw.close()
    return data


def user(text):
    return [{"role": "user", "content": text}]


# --- too much ----------------------------------------------------------------------------------------------------


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"messages": user("x" * 2_000)}, 400, "messages", "context_length_exceeded"),
        ({"max_tokens": MAX_TOKENS}, 400, "messages", "context_length_exceeded"),
        ({"model": "gpt-7"}, 404, "model", "model_not_found"),
        ({"n": 10**9}, 400, "n", "invalid_value"),
        ({"stop": ["x"] * 10_000}, 400, "stop", "invalid_value"),
        ({"temperature": 2.5}, 400, "temperature", "invalid_value"),
        ({"response_format": form({"type": "zzz"})}, 400, "response_format.json_schema.schema", "invalid_value"),
        ({"response_format": form({"$ref": "#/nowhere"})}, 400, "response_format.json_schema.schema", "invalid_value"),
        ({"response_format": form({"allOf": [{"type": "string"}, {"type": "integer"}]})}, 400, "response_format.json_schema.schema", "invalid_value"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, 400, "structured_outputs.regex", "invalid_value"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: x"}}}, 400, "structured_outputs.grammar", "invalid_value"),
        ({"extra_body": {"structured_outputs": {"json": "[" * 50_000}}}, 400, "structured_outputs.json", "invalid_value"),
        ({"extra_body": {"structured_outputs": {"json": '{"const": NaN}'}}}, 400, "structured_outputs.json", "invalid_value"),
        ({"response_format": form(deep(100))}, 400, None, "invalid_json"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "object", "properties": {"a": {"type": "zzz"}}}}}], "tool_choice": "required"}, 400, "tools", "invalid_value"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_streamed", [False, True])
def test_one_typed_error(client, stage, fields, status, param, code, is_streamed):
    num_before = len(stage.watched.trails)
    request = {"model": NAME, "messages": user("x"), "stream": is_streamed} | fields
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**request)
    error = caught.value
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.type == "invalid_request_error"
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert len(error.message) < 1_000
    assert error.request_id
    assert len(stage.watched.trails) == num_before


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a": NaN}', '{"a": "\\ud800"}', "{"])
def test_arguments_of_a_call_that_are_no_json(client, text):
    call = {"id": "c", "type": "function", "function": {"name": "move_arm", "arguments": text}}
    messages = [*user("x"), {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=messages)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
    item = {"type": "function_call", "call_id": "c", "name": "move_arm", "arguments": text}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=NAME, input=[item])
    assert caught.value.param == "input[0].arguments"


def test_nan_and_depth_as_bytes(stage):
    """What the client's own encoder would not write."""
    for text in ('{"prompt": "x", "temperature": NaN}', '{"prompt": ' + "[" * 100_000):
        data = text.encode()
        raw = socket.create_connection(("127.0.0.1", stage.server.port), timeout=WAIT_S)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
        raw.sendall(head.encode() + data)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
        raw.close()


def test_a_schema_that_takes_long_is_refused_or_served_while_others_go_on(client):
    schema = {
        "type": "object",
        "properties": {f"field_{i}": {"enum": [f"{i}-{j}" for j in range(12)]} for i in range(300)},
    }
    ended = []

    def ask():
        try:
            client.chat.completions.create(
                model=NAME, messages=user("x"), response_format=form(schema), max_tokens=4
            )
            ended.append(200)
        except openai.BadRequestError as error:
            ended.append(error.status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(3):
        answer = client.completions.create(model=NAME, prompt="x", max_tokens=4)
        assert answer.usage.completion_tokens <= 4
    thread.join()
    assert ended in ([200], [400])


# --- clients that leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("num_read", [0, 1, 20])
def test_a_client_that_leaves_costs_one_more_step_at_most(stage, n, num_read):
    raw = send(stage, LONG | {"n": n})
    data = b""
    while data.count(b"data: ") < num_read:
        data += raw.recv(4_096)
    wait_until(lambda: stage.num_open == 1)
    raw.close()
    stage.wait_for_rest()
    trail = stage.watched.trails[max(stage.watched.trails)]
    assert trail.is_cancelled
    assert isinstance(trail.end, CancelledError)
    assert trail.num_after_cancel <= n  # the step that was under way
    assert trail.num_deltas < LONG["max_tokens"] * n


def test_a_client_that_aborts_its_connection(stage):
    raw = send(stage, LONG)
    raw.recv(200)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close is a reset
    raw.close()
    stage.wait_for_rest()


def test_many_come_and_go(stage):
    """In waves, so that some leave while they wait, some in their prompt and some in their answer."""
    for wave in range(4):
        sockets = [send(stage, LONG | {"prompt": "p" * (1 + 6 * i)}) for i in range(20)]
        for place, raw in enumerate(sockets):
            if place % 3 < wave:
                raw.recv(100)
            raw.close()
    stage.wait_for_rest()
    assert all(trail.end is not None for trail in stage.watched.trails.values())


def test_a_client_that_closes_its_sending_half_has_left(stage):
    """As uvicorn has it: a stream whose client said that it is done is not written to."""
    raw = send(stage, LONG)
    raw.recv(100)
    raw.shutdown(socket.SHUT_WR)
    stage.wait_for_rest()
    raw.close()


def test_half_a_request_reaches_nobody(stage):
    num_before = len(stage.watched.trails)
    halves = []
    for text in (
        "POST /v1/comp",
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 500\r\n\r\n{",
    ):
        raw = socket.create_connection(("127.0.0.1", stage.server.port), timeout=WAIT_S)
        raw.sendall(text.encode())
        halves.append(raw)
    for raw in halves:
        raw.close()
    assert len(stage.watched.trails) == num_before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other names for it")
def test_a_host_that_vanishes_is_noticed(stage, monkeypatch):
    """Nothing on one machine can vanish without a word; so the sockets are asked whether they would notice."""
    found = []
    accept = socket.socket.accept

    def accepted(listening):
        connection, address = accept(listening)
        found.append(connection.dup())
        return connection, address

    monkeypatch.setattr(socket.socket, "accept", accepted)
    raw = send(stage, LONG)
    raw.recv(100)
    raw.close()
    stage.wait_for_rest()
    ours = found[-1]
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    tcp = [ours.getsockopt(socket.IPPROTO_TCP, option) for option in
           (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]  # fmt: skip
    assert tcp[0] + tcp[1] * tcp[2] <= app.DEAD_PEER_S
    for connection in found:
        connection.close()


# --- clients that stall ------------------------------------------------------------------------------------------


def test_a_slow_reader_stalls_nobody_and_gets_all_of_it(stage, client):
    body = LONG | {"n": 4, "max_tokens": 250, "logprobs": 5, "seed": 3}
    slow = send(stage, body, receive_bytes=2_048)
    for i in range(8):
        answer = client.completions.create(model=NAME, prompt=f"{i}", max_tokens=8)
        assert answer.usage.completion_tokens <= 8
    wait_until(lambda: stage.num_open == 0)  # the engine waits for nobody
    *chunks, done = events(b"\n".join(unchunked(read_all(slow))))
    assert done == "[DONE]"
    finishes = [
        c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]
    ]
    assert finishes == ["length"] * 4


def unchunked(data: bytes):
    """The lines of a chunked body."""
    body = data.partition(b"\r\n\r\n")[2]
    text = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        text += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return text.split(b"\n")


def test_one_who_never_reads_is_cut_off(stage, monkeypatch):
    monkeypatch.setattr(run, "MAX_UNREAD", 200)
    num_before = len(stage.watched.trails)
    raw = send(stage, LONG | {"n": 8, "logprobs": 20}, receive_bytes=2_048)
    wait_until(lambda: len(stage.watched.trails) > num_before)
    trail = stage.watched.trails[max(stage.watched.trails)]
    wait_until(lambda: trail.end is not None)
    wait_until(lambda: trail.is_cancelled)  # noted after the end is heard
    stage.wait_for_rest()
    assert isinstance(trail.end, CancelledError)
    raw.close()


def test_one_who_never_reads_does_not_keep_the_server_from_stopping(tmp_path):
    with language_stage(tmp_path) as own:
        raw = send(own, LONG | {"n": 8, "logprobs": 20}, receive_bytes=2_048)
        wait_until(lambda: any(trail.num_deltas > 100 for trail in own.watched.trails.values()))
        stopping = threading.Thread(target=own.server.stop, daemon=True)
        stopping.start()
        stopping.join(30.0)
        assert not stopping.is_alive()
    raw.close()


# --- many at once, and the end -----------------------------------------------------------------------------------


def test_a_hundred_streams(stage, client):
    prompts = [f"stream {i}: " * (1 + i % 5) for i in range(100)]
    fields = {"model": NAME, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    expected = [client.completions.create(prompt=p, **fields).choices[0].text for p in prompts[:8]]

    async def read(asynchronous, prompt):
        stream = await asynchronous.completions.create(prompt=prompt, stream=True, **fields)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def read_all_of_them():
        async with openai.AsyncOpenAI(
            base_url=stage.url + "/v1", api_key="none", max_retries=0, timeout=60
        ) as asynchronous:
            return await asyncio.gather(*(read(asynchronous, prompt) for prompt in prompts))

    texts = asyncio.run(read_all_of_them())
    assert texts[:8] == expected
    assert all(texts)


def test_a_server_that_stops_ends_every_stream(tmp_path):
    with language_stage(tmp_path, width=128, num_layers=4) as own:
        sockets = [send(own, LONG | {"prompt": f"{i}", "n": 4}) for i in range(12)]
        for raw in sockets:
            assert raw.recv(16).startswith(b"HTTP/1.1 200")
        own.server.stop()
        for raw in sockets:
            body = b"\n".join(unchunked(b"\r\n\r\n" + read_all(raw).partition(b"\r\n\r\n")[2]))
            *_, last = events(body)
            assert last == "[DONE]" or last["error"]["code"] == "cancelled"
        own.wait_for_rest()


def test_tools_that_are_forced_end_with_their_client(stage):
    body = {
        "model": NAME, "messages": user("x"), "tools": [TOOL], "tool_choice": "required", "stream": True, "n": 2,
    }  # fmt: skip
    raw = send(stage, body, "/v1/chat/completions")
    raw.recv(100)
    raw.close()
