"""Request: what one frame of a robot asks for, checked against the served policy's spec.

Called by `serve.robot`. Knows neither sockets nor the Service: an unpacked map in, an Observation or a reset out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganglion import wire
from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.spec import PolicySpec, ViewSpec
from ganglion.types import (
    Execution,
    Float32Array,
    Observation,
    RobotId,
    SessionId,
    UInt8Array,
)
from ganglion.wire import WireLimits

MAX_INT = 2**63 - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_CONTROL_HZ = 1_000.0
MAX_DEADLINE_MS = 600_000.0
MAX_ID_LENGTH = 128

_ID = re.compile(
    rf"[\x21-\x7e]{{1,{MAX_ID_LENGTH}}}"
)  # printable ASCII: ids stand in logs and pages
_EXPECTED_ID = f"1..{MAX_ID_LENGTH} printable ASCII characters without spaces"

ENVELOPE_FIELDS = frozenset(
    {
        "endpoint", "robot_id", "session_id", "seq", "obs_time_ns", "control_hz", "deadline_ms", "seed", "prompt",
        "execution", "executed_until", "action_prefix", "inference_delay_hint",
    }
)  # fmt: skip

# Fields of the protocols around us that would change the answer if we served them: refused, never ignored.
UNSUPPORTED_FIELDS: dict[str, str] = {
    "noise": "flow noise comes from `seed`",
    "priority": "all robots are served by deadline",
    "episode_id": "nothing is recorded by episode",
    "sampling_params": "the number of flow steps is the server's",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """An observation to be answered with a chunk."""

    observation: Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetRequest:
    """Forget the session's context."""

    session_id: SessionId
    robot_id: RobotId


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Who sends, where a frame does not say."""

    robot_id: RobotId
    session_id: SessionId


class RequestReader:
    """Checks unpacked frames against one spec. Holds no state: one serves all connections."""

    def __init__(self, spec: PolicySpec, limits: WireLimits) -> None:
        self._spec, self._limits = spec, limits
        self._known = ENVELOPE_FIELDS | {view.key for view in spec.views} | {spec.state_key}
        self._unsupported = UNSUPPORTED_FIELDS.keys() - self._known
        self._low = np.asarray(spec.action_low, np.float32)
        self._high = np.asarray(spec.action_high, np.float32)

    def read_seq(self, message: Mapping[str, Any]) -> int | None:
        """The request's sequence number, read first so that every later error can carry it."""
        return _read_int(message, "seq")

    def unknown_keys(self, message: Mapping[str, Any]) -> set[str]:
        """Keys that mean nothing here: ignored, since robots send more than one policy needs."""
        return message.keys() - self._known

    def read(
        self, message: Mapping[str, Any], *, sender: Sender, seq: int
    ) -> InferRequest | ResetRequest:
        """The request in `message`. Raises FieldError or UnsupportedFieldError naming one field."""
        for field in self._unsupported & message.keys():
            raise UnsupportedFieldError(
                field,
                why=UNSUPPORTED_FIELDS[field],
                next_step=f"leave {field!r} out",
            )
        robot_id = RobotId(_read_id(message, "robot_id") or sender.robot_id)
        session_id = SessionId(_read_id(message, "session_id") or sender.session_id)
        match message.get("endpoint"):
            case None | "infer":
                pass
            case "reset":
                return ResetRequest(session_id=session_id, robot_id=robot_id)
            case other:
                raise FieldError(
                    "endpoint", expected='"infer" or "reset"', got=wire.describe(other)
                )
        return InferRequest(
            observation=Observation(
                session_id=session_id,
                robot_id=robot_id,
                seq=seq,
                images={view.key: self._read_view(message, view) for view in self._spec.views},
                state=self._read_state(message),
                prompt=self._read_prompt(message),
                obs_time_ns=_read_int(message, "obs_time_ns"),
                control_hz=_read_positive(message, "control_hz", MAX_CONTROL_HZ),
                deadline_ms=_read_positive(message, "deadline_ms", MAX_DEADLINE_MS),
                seed=_read_int(message, "seed"),
                execution=self._read_execution(message),
                executed_until=_read_int(message, "executed_until"),
                action_prefix=self._read_prefix(message),
                inference_delay_hint=_read_int(message, "inference_delay_hint", self._spec.horizon),
            )
        )

    def _read_view(self, message: Mapping[str, Any], view: ViewSpec) -> UInt8Array:
        shape = (view.height, view.width, 3)
        packed = message.get(view.key)
        if packed is None:
            raise self._missing(view.key, f"uint8 {list(shape)}", message)
        image = wire.read_array(view.key, packed, self._limits)
        if image.dtype != np.uint8 or image.shape != shape:
            raise FieldError(
                view.key,
                expected=f"uint8 {list(shape)}",
                got=wire.describe(image),
                next_step="send height x width x RGB at the policy's size; resize on the robot",
            )
        return image

    def _read_state(self, message: Mapping[str, Any]) -> Float32Array:
        key, dim = self._spec.state_key, self._spec.state_dim
        packed = message.get(key)
        if packed is None:
            raise self._missing(key, f"float32 [{dim}]", message)
        state = wire.read_array(key, packed, self._limits)
        if state.dtype not in (np.float32, np.float64) or state.shape != (dim,):
            expected = f"float32 or float64 [{dim}]"
            raise FieldError(key, expected=expected, got=wire.describe(state))
        for index, value in enumerate(state.tolist()):
            if not abs(value) <= MAX_FLOAT32:  # also refuses NaN
                got = f"{value} at index {index}"
                raise FieldError(key, expected="finite numbers within float32", got=got)
        return state.astype(np.float32, copy=False)

    def _read_prompt(self, message: Mapping[str, Any]) -> str:
        prompt = message.get("prompt")
        if prompt is None:
            raise FieldError(
                "prompt",
                expected="the instruction as text",
                got="nothing",
                next_step='send "prompt"; an empty text is allowed for a policy that needs none',
            )
        if not isinstance(prompt, str):
            raise FieldError("prompt", expected="text", got=wire.describe(prompt))
        num_bytes = len(prompt.encode())
        if num_bytes > self._spec.max_prompt_bytes:
            raise FieldError(
                "prompt",
                expected=f"at most {self._spec.max_prompt_bytes} bytes of UTF-8",
                got=f"{num_bytes} bytes",
                next_step="shorten the instruction",
            )
        return prompt

    def _read_execution(self, message: Mapping[str, Any]) -> Execution:
        name = message.get("execution")
        if name is None:
            return Execution.NAIVE
        if name not in tuple(Execution):
            raise FieldError(
                "execution", expected=f"one of {', '.join(Execution)}", got=wire.describe(name)
            )
        if name not in self._spec.executions:
            raise UnsupportedFieldError(
                "execution",
                why=f"the policy {self._spec.name!r} cannot do {name!r}",
                next_step=f"send one of {', '.join(self._spec.executions)}",
            )
        return Execution(name)

    def _read_prefix(self, message: Mapping[str, Any]) -> Float32Array | None:
        """Refused as a whole when one of its actions is one that the policy itself may not give."""
        key, spec = "action_prefix", self._spec
        packed = message.get(key)
        if packed is None:
            return None
        if spec.max_prefix == 0:
            raise UnsupportedFieldError(
                key,
                why=f"the policy {spec.name!r} cannot continue given actions",
                next_step=f"leave {key!r} out",
            )
        prefix = wire.read_array(key, packed, self._limits)
        if prefix.dtype not in (np.float32, np.float64) or prefix.shape[1:] != (spec.action_dim,):
            expected = f"float32 or float64 [rows, {spec.action_dim}]"
            raise FieldError(key, expected=expected, got=wire.describe(prefix))
        if len(prefix) > spec.max_prefix:
            raise FieldError(
                key,
                expected=f"at most {spec.max_prefix} rows, which this policy can continue",
                got=f"{len(prefix)} rows",
                next_step=f"send the first {spec.max_prefix} rows",
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: out of bounds
            actions: Float32Array = prefix.astype(np.float32, copy=False)
        is_good = (actions >= self._low) & (actions <= self._high)  # false for NaN
        if not is_good.all():
            row, dim = (int(at) for at in np.argwhere(~is_good)[0])
            raise FieldError(
                key,
                expected=f"finite actions within [{spec.action_low[dim]}, {spec.action_high[dim]}]",
                got=f"{prefix[row, dim]} at row {row}, dimension {dim}",
            )
        return actions if len(actions) else None

    def _missing(self, key: str, expected: str, message: Mapping[str, Any]) -> FieldError:
        arrays = [name[:40] for name, value in message.items() if wire.is_array(value)][:8]
        return FieldError(
            key,
            expected=expected,
            got=f"nothing (arrays sent: {', '.join(arrays) or 'none'})",
            next_step="send the keys that the first frame of this connection lists",
        )


def _read_int(message: Mapping[str, Any], field: str, limit: int = MAX_INT) -> int | None:
    value = message.get(field)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= limit:
        last = "2**63-1" if limit == MAX_INT else str(limit)
        raise FieldError(field, expected=f"an integer in 0..{last}", got=wire.describe(value))
    return value


def _read_positive(message: Mapping[str, Any], field: str, limit: float) -> float | None:
    value = message.get(field)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= limit:
        expected = f"a number above 0 and at most {limit:g}"
        raise FieldError(field, expected=expected, got=wire.describe(value))
    return float(value)


def _read_id(message: Mapping[str, Any], field: str) -> str | None:
    value = message.get(field)
    if value is None:
        return None
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise FieldError(field, expected=_EXPECTED_ID, got=wire.describe(value))
    return value
