"""`cnpp-trt package`: a bundle for another server; parses, calls one function, prints."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from ..bundles.bundle import Bundle
from ..errors import UserError
from ..files import require_writable
from ..messages import printable
from .options import BackendName, Json, Plans, Threads, add_command, echo, require_choice, show, user_path
from .serving import QueueLength

_PANELS = {
    "Model": ("name", "version", "graphs"),
    "Runtime": ("max_batch", "batch_window", "queue", "backend", "threads", "plans"),
    "Output": ("triton", "as_json"),
}
_EXAMPLES = """Examples:

cnpp-trt package ./bundle --triton ./models

cnpp-trt package ./bundle --triton ./models --backend onnxruntime-cpu --max-batch 8 --graphs onnx"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "package", package_command, _PANELS, _EXAMPLES)


def package_command(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", callback=user_path)],
    *,
    name: Annotated[str | None, typer.Option(help="Of the model. Default: the bundle's model.")] = None,
    version: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Of the model; Triton runs the latest.")] = 1,
    graphs: Annotated[
        str | None, typer.Option(help="Each graph as a model of its own too: onnx, or tensorrt from the plan store.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=16, help="Images that are drawn together; 1 batches none.")] = 4,
    batch_window: Annotated[
        float, typer.Option(min=0, max=10, help="Seconds that a request waits at most for others.")
    ] = 0.02,
    queue: QueueLength = 64,
    backend: BackendName = "auto",
    threads: Threads = None,
    plans: Plans = None,
    triton: Annotated[
        Path, typer.Option(help="The folder of the model repository; models are added to it.", callback=user_path)
    ],
    as_json: Json = False,
) -> None:
    """Write a bundle as a model repository of Triton Inference Server."""
    from ..deploy.triton_config import ModelSettings
    from ..deploy.triton_repository import GRAPHS, package
    from ..runtime.settings.options import BACKENDS

    require_choice("backend", backend, BACKENDS)
    if graphs is not None:
        require_choice("--graphs", graphs, GRAPHS)
    opened = Bundle.open(bundle)
    chosen = name or re.sub(r"[^A-Za-z0-9_.-]", "-", opened.manifest.model)[:64]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", chosen):
        raise UserError(
            f"{printable(repr(chosen), 80)} cannot be a model's name: give --name of letters, digits, _, . and -"
        )
    require_writable(triton, "--triton")
    where = None if plans is None else str(plans.absolute())
    settings = ModelSettings(max_batch, batch_window, queue, backend, threads, where)
    made = package(opened, triton, chosen, settings, version=version, graphs=graphs)
    if as_json:
        graph_models = [path.name for path in made.graphs]
        print(json.dumps({"model": chosen, "version": version, "graphs": graph_models, "bytes": made.size}))
    else:
        more = f" and {len(made.graphs)} graphs" if made.graphs else ""
        echo(f"{chosen} version {version}{more}, {made.size / 2**20:.1f} MiB: tritonserver --model-repository {triton}")
        show(str(made.folder))
