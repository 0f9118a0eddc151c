"""The server as an application of Ray Serve: one scheduler, and a replica for each GPU that draws.

    serve run cnpp_trt.service.ray_app:app bundle=/models/bundle replicas=8

The deployment `Front` has the interfaces, the queue, jobs and figures of `cnpp-trt serve`, once: a job's result, a
request's progress and what can be drawn together are known in one place. The deployment `Drawer` has a pipeline and
draws one batch at a time; Ray starts its replicas where there are GPUs, and again where one dies.
"""

# Packages of extras that a checkout need not have.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError

from ..bundles.bundle import Bundle
from ..bundles.defaults import SamplingDefaults
from ..bundles.fetching import fetch_bundle, is_address
from ..errors import BackendError, Cancelled, CnppError, UserError
from ..messages import one_line
from ..runtime.images.image_files import Pixels
from ..runtime.nodes import BundleOnNodes
from ..runtime.pipeline import Pipeline
from ..runtime.result import Result
from ..runtime.settings.options import RuntimeOptions
from ..runtime.settings.request import Request, ResolvedRequest, whole_number
from .app import create_app
from .limits import Limits
from .models import names_of
from .service import Service

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp

TOKEN = "CNPP_TRT_TOKEN"
"""The variable of the environment in which `app` finds what clients must send."""
_ATTEMPTS = 3  # replicas that may die of a batch
_EVENT_SECONDS = 600.0  # a replica that says nothing for longer is given up
_ARGUMENTS = ("bundle", "replicas", "backend", "threads", "plans", "max_batch", "deadline")


@dataclass(frozen=True)
class RemoteBackend:
    """What a replica says of its backend.

    Attributes:
        name: as that of `Backend`.
        ahead: as that of `Backend`.
    """

    name: str
    ahead: int

    def memory(self) -> Mapping[str, int]:
        """Nothing: device memory is that of another process."""
        return {}


