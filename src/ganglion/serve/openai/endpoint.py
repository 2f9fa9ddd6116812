"""Endpoint: one POST route: body in, checked, run, and the answer out, whole or as server-sent events.

Made by `routes`. Runs on the event loop and computes nothing there that takes long: large bodies are read, and grammars
compiled, in a thread, since robots share the loop. A client that leaves ends its generation before the next engine step.
"""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from ganglion.errors import CancelledError, GanglionError, InternalError
from ganglion.serve.openai.answer import Prepared, sum_usage
from ganglion.serve.openai.fields import parse_json
from ganglion.serve.openai.refusal import (
    ApiError,
    code_of,
    error_body,
    headers_of,
    in_words_of,
    refused_method,
    status_of,
)
from ganglion.serve.openai.run import Item, Run
from ganglion.serve.refusal import header
from ganglion.service import LanguageService
from ganglion.units import KIB

logger = logging.getLogger(__name__)

BODY_TIMEOUT_S = 10.0  # between two parts of a body
BODY_S = 60.0  # for all of it: a client that sends a byte now and then holds a connection no longer
FIRST_ITEM_S = 1.0  # an error before that has a status of its own; then the stream begins
PING_S = 15.0  # without an item: proxies close streams that stay silent
PING = b": waiting\n\n"
LARGE_BODY_BYTES = 4 * KIB  # what takes longer than a millisecond or so to read
MAX_LOGGED_NAMES = 64
DONE = b"data: [DONE]\n\n"
JSON_TYPE = (b"content-type", b"application/json")
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would wait for a full buffer
]

Prepare = Callable[[object], Prepared]
Compute = Callable[[object], Mapping[str, Any]]
T = TypeVar("T")


class JsonEndpoint:
    """A POST route that answers at once: `compute` makes one JSON body of another."""

    def __init__(self, compute: Compute, *, max_body_bytes: int) -> None:
        self._compute, self._max_body_bytes = compute, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        request_id = f"req-{secrets.token_hex(8)}"
        try:
            data = await read_body(scope, receive, self._max_body_bytes)
            body = await _off_loop(lambda: self._compute(parse_json(data)), len(data))
        except GanglionError as error:
            await send_error(send, error, request_id)
        except Exception:
            logger.exception("%s failed on %s", request_id, scope["path"])
            await send_error(send, InternalError("see the log"), request_id)
        else:
            await send_json(send, 200, body, request_id)


