"""`cnpp-trt engines`, the plans that were built: parse, call one function, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..messages import printable
from .options import Json, PlanStorePath, echo, show, user_path


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    engines = typer.Typer(help="The plans that were built: list, inspect, prune.", no_args_is_help=True)
    app.add_typer(engines, name="engines")
    engines.command("list")(engines_list)
    engines.command("inspect")(engines_inspect)
    engines.command("capability")(engines_capability)
    engines.command("prune")(engines_prune)


def engines_list(store: PlanStorePath = None, as_json: Json = False) -> None:
    """Every plan of the store."""
    from ..engines.describe import plan_json, plans_table
    from ..engines.store import PlanStore

    opened = PlanStore(store)
    plans = opened.plans()
    if as_json:
        print(json.dumps([plan_json(plan) for plan in plans]))
    elif plans:
        show(plans_table(plans))
    else:
        echo(f"no plans in {opened.root}: make some with `cnpp-trt build --cond seg`")


def engines_inspect(
    name: Annotated[str, typer.Argument(help="A plan's folder name, or the start of it, as in `unet`.")],
    store: PlanStorePath = None,
    as_json: Json = False,
) -> None:
    """Everything about a plan: what it is for, its sizes, its memory, what was fused and what not, its digest."""
    from ..engines.describe import plan_details, plan_json
    from ..engines.store import PlanStore

    opened = PlanStore(store)
    plans = [plan for plan in opened.plans() if plan.folder.name.startswith(name)]
    if not plans:
        raise UserError(f"no plan {printable(repr(name), 80)} in {opened.root}: see `cnpp-trt engines list`")
    if as_json:
        print(json.dumps([{**plan_json(plan), "damage": plan.integrity_error()} for plan in plans]))
    else:
        show("\n\n".join(map(plan_details, plans)))


def engines_capability(
    onnx: Annotated[Path, typer.Argument(help="An ONNX file, as in BUNDLE/unet.onnx.", callback=user_path)],
    flavor: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt-rtx.")] = "auto",
) -> None:
    """What of a graph TensorRT can parse, and what not, as Polygraphy finds it."""
    from ..engines.capability import capability
    from ..engines.flavor import load_flavor

    show(capability(load_flavor(flavor), onnx))


def engines_prune(
    store: PlanStorePath = None,
    unused: Annotated[bool, typer.Option("--unused", help="Also those of no bundle under CNPP_TRT_HOME.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete plans that cannot be used any more: of TensorRT versions that were replaced, or damaged."""
    from ..engines.store import PlanStore, bundle_sources, installed_versions

    opened = PlanStore(store)
    if everything:
        reasons = dict.fromkeys(opened.plans(), "--all")
    else:
        reasons = opened.find_unusable(installed_versions(), bundle_sources() if unused else None)
    for plan, reason in reasons.items():
        echo(f"{plan.folder.name}: {reason}")
    freed = 0 if dry_run else opened.remove(reasons) + opened.remove_leftovers()
    if as_json:
        print(json.dumps({"plans": [p.folder.name for p in reasons], "freed": freed, "dry_run": dry_run}))
    else:
        print(f"{len(reasons)} plans{' would be' if dry_run else ''} deleted, {freed / 2**20:.1f} MiB freed")
