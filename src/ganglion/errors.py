"""Error tree: every error a user can meet, each saying what (numbers), why and the next step.

Raised by every module; turned into a reply by `serve` and into an exit code by `cli`. Knows nothing of either.
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names that travel on the wire and label metrics."""

    INVALID_FIELD = "invalid_field"
    UNSUPPORTED_FIELD = "unsupported_field"
    MALFORMED_FRAME = "malformed_frame"
    SESSION_CONFLICT = "session_conflict"
    SUPERSEDED = "superseded"
    DEADLINE_MISSED = "deadline_missed"
    OVERLOADED = "overloaded"
    OUT_OF_PAGES = "out_of_pages"
    MODEL_UNAVAILABLE = "model_unavailable"
    UNAUTHORIZED = "unauthorized"
    UNSAFE_ACTION = "unsafe_action"
    CANCELLED = "cancelled"
    CONNECTION_LOST = "connection_lost"  # the client's own: never on the wire
    TIMED_OUT = "timed_out"  # the client's own: never on the wire
    INTERNAL = "internal"


class GanglionError(Exception):
    """Root of all errors that are meant for a person to read.

    `next_step` is one imperative sentence. `str(error)` is "what: why"; `error.advice` the next step.
    """

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.advice = next_step
        if next_step:
            self.add_note(f"next: {next_step}")


class FieldError(GanglionError):
    """One field of a message or a config does not fit: names it, what was expected and what came."""

    code = ErrorCode.INVALID_FIELD

    def __init__(self, field: str, *, expected: str, got: str, next_step: str = "") -> None:
        super().__init__(f"{field}: expected {expected}, got {got}", next_step=next_step)
        self.field, self.expected, self.got = field, expected, got


class UnsupportedFieldError(GanglionError):
    """A field that we know but do not serve: refused by name instead of silently ignored."""

    code = ErrorCode.UNSUPPORTED_FIELD

    def __init__(self, field: str, *, why: str, next_step: str = "") -> None:
        super().__init__(f"{field}: known but not supported here: {why}", next_step=next_step)
        self.field = field


class WireError(GanglionError):
    """Bytes that are not a valid frame (truncated, nested too deep, forbidden dtype, wrong byte count)."""

    code = ErrorCode.MALFORMED_FRAME


class SessionConflictError(GanglionError):
    """A message names a session that another robot owns."""

    code = ErrorCode.SESSION_CONFLICT

    def __init__(self, session_id: str, *, owner: str, asked_by: str) -> None:
        super().__init__(
            f"session_id {session_id!r} belongs to robot {owner!r}, not to {asked_by!r}",
            next_step="open a session of your own: send another session_id",
        )
        self.session_id = session_id


class SupersededError(GanglionError):
    """A newer observation of the same session arrived before this one was started: newest wins."""

    code = ErrorCode.SUPERSEDED

    def __init__(self, *, seq: int, newest_seq: int) -> None:
        super().__init__(f"observation {seq} was superseded by observation {newest_seq}")


class DeadlineMissedError(GanglionError):
    """The deadline passed before a result was ready; the work was dropped."""

    code = ErrorCode.DEADLINE_MISSED

    def __init__(self, *, late_ms: float, deadline_ms: float) -> None:
        super().__init__(
            f"deadline of {deadline_ms:.1f} ms missed by {late_ms:.1f} ms",
            next_step="send fewer observations per second, raise deadline_ms, or serve fewer robots",
        )


class OverloadedError(GanglionError):
    """A bounded queue is full."""

    code = ErrorCode.OVERLOADED

    def __init__(self, what: str, *, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"{what} is full ({limit})", next_step=f"retry after {retry_after_s:.2f} s"
        )
        self.retry_after_s = retry_after_s


class OutOfPagesError(GanglionError):
    """The pool has no page left to give, even after eviction."""

    code = ErrorCode.OUT_OF_PAGES

    def __init__(self, *, kind: str, need: int, free: int, evictable: int) -> None:
        super().__init__(
            f"need {need} {kind} pages, {free} free + {evictable} evictable",
            next_step="lower serve.max_sessions, or raise memory.arena_bytes",
        )
        self.need, self.free, self.evictable = need, free, evictable


class ModelUnavailableError(GanglionError):
    """A language model is not in memory, and cannot be brought there now."""

    code = ErrorCode.MODEL_UNAVAILABLE

    def __init__(self, message: str, *, retry_after_s: float, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step or f"retry after {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class UnauthorizedError(GanglionError):
    """No key, or a wrong key."""

    code = ErrorCode.UNAUTHORIZED


class UnsafeActionError(GanglionError):
    """The model produced an action that is not finite or lies outside the action bounds."""

    code = ErrorCode.UNSAFE_ACTION


class CancelledError(GanglionError):
    """The request was cancelled by its owner (socket closed, session reset, server stopping)."""

    code = ErrorCode.CANCELLED


class ReplyError(GanglionError):
    """The server's answer to one request is an error, or cannot be read (`malformed_frame`). `code` is as on the wire."""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode,
        seq: int | None = None,
        field: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        error_id: str = "",
        next_step: str = "",
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.code = code
        self.seq, self.field, self.expected, self.got = seq, field, expected, got
        self.error_id = error_id


class ConnectionLostError(GanglionError):
    """The connection to the server is not open (any more)."""

    code = ErrorCode.CONNECTION_LOST


class ReplyTimeoutError(GanglionError):
    """The server did not answer in time; its late answer will be dropped."""

    code = ErrorCode.TIMED_OUT


class InternalError(GanglionError):
    """A defect of ours. The peer gets an id; the details are in the log."""

    code = ErrorCode.INTERNAL


class CheckpointError(GanglionError):
    """A checkpoint folder that cannot be served: names the file or key, expected and got."""

    code = ErrorCode.INVALID_FIELD


class ConfigError(GanglionError):
    """A configuration that cannot be used: names the path and the nearest valid one."""

    code = ErrorCode.INVALID_FIELD


class MissingDependencyError(GanglionError):
    """An optional part is not installed: names the extra or the system package."""

    code = ErrorCode.UNSUPPORTED_FIELD
