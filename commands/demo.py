"""`cnpp-trt demo`: the server with a page for people, on models that need nothing but this package."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..install import DEMO_MODULES, cannot_import
from .options import (
    BackendName,
    BundleSize,
    Plans,
    Precision,
    Threads,
    VramBudget,
    add_command,
    echo,
    resolve_bundle,
    runtime_options,
    user_path,
)
from .serve import demo_pages, read_token

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
    bundle: Annotated[
        list[Path] | None, typer.Option(help="A bundle's folder; repeatable.", callback=user_path)
    ] = None,
    size: BundleSize = None,
    precision: Precision = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Its first line is the password that browsers ask for.", callback=user_path),
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, max=16, help="Of a request.")] = 4,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Of a request.")] = 100,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Requests that wait for a model.")] = 64,
    backend: BackendName = "auto",
    device: Annotated[
        list[int] | None, typer.Option(min=0, help="A GPU's index; repeatable: a worker for each.")
    ] = None,
    plans: Plans = None,
    vram_budget: VramBudget = None,
    threads: Threads = None,
    access_log: Annotated[bool, typer.Option(help="A line of JSON on stderr for each request.")] = False,
) -> None:
    """Draw in a browser: paint a segmentation, upload a condition, see how well the picture follows it."""
    try:
        from ..service.limits import Limits
        from ..service.server import ServerOptions, bind, serve
        from ..service.service import Service
    except ImportError as e:
        raise UserError(cannot_import("cnpp-trt demo", e, *DEMO_MODULES)) from None
    pages = demo_pages("cnpp-trt demo")
    devices = device or [0]
    if len(set(devices)) != len(devices):
        raise UserError("--device names one twice: give each once")
    token = read_token(token_file)
    options = [runtime_options(backend, precision, threads, plans, vram_budget, each) for each in devices]
    names = model or ([] if bundle else list(_MODELS))
    found = [
        resolve_bundle(name, folder, size, precision, backend, threads, plans, vram_budget)[0]
        for name, folder in [*((name, None) for name in names), *((None, folder) for folder in bundle or ())]
    ]
    where = ServerOptions(host, port, token, access_log=access_log)
    with bind(host, port) as listener:  # before the models are opened, which takes longer
        if token is None and not where.local:
            echo("note: everybody who reaches this address may draw: ask for a token with --token-file FILE")
        service = Service.open(found, options, Limits(images=max_images, steps=max_steps, queue=queue))
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        echo(f"the page: http://{shown}:{listener.getsockname()[1]}/demo/")
        serve(service, listener, where, pages(service))
