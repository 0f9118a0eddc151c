"""What the commands share of their options: how sizes, counts and pairs are typed, and where progress goes."""

import copy
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..bundles.bundle import Bundle, find_bundle
from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import did_you_mean, escaped, printable, unknown_choice
from ..places import expanded

if TYPE_CHECKING:
    from ..export.checkpoint import Checkpoint
    from ..runtime.pipeline import Pipeline
    from ..runtime.settings.options import RuntimeOptions


def user_path(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Has a path, or several, mean what it means to a shell, also where that left it alone: `--out=~/here`.

    Raises:
        UserError: `~name` of a user that there is not.
    """
    if isinstance(value, list | tuple):
        return [expanded(path, parameter.opts[0]) for path in value]
    return None if value is None else expanded(value, parameter.opts[0])


Model = Annotated[
    str,
    typer.Option(
        help="miniature, miniature-lcm, sd15, seg-coco, or any SD 1.x: a folder or file, or owner/name on the hub."
    ),
]
ControlNets = Annotated[
    list[str] | None, typer.Option(help="COND=SOURCE of a ControlNet, or `sd15` for ControlNet++'s; repeatable.")
]
Vae = Annotated[str | None, typer.Option(help="Another VAE: a source, or `taesd`.")]
Loras = Annotated[list[str] | None, typer.Option(help="SOURCE[:weight] of a LoRA, or `lcm`; repeatable.")]
Embeddings = Annotated[list[str] | None, typer.Option(help="SOURCE[:token] of a textual inversion; repeatable.")]
Extractors = Annotated[
    list[str] | None, typer.Option(help="COND=SOURCE of an extractor, or `sd15` for the published ones; repeatable.")
]
Variant = Annotated[str | None, typer.Option(help="Of the weights, as in `fp16`: smaller downloads.")]
Config = Annotated[str | None, typer.Option(help="Where a single file's configs and tokenizer are. Default: SD 1.5's.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
BundleFolder = Annotated[
    Path | None,
    typer.Option(help="A bundle's folder. Default: the model's, under CNPP_TRT_HOME.", callback=user_path),
]
BundleSource = Annotated[
    str | None,
    typer.Option(
        "--bundle",
        help="A bundle's folder, or an address that it is fetched from once, as in s3://bucket/bundle. Default: the "
        "model's, under CNPP_TRT_HOME.",
    ),
]
BundleSize = Annotated[str | None, typer.Option(help="Which of the model's bundles: 512 or WxH.")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Which of the model's bundles: fp32, fp16, int8 or fp8. With --backend openvino also bf16 or int8-bf16."
    ),
]
BackendName = Annotated[str, typer.Option(help="auto, tensorrt, onnxruntime-cuda, onnxruntime-cpu or openvino.")]
Device = Annotated[
    int, typer.Option(min=0, help="The GPU's index, as CUDA_VISIBLE_DEVICES leaves them.", show_default=False)
]
VramBudget = Annotated[
    str | None,
    typer.Option(
        help="Device memory that weights, activations, buffers and recordings may take, as in 6GiB. With TensorRT."
    ),
]
Presets = Annotated[
    list[Path] | None,
    typer.Option(
        help="Draw a condition as this file of `cnpp-trt tune` says; repeatable. `shipped`: the embedded model's.",
        callback=user_path,
    ),
]
Plans = Annotated[
    Path | None,
    typer.Option("--plans", help="The plan store's folder. Default: under CNPP_TRT_HOME.", callback=user_path),
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads. Default: every physical core.")]
ResultsFolder = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="A folder. Default: ./cnpp-trt-results.", callback=user_path),
]
SourceModel = Annotated[
    str | None, typer.Option(help="As for `run`. With --bundle, the checkpoint that it was exported from.")
]
SourceControlNets = Annotated[list[str] | None, typer.Option(help="COND=PATH, as it was exported; repeatable.")]


# What a user may call a precision → its one name here.
_PRECISIONS = {
    "fp32": "fp32", "f32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "f16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
    "int8": "int8", "i8": "int8", "fp8": "fp8", "f8": "fp8", "int8-bf16": "int8-bf16",
}  # fmt: skip


def add_command(
    app: typer.Typer, name: str, command: Callable[..., None], panels: Mapping[str, Sequence[str]], examples: str
) -> None:
    """Adds a command whose help shows its options in panels and ends in examples.

    Args:
        app: the application, or a group of its commands.
        name: what the command is called.
        command: the function, whose annotations are Typer's.
        panels: the parameters of each panel.
        examples: the text below the options, a paragraph for each command.
    """
    for panel, parameters in panels.items():
        for parameter in parameters:
            kind, option = get_args(command.__annotations__[parameter])
            option = copy.copy(option)  # commands share some of them
            option.rich_help_panel = panel
            command.__annotations__[parameter] = Annotated[kind, option]
    app.command(name, epilog=examples)(command)


def require_choice(what: str, word: str, choices: Collection[str]) -> str:
    """Returns `word` where it is one of `choices`.

    Raises:
        UserError: it is none of them; the message names what is close.
    """
    if word not in choices:
        raise unknown_choice(what, word, choices)
    return word


def read_precision(
    text: str | None, choices: Collection[str] = ("fp32", "fp16", "bf16", "int8", "fp8", "int8-bf16")
) -> str | None:
    """One of `choices`, from any of the names that a precision goes by: `fp16`, `f16`, `float16`, `half`.

    Raises:
        UserError: there is no such precision.
    """
    return None if text is None else require_choice("precision", _PRECISIONS.get(text.lower(), text), choices)


def read_conditions(words: Sequence[str] | None, own: Sequence[str] | None = None) -> list[str]:
    """The conditions of `--cond`, each once.

    Args:
        own: what `all`, and no word at all, stand for; None leaves `all` as it is, for whoever knows more.

    Raises:
        UserError: there is no such condition.
    """
    for word in words or ():
        require_choice("condition", word, (*CONDITIONS, "all"))
    if own is not None and (not words or "all" in words):
        return list(own)
    return ["all"] if "all" in (words or ()) else list(dict.fromkeys(words or ()))


def read_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) from `512` or `768x512`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.lower(), re.ASCII)
    if not found:
        shown = printable(repr(text), 40)
        raise UserError(f"cannot read size {shown}: give 512 or 768x512 (width x height, in pixels)")
    return int(found[1]), int(found[2] or found[1])


def read_bytes(text: str) -> int:
    """Bytes from `6GiB` or `6G` (powers of 1024) or `6000MB` (powers of 1000)."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(IB|B|)", text.strip().upper(), re.ASCII)
    if not found:
        raise UserError(f"cannot read {text!r} as a size in bytes: give it as 6GiB or 6000MB")
    number, unit, suffix = found.groups()
    return int(float(number) * (1000 if suffix == "B" else 1024) ** " KMGT".index(unit))


