"""`cnpp-trt serve`: parses, opens the models, listens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..install import DEMO_MODULES, SERVICE_MODULES, cannot_import
from .options import (
    BackendName,
    BundleSize,
    Plans,
    Precision,
    Presets,
    Threads,
    VramBudget,
    add_command,
    read_bytes,
    user_path,
)
from .serving import (
    TOKEN,
    AccessLog,
    BundleFolders,
    Devices,
    Host,
    MaxImages,
    MaxSteps,
    Port,
    QueueLength,
    note_who_may_call,
    read_token,
    served_bundles,
    worker_options,
)

if TYPE_CHECKING:
    from fastapi import APIRouter

    from ..service.service import Service

_PANELS = {
    "Model": ("model", "bundle", "size", "precision", "preset"),
    "Network": ("host", "port", "token_file", "cors_origin", "demo"),
    "Scheduling": ("max_batch", "batch_window", "queue", "deadline", "drain"),
    "Limits": ("max_images", "max_steps", "max_pixels", "max_body"),
    "Runtime": ("backend", "device", "plans", "vram_budget", "threads"),
    "Output": ("access_log", "log_prompts"),
}
_EXAMPLES = """Examples:

cnpp-trt serve

cnpp-trt serve --model miniature --model miniature-lcm --port 8080 --max-batch 8

cnpp-trt serve --bundle ./bundle --device 0 --device 1 --host 0.0.0.0 --token-file token.txt"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "serve", serve_command, _PANELS, _EXAMPLES)


def serve_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="As for `run`; repeatable. Default: miniature, where there is no --bundle."),
    ] = None,
    bundle: BundleFolders = None,
    size: BundleSize = None,
    precision: Precision = None,
    preset: Presets = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"Its first line is the token that clients must send. Default: {TOKEN}, or none.", callback=user_path
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Of pages that may call, as in https://example.org; repeatable.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="With the page of `cnpp-trt demo`, under /demo/.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, max=16, help="Images that are drawn together.")] = 4,
    batch_window: Annotated[
        float, typer.Option(min=0, max=10, help="Seconds to wait for clients that were answered together.")
    ] = 0.02,
    queue: QueueLength = 64,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds for a request, waiting included.")] = 300.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for accepted requests after SIGTERM.")] = 30.0,
    max_images: MaxImages = 10,
    max_steps: MaxSteps = 150,
    max_pixels: Annotated[int, typer.Option(min=256, max=64_000_000, help="Of an image that is sent.")] = 16_777_216,
    max_body: Annotated[str, typer.Option(help="Of a request, as in 32MiB.")] = "32MiB",
    backend: BackendName = "auto",
    device: Devices = None,
    plans: Plans = None,
    vram_budget: VramBudget = None,
    threads: Threads = None,
    access_log: AccessLog = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="With the prompts.")] = False,
) -> None:
    """Serve images over HTTP: OpenAI's interface, AUTOMATIC1111's with ControlNet, and jobs."""
    from ..runtime.settings.preset import read_presets

    try:
        from ..service.limits import Limits
        from ..service.server import ServerOptions, bind, serve
        from ..service.service import Service
    except ImportError as e:
        raise UserError(cannot_import("cnpp-trt serve", e, *SERVICE_MODULES)) from None
    pages = demo_pages("cnpp-trt serve --demo") if demo else None
    presets = read_presets(preset or [])
    options = [
        replace(each, presets=presets)
        for each in worker_options(device, backend, precision, threads, plans, vram_budget)
    ]
    token = read_token(token_file)
    limits = Limits(
        queue=queue,
        batch=max_batch,
        batch_window=batch_window,
        images=max_images,
        steps=max_steps,
        body_bytes=read_bytes(max_body),
        pixels=max_pixels,
        deadline=deadline,
    )
    found = served_bundles(model, bundle, ["miniature"], size, precision, backend, threads, plans, vram_budget)
    where = ServerOptions(host, port, token, tuple(cors_origin or ()), drain, access_log)
    with bind(host, port) as listener:  # before the models are opened, which takes longer
        note_who_may_call(where)
        service = Service.open(found, options, limits)
        service.log_prompts = log_prompts
        serve(service, listener, where, pages(service) if pages else ())


def demo_pages(command: str) -> Callable[["Service"], list["APIRouter"]]:
    """What makes the routes of the demo, for a command of this name.

    Raises:
        UserError: a package is missing.
    """
    try:
        from ..demo.routes import demo_routes
    except ImportError as e:
        raise UserError(cannot_import(command, e, *DEMO_MODULES)) from None
    return lambda service: [demo_routes(service)]
