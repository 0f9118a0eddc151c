"""What export and plans of full-size SD 1.5 cost on this CPU, with random weights.

    python -m cnpp_trt.developer.full_size export --work DIR
    python -m cnpp_trt.developer.full_size engines --work DIR

They make what they need in DIR (`export` a checkpoint of 2.7 GB and a bundle of 5.7 GB, `engines` a checkpoint of
5.6 GB, an fp16 bundle of 5.8 GB and plans of 5.8 GB). `engines` writes a result, as `cnpp-trt report` reads it. For
latency: `cnpp-trt bench --bundle DIR/bundle --model DIR/sd15-random`.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..benchmarks.records import PlanRow, Plans
from ..benchmarks.result import BenchmarkResult, default_path
from ..bundles.bundle import Bundle
from ..conditions import CONDITIONS

app = typer.Typer(pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="Where checkpoint, bundle and plans are kept.")]
Out = Annotated[Path | None, typer.Option(help="The result's file. Default: under CNPP_TRT_HOME.")]

WORK = Path("artifacts/full-size")
MODEL = "SD 1.5, random weights"
_CNPP_TRT = [sys.executable, "-m", "cnpp_trt.cli"]


@app.command()
def export(work: Work = WORK) -> None:
    """Exports UNet, one ControlNet, VAE and text encoder into DIR/bundle anew."""
    checkpoint, folder = _checkpoint(work / "sd15-random", ("seg",)), work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    seconds = _timed(["export", "--cond", "seg", "--model", str(checkpoint), "--out", str(folder)])
    print(f"{folder}: exported in {seconds:.0f} s, peak memory {_peak_bytes() / 2**30:.2f} GiB")


@app.command()
def engines(work: Work = WORK, out: Out = None) -> None:
    """Builds the plans of all five conditions anew, without a GPU (TensorRT-RTX); one after the other."""
    from ..engines.build import required_graphs
    from ..engines.store import PlanStore

    checkpoint = _checkpoint(work / "sd15-random-all", tuple(CONDITIONS))
    folder, plans = work / "bundle-fp16", work / "plans"
    if not folder.is_dir():
        asked = ["export", "--cond", "all", "--precision", "fp16"]
        _timed([*asked, "--model", str(checkpoint), "--out", str(folder)])
    exported = _peak_bytes()
    shutil.rmtree(plans, ignore_errors=True)
    flavor = "tensorrt-rtx"
    seconds = _timed(["build", "--flavor", flavor, "--cond", "all", "--bundle", str(folder), "--out", str(plans)])
    if (peak := _peak_bytes()) == exported:
        sys.exit("the export needed more memory than the build: run this again, now that the bundle is there")
    bundle = Bundle.open(folder)
    found = {plan.key.graph: plan for plan in PlanStore(plans).plans()}
    rows = [
        PlanRow(
            graph=graph,
            seconds=plan.seconds,
            bytes=plan.size,
            kernels=plan.fusion.layers,
            attentions=plan.fusion.attentions,
            attentions_fused=plan.fusion.attentions_fused,
            norms=plan.fusion.norms,
            norms_fused=plan.fusion.norms_fused,
        )
        for graph, plan in ((graph, found[graph]) for graph in required_graphs(bundle, list(CONDITIONS)))
    ]
    data = Plans(
        model=MODEL,
        flavor=flavor,
        width=bundle.manifest.width,
        height=bundle.manifest.height,
        plans=rows,
        seconds=seconds,
        peak_bytes=peak,
    )
    _write(
        BenchmarkResult.of("plans", f"{MODEL}, {flavor}", "python -m cnpp_trt.developer.full_size engines", data), out
    )


def _timed(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([*_CNPP_TRT, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _peak_bytes() -> int:
    """Of the largest of the commands so far. Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _checkpoint(folder: Path, conditions: tuple[str, ...]) -> Path:
    if not (folder / "model_index.json").is_file():
        from .random_models.checkpoint import make_checkpoint

        make_checkpoint(folder, conditions=conditions)
    return folder


def _write(result: BenchmarkResult, out: Path | None) -> None:
    path = out or default_path(result.kind, "full-size")
    result.write(path)
    print(path)


if __name__ == "__main__":
    app()
