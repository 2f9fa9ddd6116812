"""Refusal: errors in OpenAI's shape, with the statuses that its clients act upon.

Called by everything in `serve.openai`. Knows neither sockets nor requests. What a peer reads never holds a traceback, a path
or an address: a defect of ours is an id, whose details stand in the log.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ganglion.errors import (
    ErrorCode,
    FieldError,
    GanglionError,
    InternalError,
    ModelUnavailableError,
    OverloadedError,
    UnsupportedFieldError,
)
from ganglion.generation import GenerateRequest, GrammarKind

# Which status a client gets. openai's own client tries 408, 409, 429 and 5xx again by itself, nothing else.
STATUSES: dict[ErrorCode, int] = {
    ErrorCode.INVALID_FIELD: 400,
    ErrorCode.UNSUPPORTED_FIELD: 400,
    ErrorCode.MALFORMED_FRAME: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.OUT_OF_PAGES: 503,
    ErrorCode.MODEL_UNAVAILABLE: 503,
    ErrorCode.DEADLINE_MISSED: 503,
    ErrorCode.CANCELLED: 503,
}
TYPES: dict[int, str] = {401: "authentication_error", 429: "rate_limit_error"}
CODES: dict[ErrorCode, str] = {
    ErrorCode.INVALID_FIELD: "invalid_value",
    ErrorCode.UNSUPPORTED_FIELD: "unsupported_parameter",
    ErrorCode.MALFORMED_FRAME: "invalid_json",
    ErrorCode.UNAUTHORIZED: "invalid_api_key",
    ErrorCode.OVERLOADED: "rate_limit_exceeded",
}


class ApiError(GanglionError):
    """A refusal with a status of its own, where the error tree has none: 404, 405, 408, 413.

    `type` is OpenAI's family of errors ("invalid_request_error"), `param` the path of the field, `code` a stable name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        next_step: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.status, self.param, self.api_code = status, param, code
        self.headers = dict(headers or {})


def refused_method(method: str, path: str, *, allow: Collection[str]) -> ApiError:
    """405, with the methods that are served."""
    return ApiError(
        405,
        f"Not allowed to {method[:16]} on {path[:200]}",
        code="method_not_allowed",
        next_step=f"use {' or '.join(allow)}",
        headers={"allow": ", ".join(allow)},
    )


def in_words_of(error: GanglionError, requests: Sequence[GenerateRequest]) -> GanglionError:
    """The same error, named by the field that was sent: who compiles grammars knows only of which kind they are."""
    if isinstance(error, FieldError) and error.field in set(GrammarKind):
        for request in requests:
            grammar = request.sampling.grammar
            if grammar is not None and grammar.kind == error.field and grammar.path:
                return FieldError(
                    grammar.path, expected=error.expected, got=error.got, next_step=error.advice
                )
    return error


def status_of(error: GanglionError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ApiError):
        return error.status
    return STATUSES.get(error.code, 500)


def headers_of(error: GanglionError) -> dict[str, str]:
    """What the error brings along; `Retry-After`, in whole seconds, where coming back helps."""
    if isinstance(error, ApiError):
        return error.headers
    if isinstance(error, OverloadedError | ModelUnavailableError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return {"retry-after": "1"} if status_of(error) == 503 else {}


def error_body(error: GanglionError, error_id: str) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; `error_id` is told where the log has more."""
    status = status_of(error)
    default = "invalid_request_error" if status < 500 else "server_error"
    return {
        "error": {
            "message": message_of(error, error_id),
            "type": TYPES.get(status, default),
            "param": _param(error),
            "code": code_of(error),
        }
    }


def message_of(error: GanglionError, error_id: str) -> str:
    """What went wrong and what to do next, for a person."""
    if isinstance(error, InternalError) or status_of(error) == 500:
        return f"the server failed on this request; its log has the details under {error_id}"
    return f"{error}; next: {error.advice}" if error.advice else str(error)


def code_of(error: GanglionError) -> str:
    """A stable name of what went wrong."""
    if isinstance(error, ApiError):
        return error.api_code
    return CODES.get(error.code, "internal_error" if status_of(error) == 500 else str(error.code))


def _param(error: GanglionError) -> str | None:
    if isinstance(error, ApiError):
        return error.param
    return error.field if isinstance(error, FieldError | UnsupportedFieldError) else None
