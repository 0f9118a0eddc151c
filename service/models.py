"""The models that are served: each has a queue, and a worker for each of its pipelines."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable
from ..runtime.control.extraction import can_extract
from ..runtime.planning import Plan, open_tokenizer, plan_request
from ..runtime.settings.request import Request
from .errors import ServiceError
from .limits import Limits
from .preview import Previewer
from .queue import TaskQueue
from .workers import OnBatch, Worker

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline


class ServedModel:
    """A bundle with the pipelines that draw it.

    Args:
        id: what clients call it.
        pipelines: of one bundle, each on a device of its own.
        limits: of the queue and of batches.
        on_batch: is told of each batch.

    Attributes:
        bundle: of its pipelines.
        digest: of the bundle.
        size: (width, height) in pixels.
        created: seconds since 1970 at which it was opened.
    """

    def __init__(
        self, id: str, pipelines: Sequence["Pipeline"], limits: Limits, on_batch: OnBatch | None = None
    ) -> None:
        self.id = id
        self.pipelines = tuple(pipelines)
        self.bundle = pipelines[0].bundle
        manifest = self.bundle.manifest
        self.digest = self.bundle.digest
        self.size = (manifest.width, manifest.height)
        self.created = int(time.time())
        self.queue = TaskQueue(limits.queue, limits.batch_window)
        self.previewer = Previewer()
        self.workers = tuple(Worker(p, self.queue, self.previewer, limits.batch, on_batch) for p in pipelines)
        self._tokenizer = open_tokenizer(self.bundle)
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether every worker has drawn its first picture."""
        return all(worker.ready.is_set() for worker in self.workers)

    def plan(self, request: Request) -> Plan:
        """The request as it will be run, with what it shares with those that can run together, and its steps.

        Raises:
            UserError: the request asks for what the bundle does not have.
        """
        resolved = self.pipelines[0].resolve(request)
        with self._lock:
            return plan_request(self.bundle, self._tokenizer, resolved)

    def describe(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        m, defaults = self.bundle.manifest, self.pipelines[0].defaults
        conditions = [c for c in CONDITIONS if c in m.conditions]
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "cnpp-trt",
            "size": f"{m.width}x{m.height}",
            "precision": self.pipelines[0].precision,
            "digest": self.digest,
            "conditions": conditions,
            "extractors": [c for c in conditions if can_extract(self.bundle, c)],
            "defaults": {
                "num_inference_steps": defaults.num_inference_steps,
                "guidance_scale": defaults.guidance_scale,
                "scheduler": defaults.scheduler,
            },
            "backends": [pipeline.backend.name for pipeline in self.pipelines],
            "ready": self.ready,
        }


class Models:
    """The models of a server, by their names."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        if not models:
            raise UserError("there is no model to serve: give one with --model or --bundle")
        self.all = tuple(models)
        self.default = models[0]

    def find(self, name: str | None, size: tuple[int, int] | None = None) -> ServedModel:
        """The model of this name; of several bundles of one model, the one of this size.

        Raises:
            ServiceError: there is none (404), or none of this size (400).
        """
        found = [self.default] if name is None and size is None else list(self.all)
        if name is not None:
            found = [m for m in self.all if m.id == name] or [m for m in self.all if m.bundle.manifest.model == name]
        if not found:
            known = ", ".join(m.id for m in self.all)
            shown = printable(repr(name), 80)
            raise ServiceError(
                404, f"no model {shown} is served: choose from {known}", code="model_not_found", param="model"
            )
        if size is None:
            return found[0]
        for model in found:
            if model.size == size:
                return model
        sizes = ", ".join(dict.fromkeys("{}x{}".format(*m.size) for m in found))
        raise ServiceError(
            400, f"size {size[0]}x{size[1]} is not served: choose from {sizes}", code="unsupported_size", param="size"
        )


def names_of(folders: Sequence[Path], manifests: Sequence[Any]) -> list[str]:
    """What clients call bundles: the model's name, with the size and precision where several have one name.

    Raises:
        UserError: two bundles cannot be told apart.
    """
    plain = [m.model for m in manifests]
    names = [
        name if plain.count(name) == 1 else f"{name}-{m.number_format}-{m.width}x{m.height}"
        for name, m in zip(plain, manifests, strict=True)
    ]
    for name, folder in zip(names, folders, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{printable(folder)} is served twice as {name}: give each bundle once")
    return names
