"""Conversation: what both clients share: sequence numbers, frames out, answers in. No sockets.

Called by `client.blocking` and `client.asynchronous`. Knows the protocol; drops every answer that nobody wants any more.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from ganglion import wire
from ganglion.clock import Clock
from ganglion.errors import ErrorCode, FieldError, GanglionError, ReplyError, WireError
from ganglion.types import Float32Array, Timing

PROTOCOL = "ganglion/1"
MAX_UNANSWERED = 64  # older requests are given up: newest wins


class Hints(TypedDict, total=False):
    """What a request may say besides the observation and the instruction."""

    seq: int  # counts up by itself
    obs_time_ns: int  # the robot's clock; now by itself
    control_hz: float
    deadline_ms: float  # relative to its arrival at the server
    seed: int  # of the policy's noise
    execution: str  # how the chunk will be used: one of the server's `executions`
    executed_until: int  # the robot's control tick: actions executed so far
    action_prefix: (
        Float32Array  # [rows, action_dim] that run from that tick on, whatever is answered
    )
    inference_delay_hint: int  # control ticks from that tick to the first that the chunk is for


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A chunk of actions and what the server says about it.

    Row i of `actions` is for the i-th control tick from that of observation `context_seq` on.
    """

    seq: int  # of the observation that it answers
    context_seq: int  # of the newest observation that went into it: `seq` or a later one
    actions: Float32Array  # read-only [horizon, action_dim]
    obs_time_ns: int | None  # the robot's own clock, echoed
    session_id: str
    prompt: str  # the instruction that was followed
    is_prompt_overridden: bool  # by an operator
    is_deadline_met: bool
    model_version: str
    context_version: int
    batch_size: int
    timing: Timing
    server_ms: float  # frame received to answer ready, on the server
    round_trip_ms: float  # request sent to reply read, here
    notes: tuple[str, ...] = ()  # what of the request was ignored, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetDone:
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    seq: int
    frame: bytes


Answer = Reply | ReplyError


