"""`cnpp-trt engines`, the plans that were built: parse, call one function, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..messages import printable
from .options import Json, Plans, add_command, echo, show, user_path

_PANELS = {"Runtime": ("plans",), "Output": ("as_json",)}


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    engines = typer.Typer(help="TensorRT plans: list, inspect and delete them.", no_args_is_help=True)
    app.add_typer(engines, name="engines")
    add_command(engines, "list", engines_list, _PANELS, "Example:\n\ncnpp-trt engines list --json")
    add_command(engines, "inspect", engines_inspect, _PANELS, "Example:\n\ncnpp-trt engines inspect unet")
    example = "Example:\n\ncnpp-trt engines capability BUNDLE/unet.onnx --flavor tensorrt-rtx"
    add_command(engines, "capability", engines_capability, {"Runtime": ("flavor",)}, example)
    panels = {**_PANELS, "Output": ("unused", "everything", "dry_run", "as_json")}
    example = "Example:\n\ncnpp-trt engines prune --unused --dry-run"
    add_command(engines, "prune", engines_prune, panels, example)


def engines_list(plans: Plans = None, as_json: Json = False) -> None:
    """List the plans of the store."""
    from ..engines.describe import plan_json, plans_table
    from ..engines.store import PlanStore

    store = PlanStore(plans)
    stored = store.plans()
    if as_json:
        print(json.dumps([plan_json(plan) for plan in stored]))
    elif stored:
        show(plans_table(stored))
    else:
        echo(f"no plans in {store.root}: make some with `cnpp-trt build --cond seg`")


def engines_inspect(
    name: Annotated[str, typer.Argument(help="A plan's folder name, or the start of it, as in `unet`.")],
    plans: Plans = None,
    as_json: Json = False,
) -> None:
    """Show a plan: its target, sizes and memory, what TensorRT fused, and whether its digest is right."""
    from ..engines.describe import plan_details, plan_json
    from ..engines.store import PlanStore

    store = PlanStore(plans)
    matches = [plan for plan in store.plans() if plan.folder.name.startswith(name)]
    if not matches:
        raise UserError(f"no plan {printable(repr(name), 80)} in {store.root}: see `cnpp-trt engines list`")
    if as_json:
        print(json.dumps([{**plan_json(plan), "damage": plan.integrity_error()} for plan in matches]))
    else:
        show("\n\n".join(map(plan_details, matches)))


def engines_capability(
    onnx: Annotated[Path, typer.Argument(help="An ONNX file, as in BUNDLE/unet.onnx.", callback=user_path)],
    flavor: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt-rtx.")] = "auto",
) -> None:
    """Show which nodes of a graph TensorRT can parse, as Polygraphy finds them."""
    from ..engines.capability import capability
    from ..engines.flavor import load_flavor

    show(capability(load_flavor(flavor), onnx))


def engines_prune(
    plans: Plans = None,
    unused: Annotated[bool, typer.Option("--unused", help="Also delete plans that no local bundle uses.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Delete every plan.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete plans that cannot be used: damaged ones, and those of another TensorRT version than the installed one."""
    from ..engines.store import PlanStore, bundle_sources, installed_versions

    store = PlanStore(plans)
    if everything:
        reasons = dict.fromkeys(store.plans(), "--all")
    else:
        reasons = store.find_unusable(installed_versions(), bundle_sources() if unused else None)
    for plan, reason in reasons.items():
        echo(f"{plan.folder.name}: {reason}")
    freed = 0 if dry_run else store.remove(reasons) + store.remove_leftovers()
    if as_json:
        print(json.dumps({"plans": [p.folder.name for p in reasons], "freed": freed, "dry_run": dry_run}))
    else:
        print(f"{len(reasons)} plans{' would be' if dry_run else ''} deleted, {freed / 2**20:.1f} MiB freed")