def read_counts(text: str, option: str = "--num-images", most: int = 99) -> tuple[int, ...]:
    """From `1`, `1-4` or `1,4`; none above `most`."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not found or not int(found[1]) <= int(found[2] or found[1]) <= most:
            raise UserError(f"cannot read {option} {printable(repr(text), 40)}: give 1, 1-4 or 1,4, up to {most}")
        counts += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(dict.fromkeys(counts))


def read_pairs(texts: Sequence[str], option: str = "--controlnet") -> dict[str, str]:
    """Sources by condition, from `seg=SOURCE` each; a named model alone stands for every condition that it has.

    Raises:
        UserError: a text cannot be read, its condition is unknown, or has two sources.
    """
    from ..export.models import MODELS

    pairs: dict[str, str] = {}
    for text in texts:
        condition, equals, source = text.partition("=")
        if text in MODELS:
            of_model = MODELS[text].controlnets if option == "--controlnet" else MODELS[text].extractors
            pairs |= dict.fromkeys(of_model, text)
        elif not equals or not source:
            shown = printable(repr(text), 80)
            raise UserError(f"cannot read {option} {shown}: give COND=SOURCE, as in seg=./my-folder")
        elif require_choice("condition", condition, CONDITIONS) in pairs and pairs[condition] != source:
            raise UserError(f"{option} names two sources of {condition}: give one")
        else:
            pairs[condition] = source
    return pairs


@dataclass(frozen=True)
class CheckpointOptions:
    """The parts of a model that the options of `export` and `build` replace or add."""

    controlnet: list[str] | None
    vae: str | None
    lora: list[str] | None
    embedding: list[str] | None
    extractor: list[str] | None
    variant: str | None
    config: str | None

    def checkpoint(self, model: str) -> "Checkpoint":
        """The checkpoint of a model with what these options put into it."""
        from ..export.checkpoint import Checkpoint

        return Checkpoint(
            model,
            read_pairs(self.controlnet or []),
            vae=self.vae,
            loras=self.lora or [],
            embeddings=self.embedding or [],
            extractors=read_pairs(self.extractor or [], "--extractor"),
            variant=self.variant,
            config=self.config,
        )


def split_precision(precision: str | None) -> tuple[str | None, str | None]:
    """(of the bundle, of OpenVINO): bf16 is no bundle's precision, OpenVINO computes any bundle in it.

    `int8-bf16` is a bundle in int8, whose other operations OpenVINO computes in bf16.

    Raises:
        UserError: there is no such precision.
    """
    read = read_precision(precision)
    if read == "int8-bf16":
        return "int8", "bf16"
    return (None, read) if read == "bf16" else (read, None)


def require_workers_on_ray(workers: int | None, ray: str | None) -> None:
    """Raises UserError where `--workers` stands without `--ray`."""
    if workers is not None and ray is None:
        raise UserError("--workers are Ray's: give the address of a cluster with --ray, or --ray local")


def fetched(source: str | None) -> Path | None:
    """The folder of `--bundle`, fetched where it is an address.

    Raises:
        UserError, CnppError: as `fetch_bundle`.
    """
    from ..bundles.fetching import fetch_bundle, is_address

    if source is None:
        return None
    return fetch_bundle(source) if is_address(source) else expanded(Path(source), "--bundle")


def resolve_bundle(
    model: str | None,
    bundle: Path | None,
    size: str | None,
    precision: str | None,
    backend: str,
    threads: int | None,
    plans: Path | None,
    vram_budget: str | None = None,
    device: int = 0,
    presets: Sequence[Path] = (),
) -> tuple[Path, Callable[[Path], "Pipeline"]]:
    """Finds the bundle that a command's options name.

    Raises:
        UserError: an option's value cannot be used, which is known first; there is no such bundle, or several fit.
    """
    from ..runtime.backends.registry import preferred_precisions
    from ..runtime.pipeline import Pipeline
    from ..runtime.settings.preset import read_presets

    of_bundle = split_precision(precision)[0]
    options = runtime_options(backend, precision, threads, plans, vram_budget, device)
    pixels = read_size(size)
    if bundle is None:
        folder = _find(model or "miniature", of_bundle, pixels, preferred_precisions(backend))
    else:
        folder = bundle
        # OpenVINO computes in float32 whether the graphs are stored in fp32 or fp16.
        any_of_both = backend == "openvino" and of_bundle in ("fp32", "fp16")
        _check_precision_and_size(folder, None if any_of_both else of_bundle, pixels)
    if presets:
        options = replace(options, presets=read_presets(presets, Bundle.open(folder)))
    return folder, lambda path: Pipeline.open(path, options)


def runtime_options(
    backend: str,
    precision: str | None,
    threads: int | None,
    plans: Path | None,
    vram_budget: str | None,
    device: int = 0,
) -> "RuntimeOptions":
    """Where and how graphs run, as the options of a command say.

    Raises:
        UserError: a value cannot be used.
    """
    from ..runtime.settings.options import BACKENDS, RuntimeOptions

    require_choice("backend", backend, BACKENDS)
    of_openvino = split_precision(precision)[1]
    if of_openvino is not None and backend != "openvino":
        raise UserError(f"{of_openvino} is a precision of the backend openvino: add --backend openvino")
    budget = read_bytes(vram_budget) if vram_budget is not None else None
    return RuntimeOptions(
        backend, device, threads=threads, precision="bf16" if of_openvino else None, plans=plans, vram_budget=budget
    )


def _find(model: str, precision: str | None, size: tuple[int, int] | None, preferred: tuple[str, ...]) -> Path:
    from ..export.models import MODELS

    named = ("miniature", "miniature-lcm", *MODELS)
    try:
        return find_bundle(model, precision, size, preferred)
    except UserError as e:
        hint = "" if model in named else did_you_mean(model, named)
        raise UserError(f"{e}; {hint.strip()}" if hint else str(e)) from None


def _check_precision_and_size(folder: Path, precision: str | None, size: tuple[int, int] | None) -> None:
    """Checks that a bundle is what `--precision` and `--size` ask for.

    Raises:
        UserError: the bundle has another precision or size.
    """
    if precision is None and size is None:
        return
    m = Bundle.open(folder).manifest
    if precision not in (None, m.number_format):
        raise UserError(
            f"{folder} is {m.number_format}, not {precision}: leave --precision out, or give another --bundle"
        )
    if size not in (None, (m.width, m.height)):
        raise UserError(f"{folder} is for {m.width}x{m.height}: leave --size out, or give another --bundle")


def echo(line: str) -> None:
    """Prints a line of progress or an error to stderr, at once."""
    print(escaped(line), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Results: to stdout. Names and texts from files reach no terminal raw."""
    print(escaped(text))
