"""Full-size SD 1.5 with random weights on this CPU: what export and plans cost, and one guided step against PyTorch.

    python -m cnpp_trt.benchmarks.full_size export --work DIR
    python -m cnpp_trt.benchmarks.full_size step --work DIR --threads 2 [--backend openvino-bf16 …]
    python -m cnpp_trt.benchmarks.full_size engines --work DIR

They make what they need in DIR (`export` and `step` 2.7 GB checkpoint and 5.7 GB bundle, `engines` 5.6 GB checkpoint,
5.8 GB fp16 bundle and 5.8 GB plans) and print Markdown.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

app = typer.Typer(pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="Where checkpoint and bundle are kept.")]

WORK = Path("artifacts/full-size")
SEED, PROMPT, SCALE, GUIDANCE = 0, "a photo", 0.8, 7.5


@app.command("export")
def export_command(work: Work = WORK) -> None:
    """Exports UNet, one ControlNet, VAE and text encoder into DIR/bundle anew and prints time and peak memory."""
    import shutil

    _checkpoint(work)
    shutil.rmtree(work / "bundle", ignore_errors=True)
    start = time.perf_counter()
    _export(work)
    seconds = time.perf_counter() - start
    # Linux counts in KiB; the children are the export alone.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(_machine())
    print(f"\nexport, fp32, 512x512: {seconds:.0f} s, peak memory {peak:.1f} GiB")


@app.command()
def step(
    work: Work = WORK,
    threads: int = 2,
    rounds: int = 5,
    backend: Annotated[
        list[str] | None, typer.Option(help="onnxruntime-cpu (default), openvino, openvino-bf16; repeatable.")
    ] = None,
) -> None:
    """One guided ControlNet + UNet step: this runtime's backends and PyTorch eager, in turn, the same inputs.

    Each contender is a process that holds its own weights, 5 to 9 GB.
    """
    _checkpoint(work)
    if not (work / "bundle").is_dir():
        _export(work)
    contenders = {name: _start(name, work, threads) for name in ("pytorch", *(backend or ["onnxruntime-cpu"]))}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, process in contenders.items():
            seconds = _ask(process)
            if turn:  # the first run pays for page faults
                times[name].append(seconds)
    for process in contenders.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    expected = np.load(work / "pytorch.npy")
    print(_machine(*(["openvino"] if any("openvino" in name for name in contenders) else [])))
    print(
        f"\n| guided step, 512x512, {threads} threads | seconds, median of {rounds} (min–max) | faster by | latents |"
    )
    print("|---|---|---|---|")
    for name, t in times.items():
        title = "PyTorch eager (diffusers), fp32" if name == "pytorch" else f"cnpp-trt, {name}"
        ratios = [a / b for a, b in zip(times["pytorch"], t, strict=True)]
        faster = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}–{max(ratios):.2f})" if name != "pytorch" else ""
        error = np.linalg.norm(np.load(work / f"{name}.npy") - expected) / np.linalg.norm(expected)
        apart = f"{error:.1e}" if name != "pytorch" else ""
        print(f"| {title} | {statistics.median(t):.2f} ({min(t):.2f}–{max(t):.2f}) | {faster} | {apart} |")
    print("\nlatents: relative L2 difference to PyTorch's after the step")


@app.command()
def engines(work: Work = WORK) -> None:
    """Builds the plans of all five conditions anew, without a GPU (TensorRT-RTX); one after the other."""
    import shutil

    from ..bundle import Bundle
    from ..conditions import CONDITIONS
    from ..engines.build import required_graphs

    checkpoint, bundle, plans = work / "checkpoint-all", work / "bundle-fp16", work / "plans"
    if not (checkpoint / "model_index.json").is_file():
        from .random_checkpoint import make_checkpoint

        make_checkpoint(checkpoint, conditions=tuple(CONDITIONS))
    command = [sys.executable, "-m", "cnpp_trt.cli"]
    if not bundle.is_dir():
        export = ["export", "--cond", "all", "--precision", "fp16", "--model", str(checkpoint), "--out", str(bundle)]
        subprocess.run([*command, *export], check=True)
    shutil.rmtree(plans, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(
        [*command, "build", "--flavor", "tensorrt-rtx", "--cond", "all", "--bundle", str(bundle), "--out", str(plans)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    from ..engines.store import PlanStore

    found = {plan.key.graph: plan for plan in PlanStore(plans).plans()}
    print(_machine("tensorrt-rtx"))
    print("\n| plan, fp16, 512x512, one guided image | seconds | MiB | kernels | attention fused | norms fused |")
    print("|---|---|---|---|---|---|")
    for graph in required_graphs(Bundle.open(bundle), list(CONDITIONS)):
        plan = found[graph]
        f = plan.fusion
        fused = f"{f.attentions_fused}/{f.attentions} | {f.norms_fused}/{f.norms}"
        print(f"| `{graph}` | {plan.seconds:.1f} | {plan.size / 2**20:.0f} | {f.layers} | {fused} |")
    size = sum(plan.size for plan in found.values()) / 2**30
    print(f"\nall {len(found)} plans, all five conditions: {seconds:.0f} s, {size:.1f} GiB, peak memory {peak:.1f} GiB")


@app.command(hidden=True)
def contend(name: str, work: Work = WORK, threads: int = 2) -> None:
    """One contender in its own process: a step per line on stdin, its seconds on stdout, the last result in DIR."""
    take = _pytorch(work, threads) if name == "pytorch" else _runtime(work, threads, name)
    latents: Any = None
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        latents = take()
        print(time.perf_counter() - start, flush=True)
    np.save(work / f"{name}.npy", latents)


def _runtime(work: Path, threads: int, backend: str) -> Any:
    from ..runtime.backends.interface import WallClock
    from ..runtime.loop import run
    from ..runtime.pipeline import Pipeline
    from ..runtime.request import Control, Request

    name, _, precision = backend.partition("-") if backend.startswith("openvino") else (backend, "", "")
    pipeline = Pipeline.open(work / "bundle", name, threads, openvino_precision=precision or None)
    control = Control("seg", _control_image(), SCALE)
    request = Request(PROMPT, "", (control,), 2, GUIDANCE, "ddim", SEED)
    program = pipeline.prepare(request).program
    first = program.denoise[:3]  # controlnet, unet, update
    model_input = program.workspace.model_input
    start = pipeline.backend.download(model_input)

    def take() -> Any:
        pipeline.backend.upload(model_input, start)  # the step before left the next step's
        run(first, WallClock())
        return program.latents_after(0)

    return take


def _pytorch(work: Path, threads: int) -> Any:
    import torch
    from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(threads)
    folder = work / "checkpoint"
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    ids = tokenizer(["", PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet" / "seg", torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    scheduler.set_timesteps(2)
    control = torch.from_numpy(_control_image()).float().div(255).permute(2, 0, 1)[None]
    with torch.inference_mode():
        embeds = text_encoder(ids)[0]
        start = torch.randn(1, 4, 64, 64, generator=torch.Generator("cpu").manual_seed(SEED))

        def take() -> Any:
            with torch.inference_mode():
                both, t = torch.cat([start, start]), scheduler.timesteps[0]
                image = torch.cat([control, control])
                down, mid = controlnet(both, t, embeds, image, SCALE, return_dict=False)
                noise_pred = unet(
                    both, t, embeds, down_block_additional_residuals=down, mid_block_additional_residual=mid
                ).sample
                without, with_prompt = noise_pred.chunk(2)
                guided = without + GUIDANCE * (with_prompt - without)
                return scheduler.step(guided, t, start, return_dict=False)[0].numpy()

    return take


def _control_image() -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((32, 32, 1), np.uint8))


def _checkpoint(work: Path) -> None:
    if not (work / "checkpoint" / "model_index.json").is_file():
        from .random_checkpoint import make_checkpoint

        make_checkpoint(work / "checkpoint")


def _export(work: Path) -> None:
    command = [sys.executable, "-m", "cnpp_trt.cli", "export", "--cond", "seg"]
    subprocess.run([*command, "--model", str(work / "checkpoint"), "--out", str(work / "bundle")], check=True)


def _start(name: str, work: Path, threads: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cnpp_trt.benchmarks.full_size", "contend", name, "--work", str(work)]
    process = subprocess.Popen(
        [*command, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{name} died while loading")
    return process


def _ask(process: "subprocess.Popen[str]") -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _machine(*more: str) -> str:
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "onnxruntime", *more))
    return f"{_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    app()