class GenerateEndpoint:
    """A POST route that generates: `prepare` makes a checked request of a body, a Run does the rest."""

    def __init__(self, language: LanguageService, prepare: Prepare, *, max_body_bytes: int) -> None:
        self._language, self._prepare = language, prepare
        self._max_body_bytes = max_body_bytes
        self._logged_names = set[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        reply = _Reply(send, f"req-{secrets.token_hex(8)}")
        try:
            data = await read_body(scope, receive, self._max_body_bytes)
            prepared = await _off_loop(lambda: self._prepare(parse_json(data)), len(data))
            reply.expect(prepared)
            self._log_unknown(prepared.unknown)
            await self._serve(prepared, reply, receive)
        except GanglionError as error:
            logger.info("%s ended: %s: %s", reply.request_id, code_of(error), error)
            await reply.fail(error)
        except asyncio.CancelledError:
            # By the server's end, after its time of grace. The task ends here either way; passed on, uvicorn would log
            # it as a defect.
            await reply.fail(CancelledError("the server is stopping"))
        except Exception:
            logger.exception("%s failed on %s", reply.request_id, scope["path"])
            await reply.fail(InternalError("see the log"))

    async def _serve(self, prepared: Prepared, reply: "_Reply", receive: Receive) -> None:
        run = Run(self._language)
        work = asyncio.create_task(_generate(run, prepared, reply))
        gone = asyncio.create_task(_until_gone(receive))
        behind = asyncio.create_task(run.overrun())
        tasks = (work, gone, behind)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                usage = sum_usage(run.usages)
                logger.info(
                    "%s: %d prompt tokens, %d of them from pages, %d new", reply.request_id,
                    usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_completion_tokens,
                )  # fmt: skip
            else:
                why = "left" if gone.done() else "reads too slowly"
                logger.info("%s: the client %s", reply.request_id, why)
        finally:
            run.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _log_unknown(self, names: set[str]) -> None:
        for name in names - self._logged_names:
            if len(self._logged_names) < MAX_LOGGED_NAMES:
                self._logged_names.add(name)
                logger.info("unknown field %r is ignored", name[:64])


async def _generate(run: Run, prepared: Prepared, reply: "_Reply") -> None:
    has_grammar = any(request.sampling.grammar is not None for request in prepared.requests)
    requests = [replace(request, trace_id=prepared.answer_id) for request in prepared.requests]
    has_pictures = any(request.pictures for request in prepared.requests)
    if has_grammar or has_pictures:  # compiled and read there, which may take long
        await asyncio.to_thread(run.start, requests)
    else:
        run.start(requests, at_once=prepared.num_at_once)
    if prepared.is_streamed and not await _is_changed(run, FIRST_ITEM_S):
        await reply.open()
        while not await _is_changed(run, PING_S):
            await reply.ping()
    while (items := await run.read()) is not None:
        await reply.add(items)
        while prepared.is_streamed and not await _is_changed(run, PING_S):
            await reply.ping()
    await reply.close()


async def _is_changed(run: Run, timeout_s: float) -> bool:
    """Is there something to read within this time?"""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await run.wait()
            return True
    return False


class _Reply:
    """The answer to one request on its way out: whole, as a stream, or an error in the form that still fits."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self._prepared: Prepared | None = None
        self._is_begun = self._is_closed = False

    def expect(self, prepared: Prepared) -> None:
        """From here on the answer has an id and a form."""
        self._prepared, self.request_id = prepared, prepared.answer_id

    async def open(self) -> None:
        """The head of a stream goes out: from here on an error is an event."""
        await self._write(b"", is_last=False)

    async def ping(self) -> None:
        """A comment, which readers of events skip."""
        await self._write(PING, is_last=False)

    async def add(self, items: list[Item]) -> None:
        """All that came since the last time goes out as one write."""
        assert self._prepared is not None, "items before a request"
        events = [event for item in items for event in self._prepared.answer.add(item)]
        if self._prepared.is_streamed:
            await self._write(b"".join(map(event_bytes, events)), is_last=False)

    async def close(self) -> None:
        """All items are there."""
        assert self._prepared is not None, "an end before a request"
        events = self._prepared.answer.close()
        if self._prepared.is_streamed:
            done = DONE if self._prepared.has_done_mark else b""
            await self._write(b"".join(map(event_bytes, events)) + done, is_last=True)
        else:
            await send_json(self._send, 200, self._prepared.answer.whole(), self.request_id)
        self._is_closed = True

    async def fail(self, error: GanglionError) -> None:
        """As a status where nothing was sent yet, else as the last event."""
        if self._is_closed:
            return
        if self._prepared is not None:
            error = in_words_of(error, self._prepared.requests)
        if not self._is_begun or self._prepared is None:
            await send_error(self._send, error, self.request_id)
        else:
            body = error_body(error, self.request_id)["error"]
            events = self._prepared.answer.fail(body)
            await self._write(b"".join(map(event_bytes, events)), is_last=True)
        self._is_closed = True

    async def _write(self, data: bytes, *, is_last: bool) -> None:
        if not self._is_begun:
            self._is_begun = True
            headers = [*STREAM_HEADERS, (b"x-request-id", self.request_id.encode())]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if data or is_last:
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


def event_bytes(event: Mapping[str, Any]) -> bytes:
    """One server-sent event; what has a `type` is also named by it."""
    name = event.get("type")
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json_bytes(event) + b"\n\n"


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8. A number that is not finite is a defect of ours: ValueError."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


async def send_json(
    send: Send,
    status: int,
    body: Mapping[str, Any],
    request_id: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """One whole answer."""
    data = json_bytes(body)
    lines = [
        JSON_TYPE,
        (b"content-length", str(len(data)).encode()),
        (b"x-request-id", request_id.encode()),
        *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": data})


async def send_error(send: Send, error: GanglionError, request_id: str) -> None:
    """One error, in OpenAI's shape."""
    body = error_body(error, request_id)
    await send_json(send, status_of(error), body, request_id, headers_of(error))


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body of a POST. Raises ApiError: 405 other methods, 413 too long, 408 too slow, 400 cut off."""
    if scope["method"] != "POST":
        raise refused_method(scope["method"], scope["path"], allow=("POST",))
    length = header(scope, b"content-length")
    too_large = ApiError(
        413, f"the body is larger than {max_bytes} bytes", code="request_too_large",
        next_step="send less at once",
    )  # fmt: skip
    if length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
        raise too_large
    parts, num_bytes, has_more = [], 0, True
    loop = asyncio.get_running_loop()
    end_s = loop.time() + BODY_S
    while has_more:
        left_s = end_s - loop.time()
        try:
            message = await asyncio.wait_for(receive(), min(BODY_TIMEOUT_S, left_s))
        except TimeoutError:
            late = "no part of the body", BODY_TIMEOUT_S
            if left_s <= BODY_TIMEOUT_S:
                late = "no whole body", BODY_S
            raise ApiError(408, f"{late[0]} for {late[1]:g} s", code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before its body was whole", code="incomplete")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > max_bytes:
            raise too_large
        has_more = message.get("more_body", False)
    return b"".join(parts)


async def _off_loop(compute: Callable[[], T], num_bytes: int) -> T:
    if num_bytes > LARGE_BODY_BYTES:
        return await asyncio.to_thread(compute)
    return compute()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
