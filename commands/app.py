"""The application: every command of `cnpp-trt`, to be parsed and called by `cli.main`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..bundles.bundle import Bundle
from ..versions import __version__
from . import batch, build, contact, demo, engines, measure, package, quantize, run, serve, tune
from .options import Json, add_command, show, user_path

app = typer.Typer(
    help="ControlNet++ as ONNX graphs and TensorRT engines, and a runtime without PyTorch.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks; may stand anywhere.")] = False,
) -> None:
    if version:
        print(f"cnpp-trt {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", callback=user_path)], as_json: Json = False
) -> None:
    """Read every byte of a bundle and compare it with the manifest's digests."""
    opened = Bundle.open(bundle)
    size = opened.verify()
    if as_json:
        print(json.dumps({"bundle": str(bundle), "bytes": size, "digest": opened.digest}))
    else:
        show(
            f"{bundle} is whole: {len(opened.manifest.files)} files, {size / 2**20:.1f} MiB, "
            f"digest {opened.digest[:16]}"
        )


def doctor(as_json: Json = False) -> None:
    """Show versions, providers, GPU and folders, what works here and what to install. For bug reports."""
    from ..doctor import describe, examine

    findings = examine()
    print(json.dumps(findings)) if as_json else show(describe(findings))


for commands in (build, quantize, engines, run, batch, serve, demo, package, measure, tune, contact):
    commands.register(app)
_OUTPUT = {"Output": ("as_json",)}
add_command(app, "verify", verify, _OUTPUT, "Example:\n\ncnpp-trt verify ./bundle")
add_command(app, "doctor", doctor, _OUTPUT, "Example:\n\ncnpp-trt doctor --json")
