"""What operators and clients ask about the server: models, health, figures."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from .service import Service
from .web import answer


def status_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["Status"])

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that are served, with their sizes, conditions and defaults."""
        return answer({"object": "list", "data": [model.describe() for model in service.models.all]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of the models."""
        return answer(service.models.find(name).describe())

    @router.get("/healthz")
    async def healthz() -> Response:
        """200 as long as the process answers."""
        return answer({"status": "ok"})

    @router.get("/readyz")
    async def readyz() -> Response:
        """200 once the warm-up is over and until the server drains, else 503."""
        if service.ready:
            return answer({"status": "ready"})
        return answer({"status": "draining" if service.draining else "warming up"}, status=503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(await service.in_thread(service.metrics.text), media_type=CONTENT_TYPE_LATEST)

    return router
