"""`cnpp-trt demo`: the server with a page for people, on models that need nothing but this package."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..install import DEMO_MODULES, cannot_import
from .options import (
    BundleSize,
    Plans,
    Precision,
    Threads,
    VramBudget,
    add_command,
    echo,
    user_path,
)
from .serve import demo_pages
from .serving import (
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

_MODELS = ("miniature-lcm", "miniature")
"""The first one draws fast enough to follow a brush on a CPU."""
_PANELS = {
    "Model": ("model", "bundle", "size", "precision"),
    "Network": ("host", "port", "token_file"),
    "Limits": ("max_images", "max_steps", "queue"),
    "Runtime": ("backend", "device", "plans", "vram_budget", "threads"),
    "Output": ("access_log",),
}
_EXAMPLES = """Examples:

cnpp-trt demo

cnpp-trt demo --model miniature --model miniature-controlnet

cnpp-trt demo --bundle ./bundle --device 1

cnpp-trt demo --host 0.0.0.0 --token-file token.txt"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "demo", demo_command, _PANELS, _EXAMPLES)


def demo_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="As for `run`; repeatable. Default: miniature-lcm and miniature, where there is no --bundle."
        ),
    ] = None,
    bundle: BundleFolders = None,
    size: BundleSize = None,
    precision: Precision = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Its first line is the password that browsers ask for.", callback=user_path),
    ] = None,
    max_images: MaxImages = 4,
    max_steps: MaxSteps = 100,
    queue: QueueLength = 64,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="As for `run`; repeatable: each draws every model, to switch between and to compare."),
    ] = None,
    device: Devices = None,
    plans: Plans = None,
    vram_budget: VramBudget = None,
    threads: Threads = None,
    access_log: AccessLog = False,
) -> None:
    """Draw in a browser: paint a segmentation, upload a condition, see how well the picture follows it."""
    try:
        from ..service.limits import Limits
        from ..service.server import ServerOptions, bind, serve
        from ..service.service import Service
    except ImportError as e:
        raise UserError(cannot_import("cnpp-trt demo", e, *DEMO_MODULES)) from None
    pages = demo_pages("cnpp-trt demo")
    backends = backend or ["auto"]
    if len(set(backends)) != len(backends):
        raise UserError("--backend names one twice: give each once")
    options = [
        each for name in backends for each in worker_options(device, name, precision, threads, plans, vram_budget)
    ]
    token = read_token(token_file)
    found = served_bundles(model, bundle, _MODELS, size, precision, backends[0], threads, plans, vram_budget)
    where = ServerOptions(host, port, token, access_log=access_log)
    with bind(host, port) as listener:  # before the models are opened, which takes longer
        note_who_may_call(where)
        service = Service.open(found, options, Limits(images=max_images, steps=max_steps, queue=queue))
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        echo(f"the page: http://{shown}:{listener.getsockname()[1]}/demo/")
        serve(service, listener, where, pages(service))
