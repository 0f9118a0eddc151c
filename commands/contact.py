"""`cnpp-trt first-contact`: parse, call one function, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..conditions import CONDITIONS
from ..places import home, results
from .options import BundleFolder, Device, Json, add_command, require_choice, show, user_path

_PANELS = {
    "Model": ("bundle",),
    "Control": ("cond",),
    "Runtime": ("device",),
    "Measurement": ("full", "again", "limit"),
    "Output": ("out", "as_json"),
}
_EXAMPLES = """Examples:

cnpp-trt first-contact

cnpp-trt first-contact --full"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "first-contact", first_contact_command, _PANELS, _EXAMPLES)


def first_contact_command(
    bundle: BundleFolder = None,
    cond: Annotated[str, typer.Option(help="The condition that is drawn.")] = "seg",
    device: Device = 0,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="More requests, three times the limits, and the GPU's own tests.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Take over nothing from an earlier run on this machine.")
    ] = False,
    limit: Annotated[float | None, typer.Option(min=1, help="Seconds for each stage. Default: each one's own.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The result's file. Default: in ./cnpp-trt-results.", callback=user_path),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out what a GPU does with this package, and print what to paste into an issue.

    Exit status 0 where the GPU drew the right image and nothing failed, 3 where it did so with restrictions, 1 where it
    drew none.
    """
    from ..benchmarks.first_contact.command import Settings, exit_status, first_contact, paste, require_fp16

    require_choice("condition", cond, list(CONDITIONS))
    settings = Settings(
        out=out or results() / "first-contact.json",
        work=home() / "first-contact",
        bundle=require_fp16(bundle),
        condition=cond,
        device=device,
        full=full,
        again=again,
        limit=limit,
    )
    result = first_contact(settings)
    contact = result.data
    if as_json:
        print(json.dumps({**contact, "result": str(settings.out)}))
    else:
        show(paste(result))
        show(f"\n{settings.out}")
    if status := exit_status(contact):  # type: ignore[arg-type]
        raise typer.Exit(status)