class Conversation:
    """What both clients share: sequence numbers, frames out, answers in. No sockets. One thread at a time."""

    def __init__(self, *, robot_id: str, session_id: str | None, clock: Clock) -> None:
        self.robot_id = robot_id
        self.session_id = session_id or f"{robot_id}-{secrets.token_hex(6)}"
        self._clock, self._encoder = clock, wire.Encoder()
        self._last_seq = -1
        self._sent_ns: dict[int, int] = {}  # unanswered and still wanted

    def observe(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None,
        seq: int | None = None,
        obs_time_ns: int | None = None,
        control_hz: float | None = None,
        deadline_ms: float | None = None,
        seed: int | None = None,
        execution: str | None = None,
        executed_until: int | None = None,
        action_prefix: Float32Array | None = None,
        inference_delay_hint: int | None = None,
    ) -> Outgoing:
        now_ns = self._clock.now_ns()
        fields: dict[str, Any] = {
            "prompt": prompt,
            "obs_time_ns": now_ns if obs_time_ns is None else obs_time_ns,
            "control_hz": control_hz,
            "deadline_ms": deadline_ms,
            "seed": seed,
            "execution": None if execution is None else str(execution),
            "executed_until": executed_until,
            "action_prefix": action_prefix,
            "inference_delay_hint": inference_delay_hint,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return self._send({**observation, **given}, seq, now_ns)

    def reset(self) -> Outgoing:
        self.forget()
        return self._send({"endpoint": "reset"}, None, self._clock.now_ns())

    def forget(self, seq: int | None = None) -> None:
        """Answers to request `seq`, or to all sent so far, are not wanted any more."""
        if seq is None:
            self._sent_ns.clear()
        else:
            self._sent_ns.pop(seq, None)

    def receive(self, frame: bytes | str) -> Answer | ResetDone | None:
        """What a message answers; None when nobody wants it any more. What cannot be read is a ReplyError."""
        if isinstance(frame, str):
            return ReplyError(frame[:1000], code=ErrorCode.INTERNAL)
        try:
            body = wire.decode(frame)
        except (WireError, FieldError) as error:
            return _unreadable(error, None)
        seq = body.get("obs_seq")
        sent_ns = self._sent_ns.pop(seq, None) if isinstance(seq, int) else None
        if sent_ns is None or not isinstance(seq, int):
            return None
        if "status" in body:
            return ResetDone(seq=seq)
        try:
            if "error" in body:
                return _read_error(body["error"], seq)
            return _read_reply(body, seq, round_trip_ms=(self._clock.now_ns() - sent_ns) * 1e-6)
        except (WireError, FieldError) as error:
            return _unreadable(error, seq)

    def _send(self, message: dict[str, Any], seq: int | None, now_ns: int) -> Outgoing:
        number = self._last_seq + 1 if seq is None else seq
        if number <= self._last_seq:
            raise FieldError(
                "seq", expected=f"more than the last one, {self._last_seq}", got=f"{seq}"
            )
        frame = self._encoder.encode(
            message | {"robot_id": self.robot_id, "session_id": self.session_id, "seq": number}
        )
        self._last_seq = number
        self._sent_ns[number] = now_ns
        if len(self._sent_ns) > MAX_UNANSWERED:
            self.forget(next(iter(self._sent_ns)))
        return Outgoing(seq=number, frame=frame)


def read_metadata(first: bytes | str) -> dict[str, Any]:
    if isinstance(first, str):
        raise WireError("the server's first message is text, not its metadata")
    metadata = wire.decode(first)
    if metadata.get("protocol") != PROTOCOL:
        raise WireError(
            f"the server speaks {metadata.get('protocol', 'plain openpi')!r}, this client {PROTOCOL!r}",
            next_step="use openpi-client with an openpi server",
        )
    return metadata


def _unreadable(error: GanglionError, seq: int | None) -> ReplyError:
    """One answer is lost, the connection is not: messages end where they end."""
    return ReplyError(
        f"cannot read the server's answer: {error}",
        code=ErrorCode.MALFORMED_FRAME,
        seq=seq,
        next_step="use a server and a client of the same version",
    )


def _read_error(body: Any, seq: int) -> ReplyError:
    if not isinstance(body, dict):
        raise WireError(f"answer {seq}: `error` is {wire.describe(body)}, not a map")
    known = {code.value for code in ErrorCode}
    code = body.get("code")
    return ReplyError(
        str(body.get("message", "")),
        code=ErrorCode(code) if code in known else ErrorCode.INTERNAL,
        seq=seq,
        field=body.get("field"),
        expected=body.get("expected"),
        got=body.get("got"),
        error_id=str(body.get("error_id", "")),
        next_step=str(body.get("next_step") or ""),
    )


def _read_reply(body: Mapping[str, Any], seq: int, *, round_trip_ms: float) -> Reply:
    actions = body.get("actions")
    if not isinstance(actions, np.ndarray) or actions.dtype != np.float32 or actions.ndim != 2:
        got = wire.describe(actions)
        raise FieldError("actions", expected="float32 [horizon, action_dim]", got=got)
    try:
        return Reply(
            seq=seq,
            context_seq=_read_context_seq(body, seq),
            actions=actions,
            obs_time_ns=body["obs_time_ns"],
            session_id=body["session_id"],
            prompt=body["prompt"],
            is_prompt_overridden=body["prompt_overridden"],
            is_deadline_met=body["deadline_met"],
            model_version=body["model_version"],
            context_version=body["context_version"],
            batch_size=body["batch_size"],
            timing=Timing(**body["timing"]),
            server_ms=body["server_timing"]["infer_ms"],
            round_trip_ms=round_trip_ms,
            notes=tuple(str(note) for note in body.get("notes", ())),
        )
    except (KeyError, TypeError) as error:
        raise WireError(f"answer {seq} lacks or adds a field: {error}") from error


def _read_context_seq(body: Mapping[str, Any], seq: int) -> int:
    """Servers without a pipeline do not say it: then it is the request's own."""
    context_seq = body.get("context_seq", seq)
    if type(context_seq) is not int or context_seq < seq:
        got = wire.describe(context_seq)
        raise FieldError("context_seq", expected=f"an integer of at least {seq}", got=got)
    return context_seq
