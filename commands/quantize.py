"""`cnpp-trt quantize`: parse, call one function, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..bundles.bundle import Bundle
from ..errors import CnppError
from ..install import cannot_import
from .options import BundleFolder, BundleSize, Json, Threads, add_command, read_precision, read_size, show, user_path

_PANELS = {
    "Model": ("model", "bundle", "size", "base", "precision"),
    "Measurement": ("data", "requests", "launches", "steps", "measure", "min_psnr"),
    "Runtime": ("threads",),
    "Output": ("out", "as_json"),
}
_EXAMPLES = """Examples:

cnpp-trt quantize

cnpp-trt quantize --model sd15 --data ./prompts --measure 0

cnpp-trt quantize --model sd15 --base fp16 --precision fp8"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "quantize", quantize_command, _PANELS, _EXAMPLES)


def quantize_command(
    model: Annotated[str, typer.Option(help="As for `export`: whose bundle is quantized.")] = "miniature",
    bundle: BundleFolder = None,
    size: BundleSize = None,
    base: Annotated[
        str, typer.Option(help="Which of the model's bundles: fp32 (for a CPU) or fp16 (for TensorRT).")
    ] = "fp32",
    precision: Annotated[str, typer.Option(help="int8, or fp8 (E4M3; GPUs from compute capability 8.9 on).")] = "int8",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with prompts.jsonl, as for `consistency`. Default: an embedded model's scenes, or blocks.",
            callback=user_path,
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, max=1000, help="Requests of each condition that ranges are taken from.")
    ] = 4,
    launches: Annotated[int, typer.Option(min=1, max=1000, help="Time steps of each request that are looked at.")] = 5,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "-s", "--num-inference-steps", min=1, max=1000, help="Denoising steps. Default: the model's."
        ),
    ] = None,
    measure: Annotated[
        int,
        typer.Option(
            min=0, max=100, help="Images of each condition that each group of layers is judged by; 0 measures none."
        ),
    ] = 1,
    min_psnr: Annotated[
        float,
        typer.Option(min=10, max=80, help="In dB: what hurts most stays unquantized until this is expected."),
    ] = 40.0,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder. Default: under CNPP_TRT_HOME.", callback=user_path),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle whose UNet and ControlNets compute in int8 or fp8, calibrated on the model's own denoising loop."""
    number_format = read_precision(precision, ("int8", "fp8"))
    origin = read_precision(base, ("fp32", "fp16"))
    pixels = read_size(size)
    opened = Bundle.open(bundle) if bundle is not None else Bundle.find(model, origin, pixels)
    try:
        from ..quantization.quantizer import QuantizationSettings, quantize_bundle
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("quantize", e, "onnx", "onnxruntime")) from None
    settings = QuantizationSettings(
        number_format=number_format or "int8",
        data=data,
        requests=requests,
        launches=launches,
        measured=measure,
        min_psnr=min_psnr,
        threads=threads,
        steps=steps,
    )
    made = quantize_bundle(opened, out, settings)
    if as_json:
        print(json.dumps({"bundle": str(made.folder), **json.loads(made.manifest.dumps())}))
    else:
        show(str(made.folder))
