"""Routes: where OpenAI's interface is found, over one LanguageService.

Called once by `serve.app`, which checks Host, Origin and key before any of them.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ganglion.errors import GanglionError
from ganglion.serve.openai.answer import Prepared
from ganglion.serve.openai.catalog import Catalog, model_body
from ganglion.serve.openai.chat import ChatReader
from ganglion.serve.openai.completions import CompletionReader
from ganglion.serve.openai.endpoint import GenerateEndpoint, JsonEndpoint, json_bytes
from ganglion.serve.openai.openapi import openapi_body
from ganglion.serve.openai.refusal import ApiError, error_body, status_of
from ganglion.serve.openai.responses import ResponseReader
from ganglion.serve.openai.tokens import TokenReader
from ganglion.service import LanguageService
from ganglion.spec import PolicySpec
from ganglion.units import MIB

MAX_BODY_BYTES = 8 * MIB

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
        listed = [model_body(spec, started_s) for spec in catalog.specs()]
        if policy is not None:
            listed.append(_policy_body(policy, started_s))
        return _json({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if policy is not None and name == policy.name:
            return _json(_policy_body(policy, started_s))
        try:
            return _json(model_body(catalog.find(name), started_s))
        except GanglionError as error:
            return _json(error_body(error, ""), status_of(error))

    described = openapi_body()

    async def document(request: Request) -> Response:
        return _json(described)

    tokens = TokenReader(catalog)
    return [
        generate("/v1/chat/completions", ChatReader(catalog).read),
        generate("/v1/completions", CompletionReader(catalog).read),
        generate("/v1/responses", ResponseReader(catalog).read),
        compute("/tokenize", tokens.tokenize),
        compute("/detokenize", tokens.detokenize),
        Route("/openapi.json", document),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        *missing_routes("what is served is listed at /openapi.json"),
    ]


def missing_routes(next_step: str) -> list[BaseRoute]:
    """Any other path under `/v1`: a refusal in OpenAI's shape, which says what to do instead."""

    async def missing(request: Request) -> Response:
        url = f"{request.method} {request.url.path[:200]}"
        error = ApiError(404, f"Invalid URL ({url})", code="unknown_url", next_step=next_step)
        return _json(error_body(error, ""), 404)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    return [Route("/v1/{path:path}", missing, methods=methods)]


def unix_s() -> int:
    """Seconds since 1970, for the `created` of answers: told to people, never computed with."""
    return time.time_ns() // 10**9


def _policy_body(policy: PolicySpec, created_s: int) -> dict[str, Any]:
    head = {"id": policy.name, "object": "model", "created": created_s, "owned_by": "ganglion"}
    return head | {"kind": "policy"} | policy.metadata()


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(json_bytes(body), status, media_type="application/json")
