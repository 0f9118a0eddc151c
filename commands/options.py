"""What the commands share of their options: how sizes, counts and pairs are typed, and where progress goes."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundle import find_bundle
from ..errors import UserError

if TYPE_CHECKING:
    from ..export.checkpoint import Checkpoint
    from ..runtime.pipeline import Pipeline

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
    Path | None, typer.Option(help="A bundle's folder. Default: the model's, under CNPP_TRT_HOME.")
]
BundleSize = Annotated[str | None, typer.Option(help="Which of the model's bundles: 512 or WxH.")]
Precision = Annotated[
    str | None,
    typer.Option(help="Which of the model's bundles: fp32 or fp16. With --backend openvino also f32 or bf16."),
]
BackendName = Annotated[str, typer.Option(help="auto, tensorrt, onnxruntime-cuda, onnxruntime-cpu or openvino.")]
VramBudget = Annotated[
    str | None,
    typer.Option(help="Device memory that weights, activations and buffers may take, as in 6GiB. With TensorRT."),
]
Plans = Annotated[Path | None, typer.Option(help="The plan store. Default: under CNPP_TRT_HOME.")]
SourceModel = Annotated[
    str | None, typer.Option(help="As for `run`. With --bundle, the checkpoint that it was exported from.")
]
SourceControlNets = Annotated[list[str] | None, typer.Option(help="COND=PATH, as it was exported; repeatable.")]


def read_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) from `512` or `768x512`."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"cannot read size {text!r}: give 512 or 768x512 (width x height, in pixels)")
    return int(parts[0]), int(parts[-1])


def read_bytes(text: str) -> int:
    """Bytes from `6GiB` or `6G` (powers of 1024) or `6000MB` (powers of 1000)."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(IB|B|)", text.strip().upper(), re.ASCII)
    if not found:
        raise UserError(f"cannot read {text!r} as a size in bytes: give it as 6GiB or 6000MB")
    number, unit, suffix = found.groups()
    return int(float(number) * (1000 if suffix == "B" else 1024) ** " KMGT".index(unit))


def read_counts(text: str, option: str = "--images") -> tuple[int, ...]:
    """From `1`, `1-4` or `1,4`."""
    counts: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or len(part) > 9:
            raise UserError(f"cannot read {option} {text!r}: give 1, 1-4 or 1,4")
        counts += range(int(low), min(int(high or low), 99) + 1)
    return tuple(dict.fromkeys(counts))


def read_pairs(texts: Sequence[str], option: str = "--controlnet") -> dict[str, str]:
    """Sources by condition, from `seg=SOURCE` each; a named model alone stands for every condition that it has."""
    from ..export.models import MODELS

    pairs: dict[str, str] = {}
    for text in texts:
        condition, equals, source = text.partition("=")
        if text in MODELS:
            of_model = MODELS[text].controlnets if option == "--controlnet" else MODELS[text].extractors
            pairs |= dict.fromkeys(of_model, text)
        elif not equals or not source:
            raise UserError(f"cannot read {option} {text!r}: give COND=SOURCE, as in seg=./my-folder")
        else:
            pairs[condition] = source
    return pairs


@dataclass(frozen=True)
class Parts:
    """What the options of `export` and `build` put into a model."""

    controlnet: list[str] | None
    vae: str | None
    lora: list[str] | None
    embedding: list[str] | None
    extractor: list[str] | None
    variant: str | None
    config: str | None

    def checkpoint(self, model: str) -> "Checkpoint":
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
            report=say,
        )


def split_precision(precision: str | None) -> tuple[str | None, str | None]:
    """(of the bundle, of OpenVINO): the option `--precision` names either."""
    from ..runtime.backends.openvino import PRECISIONS

    return (None, precision) if precision in PRECISIONS else (precision, None)


def deployment(
    model: str | None,
    bundle: Path | None,
    size: str | None,
    precision: str | None,
    backend: str,
    threads: int | None,
    plans: Path | None,
    vram_budget: str | None = None,
) -> tuple[Path, Callable[[Path], "Pipeline"]]:
    """The bundle's folder that a command's options name, and what opens a bundle as they say.

    Raises: UserError where there is none, or several fit.
    """
    from ..runtime.backends.choose import preferred_precisions
    from ..runtime.pipeline import Pipeline

    of_bundle, of_openvino = split_precision(precision)
    budget = read_bytes(vram_budget) if vram_budget is not None else None
    pixels, preferred = read_size(size), preferred_precisions(backend)
    folder = bundle or find_bundle(model or "miniature", of_bundle, pixels, preferred)
    return folder, lambda path: Pipeline.open(
        path, backend, threads, openvino_precision=of_openvino, plans=plans, vram_budget=budget
    )


def say(line: str) -> None:
    """Progress and errors: to stderr, at once."""
    print(line, file=sys.stderr, flush=True)