class Drawer:
    """A replica: the pipeline of each bundle, on one device.

    Args:
        bundles: and how they reach this node.
        options: where and how graphs run.
    """

    def __init__(self, bundles: Sequence[BundleOnNodes], options: RuntimeOptions) -> None:
        self._pipelines = [Pipeline.open(bundle.open(options), options) for bundle in bundles]

    async def about(self, model: int) -> RemoteBackend:
        """The backend of a bundle."""
        backend = self._pipelines[model].backend
        return RemoteBackend(backend.name, backend.ahead)

    async def extract(self, model: int, condition: str, image: Pixels) -> Pixels | CnppError:
        """As `Pipeline.extract`; an error is what it gives."""
        try:
            return await asyncio.to_thread(self._pipelines[model].extract, condition, image)
        except CnppError as e:
            return e

    async def batch(
        self, model: int, requests: Sequence[Request], max_images: int, keep: bool
    ) -> AsyncIterator[tuple[str, Any]]:
        """Draws requests together, as `Pipeline.batch`.

        Yields:
            `progress` with the steps that have ended and how many there are, `step` with what a callback gets (if
            `keep`), and at last `results`, or `error` with what was raised.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        cancel = threading.Event()

        def tell(kind: str, *values: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (kind, values))

        def draw() -> None:
            try:
                found = self._pipelines[model].batch(
                    requests,
                    max_images=max_images,
                    on_progress=partial(tell, "progress"),
                    callback_on_step_end=partial(tell, "step") if keep else None,
                    cancel=cancel,
                )
                tell("results", found)
            except CnppError as e:
                tell("error", e)
            except Exception as e:
                tell("error", CnppError(f"the request failed: {one_line(e)}"))

        drawing = loop.run_in_executor(None, draw)
        try:
            while True:
                kind, values = await events.get()
                yield kind, values
                if kind in ("results", "error"):
                    return
        finally:  # also where nobody reads on: the next batch must find the pipeline free
            cancel.set()
            with suppress(Exception):
                await asyncio.shield(drawing)


class RemotePipeline:
    """What a `Worker` needs of a pipeline, on whichever replica is free. Called from threads alone.

    Args:
        handle: of the deployment `Drawer`.
        model: the index of the bundle there.
        bundle: the same bundle, on this node.
    """

    def __init__(self, handle: "DeploymentHandle[Any]", model: int, bundle: Bundle) -> None:
        self._handle = handle
        self._model = model
        self.bundle = bundle
        self.defaults = SamplingDefaults.of(bundle.manifest)
        self.reason = "on Ray"
        self.backend: RemoteBackend = self._ask("about")

    def resolve(self, request: Request) -> ResolvedRequest:
        """As `Pipeline.resolve`."""
        return request.resolve(self.defaults)

    def extract(self, condition: str, image: Pixels) -> Pixels:
        """As `Pipeline.extract`."""
        found = self._ask("extract", condition, image)
        if isinstance(found, CnppError):
            raise found
        return cast("Pixels", found)

    def __call__(self, request: Request) -> Result:
        """As `Pipeline.__call__`."""
        [result] = self.batch([request], max_images=request.num_images_per_prompt)
        return result

    def batch(
        self,
        requests: Sequence[Request],
        *,
        max_images: int,
        on_progress: Callable[[int, int], None] | None = None,
        callback_on_step_end: Callable[[int, float, NDArray[np.float32]], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Result]:
        """As `Pipeline.batch`; a batch whose replica dies is drawn by another one."""
        keep = callback_on_step_end is not None
        for attempt in range(1, _ATTEMPTS + 1):
            call = self._handle.options(method_name="batch", stream=True)
            stream: Any = call.remote(self._model, requests, max_images, keep)
            try:
                for kind, values in stream:
                    if kind == "results":
                        return cast("list[Result]", values[0])
                    if kind == "error":
                        raise values[0]
                    if kind == "step" and callback_on_step_end is not None:
                        callback_on_step_end(*values)
                    if kind == "progress" and on_progress is not None:
                        on_progress(*values)
                    if cancel is not None and cancel.is_set():
                        stream.cancel()
                        raise Cancelled
            except RayError as e:
                if attempt == _ATTEMPTS:
                    raise BackendError(f"each of {_ATTEMPTS} replicas that drew it died: {one_line(e)}") from None
        raise BackendError("a replica ended before it had drawn anything")

    def _ask(self, method: str, *values: Any) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = self._handle.options(method_name=method).remote(self._model, *values)
                return answer.result(timeout_s=_EVENT_SECONDS)
            except (RayError, TimeoutError) as e:
                if attempt == _ATTEMPTS:
                    raise BackendError(f"no replica answers: {one_line(e)}") from None
        return None


class Front:
    """The interfaces of the server, and its scheduler.

    Args:
        handle: of the deployment `Drawer`.
        bundles: and how they reach this node.
        replicas: of `Drawer`: as many batches are drawn at the same time.
        limits: of requests.
        token: that clients must send.
    """

    def __init__(
        self,
        handle: "DeploymentHandle[Any]",
        bundles: Sequence[BundleOnNodes],
        replicas: int,
        limits: Limits,
        token: str | None,
    ) -> None:
        self._handle = handle
        self._bundles = bundles
        self._replicas = replicas
        self._limits = limits
        self._token = token

    async def __serve_build_asgi_app__(self) -> "ASGIApp":
        """The application; Ray calls this after the constructor."""
        service = await asyncio.to_thread(self._open)
        return create_app(service, token=self._token)

    def _open(self) -> Service:
        opened = [replace(bundle, images=None).open(RuntimeOptions()) for bundle in self._bundles]
        names = names_of([bundle.folder for bundle in opened], [bundle.manifest for bundle in opened])
        models = []
        for i, (name, bundle) in enumerate(zip(names, opened, strict=True)):
            remote = [RemotePipeline(self._handle, i, bundle) for _ in range(self._replicas)]
            models.append((name, cast("list[Pipeline]", remote)))  # it has what workers call
        service = Service(models, self._limits)
        service.start()
        return service


def app(arguments: dict[str, str]) -> "Application":
    """The application that `serve run` and a configuration of Ray Serve name.

    Args:
        arguments: `bundle`, a folder that every node has or an address to fetch from, or several with commas;
            `replicas` (1); `backend` (auto: with GPUs in the cluster a replica has one); `threads` and `plans` as in
            `RuntimeOptions`; `max_batch` (4) and `deadline` (300 seconds) as in `Limits`.

    Raises:
        UserError: an argument cannot be used, or a bundle is none.
    """
    import ray

    for name in arguments:
        if name not in _ARGUMENTS:
            raise UserError(f"there is no argument {name!r}: give {', '.join(_ARGUMENTS)}")
    given = [source for source in str(arguments.get("bundle", "")).split(",") if source]
    if not given:
        raise UserError("give the folder of a bundle that every node has, or an address: bundle=/models/bundle")
    most = _number(arguments, "max_batch", 4, 16)
    bundles = [
        BundleOnNodes.of(Bundle.open(fetch_bundle(source) if is_address(source) else source), source, most)
        for source in given
    ]
    replicas = _number(arguments, "replicas", 1, 10_000)
    threads = _number(arguments, "threads", 0, 1024) or None
    options = RuntimeOptions(str(arguments.get("backend", "auto")), threads=threads, plans=arguments.get("plans"))
    limits = Limits(batch=most, deadline=float(_number(arguments, "deadline", 300, 1_000_000)))
    gpu = options.backend not in ("onnxruntime-cpu", "openvino") and ray.cluster_resources().get("GPU", 0) >= 1
    drawer: Any = serve.deployment(
        Drawer,
        name="Drawer",
        num_replicas=replicas,
        max_ongoing_requests=1,  # a pipeline draws one batch at a time: others go where one is free
        ray_actor_options={"num_gpus": 1} if gpu else {"num_cpus": threads or 1},
    )
    front: Any = serve.deployment(
        serve.ingress()(Front), name="Front", num_replicas=1, max_ongoing_requests=limits.queue + 64
    )
    # Ray shows a replica its own GPU alone.
    drawers = drawer.bind(bundles, replace(options, device=0))
    made: Application = front.bind(drawers, bundles, replicas, limits, os.environ.get(TOKEN) or None)
    return made


def _number(arguments: Mapping[str, Any], name: str, default: int, most: int) -> int:
    try:
        return whole_number(name, int(arguments.get(name, default)), 0 if default == 0 else 1, most)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a whole number up to {most}, not {arguments[name]!r}") from None
