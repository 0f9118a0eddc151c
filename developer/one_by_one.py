"""Servers to compare `cnpp-trt serve` with: FastAPI and a lock, one request after the other.

    python -m cnpp_trt.developer.one_by_one BUNDLE [--engine pipeline|diffusers] [--threads 2]

Both read requests and encode images with the code of `cnpp-trt serve`, so that only the drawing differs: the runtime's
pipeline, or diffusers' `StableDiffusionControlNetPipeline` of the same checkpoint in PyTorch.
"""

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import typer

from ..runtime.pipeline import Pipeline
from ..runtime.planning import smallest_request
from ..runtime.result import Result
from ..runtime.settings.request import ResolvedRequest

Engine: TypeAlias = Literal["pipeline", "diffusers"]


def main(bundle: Path, engine: Engine = "pipeline", threads: int = 2, port: int = 0) -> None:
    """Serves until it is killed."""
    import uvicorn
    from fastapi import FastAPI

    from ..service.limits import Limits
    from ..service.models import ServedModel
    from ..service.openai_fields import ImageFields, asked_of
    from ..service.orders import make_order
    from ..service.reply import Reply, images_reply
    from ..service.server import bind
    from ..service.tasks import Outcome
    from ..service.web import from_form

    pipeline, app, alone = Pipeline.open(bundle, threads=threads), FastAPI(), threading.Lock()
    model = ServedModel("miniature", [pipeline], Limits())
    draw = pipeline if engine == "pipeline" else _diffusers(pipeline, threads)
    draw(pipeline.resolve(smallest_request(model.bundle)))

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        order = make_order(model, asked_of(from_form(body, ImageFields)), Limits())
        with alone:
            result = draw(order.request)
        return images_reply(model, Outcome(result, (), 0, 1), Reply(), ())

    listener = bind("127.0.0.1", port)
    print(f"one by one at http://127.0.0.1:{listener.getsockname()[1]} ", file=sys.stderr, flush=True)
    asyncio.run(uvicorn.Server(uvicorn.Config(app, log_config=None)).serve([listener]))


def _diffusers(pipeline: Pipeline, threads: int) -> Callable[[ResolvedRequest], Result]:
    """What draws a request with diffusers, as a result of the runtime's."""
    import torch

    from ..benchmarks.pytorch import PyTorch
    from ..export.checkpoint import Checkpoint

    torch.set_num_threads(threads)
    reference = PyTorch(Checkpoint(pipeline.bundle.manifest.model))

    def draw(request: ResolvedRequest) -> Result:
        with torch.inference_mode():
            images = reference.images(request)
        latents = np.zeros((len(images), 4, 1, 1), np.float32)  # not told to clients
        return Result(images, latents, request, {}, tuple(c.pixels for c in request.controls), (), pipeline)

    return draw


if __name__ == "__main__":
    typer.run(main)
