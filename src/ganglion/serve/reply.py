"""Reply: what the edge answers a robot, as maps and texts. The last look at every action that leaves the server.

Called by `serve.robot`. Of a reply only `actions` is an array: openpi's chunk broker slices every array by control tick.
"""

from typing import Any

import numpy as np

from ganglion.errors import (
    FieldError,
    GanglionError,
    InternalError,
    UnsafeActionError,
    UnsupportedFieldError,
)
from ganglion.spec import PolicySpec
from ganglion.types import ActionChunk, SessionId


class ActionChecker:
    """Lets only finite actions of the right shape and within the policy's bounds pass."""

    def __init__(self, spec: PolicySpec) -> None:
        self._shape = (spec.horizon, spec.action_dim)
        self._low = np.asarray(spec.action_low, np.float32)
        self._high = np.asarray(spec.action_high, np.float32)

    def check(self, chunk: ActionChunk) -> None:
        """Raises UnsafeActionError naming the first bad number."""
        actions = chunk.actions
        if actions.shape != self._shape or actions.dtype != np.float32:
            raise UnsafeActionError(
                f"chunk is {actions.dtype.name} {list(actions.shape)}, "
                f"the policy promises float32 {list(self._shape)}"
            )
        is_safe = (actions >= self._low) & (actions <= self._high)  # false for NaN
        if not is_safe.all():
            row, dim = np.argwhere(~is_safe)[0]
            raise UnsafeActionError(
                f"action {row}, dimension {dim} is {actions[row, dim]}, "
                f"outside [{self._low[dim]}, {self._high[dim]}]",
                next_step="hold the robot; the policy's output is not usable",
            )


def chunk_map(
    chunk: ActionChunk,
    *,
    service_ms: float,
    prev_total_ms: float | None,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """openpi's reply plus ours.

    `service_ms`: frame received to outcome back on the event loop. `notes`: what of the request was ignored, and why.
    """
    timing = chunk.timing
    server_timing = {"infer_ms": service_ms}
    if prev_total_ms is not None:  # as in openpi: from the second reply on
        server_timing["prev_total_ms"] = prev_total_ms
    return {
        "actions": chunk.actions,
        "policy_timing": {"infer_ms": timing.infer_ms},
        "server_timing": server_timing,
        "obs_seq": chunk.obs_seq,
        "obs_time_ns": chunk.obs_time_ns,
        "session_id": chunk.session_id,
        "model_version": chunk.model_version,
        "context_version": chunk.context_version,
        "context_seq": chunk.context_seq,
        "batch_size": chunk.batch_size,
        "deadline_met": chunk.is_deadline_met,
        "prompt": chunk.prompt,
        "prompt_overridden": chunk.is_prompt_overridden,
        "notes": list(notes),
        "timing": {
            "queue_ms": timing.queue_ms,
            "perceive_ms": timing.perceive_ms,
            "generate_ms": timing.generate_ms,
            "wait_ms": timing.wait_ms,
            "infer_ms": timing.infer_ms,
        },
    }


def reset_map(session_id: SessionId, seq: int | None) -> dict[str, Any]:
    """The answer to `endpoint: reset`."""
    body: dict[str, Any] = {"status": "reset successful", "session_id": session_id}
    return body if seq is None else body | {"obs_seq": seq}


def error_map(error: GanglionError, error_id: str, seq: int) -> dict[str, Any]:
    """The answer to a request with `seq` that failed."""
    field = expected = got = None
    if isinstance(error, FieldError):
        field, expected, got = error.field, error.expected, error.got
    elif isinstance(error, UnsupportedFieldError):
        field = error.field
    return {
        "error": {
            "code": str(error.code),
            "message": _message(error),
            "field": field,
            "expected": expected,
            "got": got,
            "next_step": error.advice,
            "error_id": error_id,
        },
        "obs_seq": seq,
    }


def error_text(error: GanglionError, error_id: str) -> str:
    """The answer to a plain openpi request that failed: its client raises this text."""
    advice = f"; next: {error.advice}" if error.advice else ""
    return f"{error.code}: {_message(error)}{advice} (error {error_id})"


def _message(error: GanglionError) -> str:
    """What the peer may read. A defect's details stay in the log."""
    if isinstance(error, InternalError):
        return "the server failed on this request; its log has the details under this error id"
    return str(error)
