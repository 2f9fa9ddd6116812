"""Health: the routes that machines poll: alive, ready, metrics, models. None of them waits for a model.

Called by `serve.app`. Knows the Service's stats and nothing behind it.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ganglion.metrics import CONTENT_TYPE, Metrics
from ganglion.service import Service


def health_routes(service: Service, metrics: Metrics) -> list[Route]:
    """`/livez /healthz /readyz /metrics /v1/models`."""

    async def livez(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def readyz(request: Request) -> Response:
        stats = service.stats()
        body = {"is_ready": stats.is_ready, "stage": stats.stage, "sessions": len(stats.sessions)}
        return JSONResponse(body, status_code=200 if stats.is_ready else 503)

    async def metrics_text(request: Request) -> Response:
        metrics.observe_stats(service.stats())
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    async def models(request: Request) -> Response:
        spec = service.spec
        model = {"id": spec.name, "object": "model", "owned_by": "ganglion", **spec.metadata()}
        return JSONResponse({"object": "list", "data": [model]})

    return [
        Route("/livez", livez),
        Route("/healthz", livez),  # openpi's clients and its docker files probe this one
        Route("/readyz", readyz),
        Route("/metrics", metrics_text),
        Route("/v1/models", models),
    ]
