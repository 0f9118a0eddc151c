"""What `serve` and `demo` have in common: options of a server, its models, and who may call."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..messages import printable
from .options import echo, resolve_bundle, runtime_options, user_path

if TYPE_CHECKING:
    from ..runtime.settings.options import RuntimeOptions
    from ..service.server import ServerOptions

TOKEN = "CNPP_TRT_TOKEN"
"""The variable of the environment that may hold the token: arguments can be read by other users of the machine."""

BundleFolders = Annotated[list[Path] | None, typer.Option(help="A bundle's folder; repeatable.", callback=user_path)]
Host = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
QueueLength = Annotated[int, typer.Option(min=1, max=100_000, help="Requests that wait for a model.")]
MaxImages = Annotated[int, typer.Option(min=1, max=16, help="Of a request.")]
MaxSteps = Annotated[int, typer.Option(min=1, max=1000, help="Of a request.")]
Devices = Annotated[list[int] | None, typer.Option(min=0, help="A GPU's index; repeatable: a worker for each.")]
AccessLog = Annotated[bool, typer.Option(help="A line of JSON on stderr for each request.")]


def worker_options(
    devices: Sequence[int] | None,
    backend: str,
    precision: str | None,
    threads: int | None,
    plans: Path | None,
    vram_budget: str | None,
) -> "list[RuntimeOptions]":
    """Where each worker's graphs run: one for each device, by default the first GPU alone.

    Raises:
        UserError: a value cannot be used, or a device is named twice.
    """
    devices = devices or [0]
    if len(set(devices)) != len(devices):
        raise UserError("--device names one twice: give each once")
    return [runtime_options(backend, precision, threads, plans, vram_budget, each) for each in devices]


def served_bundles(
    models: Sequence[str] | None,
    bundles: Sequence[Path] | None,
    default: Sequence[str],
    size: str | None,
    precision: str | None,
    backend: str,
    threads: int | None,
    plans: Path | None,
    vram_budget: str | None,
) -> list[Path]:
    """The folders of the models that are served, by name first; `default` where none is given.

    Raises:
        UserError: as `resolve_bundle`.
    """
    names = models or ([] if bundles else default)
    asked = [*((name, None) for name in names), *((None, folder) for folder in bundles or ())]
    return [
        resolve_bundle(name, folder, size, precision, backend, threads, plans, vram_budget)[0] for name, folder in asked
    ]


def note_who_may_call(where: "ServerOptions") -> None:
    """Says so where everybody who reaches the address may draw."""
    if where.token is None and not where.local:
        echo("note: everybody who reaches this address may draw: ask for a token with --token-file FILE")


def read_token(file: Path | None) -> str | None:
    """The token that clients must send.

    Raises:
        UserError: the file cannot be read, or the token is empty.
    """
    if file is None:
        token = os.environ.get(TOKEN)
        if token is not None and not token.strip():
            raise UserError(f"{TOKEN} is empty: leave it out, or put a token into it")
        return token if token is None else token.strip()
    try:
        with file.open(encoding="utf-8") as f:
            token = f.readline(4096).strip()
    except (OSError, UnicodeError) as e:
        raise UserError(f"cannot read --token-file {printable(file)}: {printable(e)}") from None
    if not token:
        raise UserError(f"--token-file {printable(file)} begins with an empty line: put a token there")
    return token
