"""Routes: where OpenAI's interface is found, over one LanguageService.

Called once by `serve.app`, which checks Host, Origin and key before any of them.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import URLPath
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, NoMatchFound, Route
from starlette.types import Receive, Scope, Send

from ganglion.errors import GanglionError
from ganglion.serve.openai.answer import Prepared
from ganglion.serve.openai.catalog import Catalog
from ganglion.serve.openai.chat import ChatReader
from ganglion.serve.openai.completions import CompletionReader
from ganglion.serve.openai.embeddings import EmbeddingReader
from ganglion.serve.openai.endpoint import GenerateEndpoint, JsonEndpoint, json_bytes
from ganglion.serve.openai.openapi import openapi_body
from ganglion.serve.openai.refusal import (
    ApiError,
    error_body,
    headers_of,
    refused_method,
    status_of,
)
from ganglion.serve.openai.responses import ResponseReader
from ganglion.serve.openai.tokens import TokenReader
from ganglion.service import LanguageService
from ganglion.spec import PolicySpec
from ganglion.units import MIB

MAX_BODY_BYTES = 8 * MIB
MODELS_PATH = "/v1/models"
READING = ("GET", "HEAD")

Read = Callable[[object, int], Prepared]


def openai_routes(language: LanguageService, *, policy: PolicySpec | None) -> list[BaseRoute]:
    """All paths of `openapi`, and that document itself. `policy` is listed among the models, if there is one."""
    catalog, started_s = Catalog(language), unix_s()

    def generate(path: str, read: Read) -> Route:
        prepare = lambda body: read(body, unix_s())  # noqa: E731
        endpoint = GenerateEndpoint(language, prepare, max_body_bytes=MAX_BODY_BYTES)
        return Route(path, endpoint)

    def compute(path: str, make: Callable[[object], Mapping[str, Any]]) -> Route:
        return Route(path, JsonEndpoint(make, max_body_bytes=MAX_BODY_BYTES))

    async def models(request: Request) -> Response:
        listed = [catalog.body(spec, started_s) for spec in catalog.specs()]
        if policy is not None:
            listed.append(_policy_body(policy, started_s))
        return _json({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if policy is not None and name == policy.name:
            return _json(_policy_body(policy, started_s))
        try:
            return _json(catalog.body(catalog.find(name), started_s))
        except GanglionError as error:
            return _json(error_body(error, ""), status_of(error))

    described = openapi_body()

    async def document(request: Request) -> Response:
        return _json(described)

    tokens = TokenReader(catalog)

    async def tokenizer_info(request: Request) -> Response:
        try:
            return _json(tokens.info(request.query_params.get("model")))
        except GanglionError as error:
            return _json(error_body(error, ""), status_of(error))

    return [
        generate("/v1/chat/completions", ChatReader(catalog).read),
        generate("/v1/completions", CompletionReader(catalog).read),
        generate("/v1/responses", ResponseReader(catalog).read),
        generate("/v1/embeddings", EmbeddingReader(catalog).read),
        compute("/tokenize", tokens.tokenize),
        compute("/detokenize", tokens.detokenize),
        Route("/tokenizer_info", tokenizer_info),
        Route("/openapi.json", document),
        Route(MODELS_PATH, models),
        Route(MODELS_PATH + "/{name:path}", model),
        *missing_routes("what is served is listed at /openapi.json"),
    ]


def missing_routes(next_step: str) -> list[BaseRoute]:
    """Any other path or method under `/v1`: a refusal in OpenAI's shape, which says what to do instead."""
    return [_Missing(next_step)]


class _Missing(BaseRoute):
    """Comes last. No pattern of Starlette's: those leave paths out that hold a line feed."""

    def __init__(self, next_step: str) -> None:
        self._next_step = next_step

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Anything below `/v1`, however it is asked for."""
        is_ours = scope["type"] == "http" and scope["path"].startswith("/v1/")
        return (Match.FULL if is_ours else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        """It has no name."""
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """404, or 405 where another method is served."""
        path, method = scope["path"], scope["method"]
        is_model = path == MODELS_PATH or path.startswith(MODELS_PATH + "/")
        if is_model and method not in READING:
            error = refused_method(method, path, allow=READING)
        else:
            error = ApiError(
                404,
                f"Invalid URL ({method} {path[:200]})",
                code="unknown_url",
                next_step=self._next_step,
            )
        response = _json(error_body(error, ""), error.status, headers_of(error))
        await response(scope, receive, send)


def unix_s() -> int:
    """Seconds since 1970, for the `created` of answers: told to people, never computed with."""
    return time.time_ns() // 10**9


def _policy_body(policy: PolicySpec, created_s: int) -> dict[str, Any]:
    head = {"id": policy.name, "object": "model", "created": created_s, "owned_by": "ganglion"}
    return head | {"kind": "policy"} | policy.metadata()


def _json(
    body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(json_bytes(body), status, headers, media_type="application/json")
