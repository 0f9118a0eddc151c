"""Made-up results of every kind, in the shapes that `records` gives: for the report's tests, and for looking at it.

The figures are drawn around plausible ones; they measure nothing.
"""

import base64
import io
from typing import Any

import numpy as np
from cnpp_trt.benchmarks.check_records import (
    Attempts,
    FirstContact,
    Reliability,
    ReliabilityPart,
    StageFinding,
)
from cnpp_trt.benchmarks.records import (
    Bench,
    Case,
    ConditionScores,
    Consistency,
    EndToEnd,
    GraphParity,
    ImageParity,
    Interval,
    OptimizationResult,
    PairedDifference,
    Parity,
    PictureRow,
    PlanRow,
    Plans,
    StageRow,
    Timed,
    TimedCase,
    Waterfall,
)
from cnpp_trt.benchmarks.result import BenchmarkResult
from cnpp_trt.benchmarks.statistics import Ratio, Summary, paired_ratio, summarize
from cnpp_trt.benchmarks.tuning_records import Confirmed, Tried, Tuning
from PIL import Image

CONDITIONS = {"seg": "mIoU", "canny": "F1", "hed": "SSIM", "lineart": "SSIM", "depth": "RMSE"}
# By contender: how many times faster than the baseline.
SPEED = {"pytorch": 1.0, "onnxruntime-cpu": 1.65, "openvino": 1.9, "openvino-bf16": 3.2}
TITLES = {
    "pytorch": "PyTorch eager (diffusers)",
    "onnxruntime-cpu": "cnpp-trt, onnxruntime-cpu",
    "openvino": "cnpp-trt, openvino",
    "openvino-bf16": "cnpp-trt, openvino bf16",
}
SHARES = {"text_encoder": 0.01, "hint": 0.01, "controlnet": 0.25, "unet": 0.62, "update": 0.003, "vae_decoder": 0.09}
ENVIRONMENT: dict[str, Any] = {
    "cnpp-trt": "0.1.0",
    "commit": "9ae5c4fb51",
    "python": "3.11.2",
    "system": "Linux x86_64",
    "cpu": "A Processor with 2 cores",
    "cpus": 2,
    "threads": 2,
    "memory_bytes": 24 * 2**30,
    "gpu": None,
    "versions": {"torch": "2.13.0+cpu", "diffusers": "0.42.1", "onnxruntime": "1.32.0", "openvino": "2026.1.0"},
}


def make_result(kind: str, data: Any, title: str = "miniature, seg, cpu", **fields: Any) -> BenchmarkResult:
    defaults = {"command": f"cnpp-trt {kind}", "environment": ENVIRONMENT, "created": "2026-03-01T12:00:00+00:00"}
    return BenchmarkResult(kind, title, data=data, **{**defaults, **fields})  # type: ignore[arg-type]


def samples(median: float, count: int = 9, noise: float = 0.02, rng: np.random.Generator | None = None) -> Summary:
    rng = rng or np.random.default_rng(0)
    return summarize(list(median * np.exp(noise * rng.standard_normal(count))))


def make_case(**changes: Any) -> Case:
    same = {"width": 512, "height": 512, "images": 1, "steps": 20, "scheduler": "ddim", "guidance_scale": 7.5}
    return Case(**{**same, "base": not changes, **changes})  # type: ignore[typeddict-item]


def make_bench(seed: int = 0, slower: dict[str, float] | None = None, noise: float = 0.02, count: int = 9) -> Bench:
    """Args: slower: by contender, the factor on all of its seconds."""
    rng = np.random.default_rng(seed)

    def timed_case(case: Case, names: list[str]) -> TimedCase:
        seconds = 10 * case["width"] * case["height"] / 512**2 * case["images"] * (case["steps"] + 2)
        runs: dict[str, Timed] = {}
        for name in names:
            median = seconds / SPEED[name] * (slower or {}).get(name, 1.0)
            stages = {s: samples(median * share, count, noise, rng) for s, share in SHARES.items()}
            stages["host"] = samples(median * 0.004, count, noise, rng)
            runs[name] = Timed(whole=samples(median, count, noise, rng), stages=stages)
            if name != "pytorch":
                ratio: Ratio = paired_ratio(runs["pytorch"]["whole"]["samples"], runs[name]["whole"]["samples"])
                exact = name != "openvino-bf16"
                runs[name].update(
                    {"ratio": ratio, "max_difference": 1 if exact else 24, "psnr": 78.2 if exact else 41.7}
                )
        return TimedCase(case=case, runs=runs)

    everywhere = ["pytorch", "onnxruntime-cpu", "openvino"]
    cases = [timed_case(make_case(), list(SPEED))]
    cases += [timed_case(make_case(width=side, height=side), everywhere) for side in (256, 768)]
    cases += [timed_case(make_case(images=images), everywhere) for images in (2, 4)]
    cases += [timed_case(make_case(steps=steps), everywhere) for steps in (10, 50)]
    cases += [timed_case(make_case(steps=4, scheduler="lcm", guidance_scale=1.0), everywhere)]
    rates = {"fp32": 4.5e11, "bf16": 9e11}
    work = {
        "text_encoder": (1.3e10, 4.9e8),
        "hint": (9e9, 1.5e7),
        "controlnet": (4.7e11, 1.5e9),
        "unet": (1.6e12, 3.6e9),
        "update": (8e5, 6e5),
        "vae_decoder": (2.5e12, 2.1e8),
    }
    contenders = [
        {
            "name": name,
            "title": title,
            "precision": "bf16" if "bf16" in name else "fp32",
            "available": True,
            "reason": "",
        }
        for name, title in TITLES.items()
    ]
    contenders.insert(
        1,
        {
            "name": "tensorrt",
            "title": "cnpp-trt, TensorRT plans",
            "precision": "fp16",
            "available": False,
            "reason": "no NVIDIA GPU here: libcuda was not found",
        },
    )
    return Bench(
        model="full-size",
        condition="seg",
        device="cpu",
        threads=2,
        contenders=contenders,  # type: ignore[typeddict-item]
        cases=cases,
        cold={
            name: {"seconds": samples(240 / k, 3, noise, rng), "host_bytes": int(6e9 / k + 2e9), "device_bytes": None}
            for name, k in SPEED.items()
        },
        roofline={
            "flop_per_second": rates,
            "bytes_per_second": 1.8e10,
            "op_counts": {name: {"flop": flop, "bytes": count} for name, (flop, count) in work.items()},
            "launches": {"text_encoder": 1, "hint": 1, "controlnet": 20, "unet": 20, "update": 20, "vae_decoder": 1},
        },
        roofline_reason="",
    )


def make_waterfall(seed: int = 0) -> Waterfall:
    rng = np.random.default_rng(seed)
    medians = {
        "naive": ("naive loop, diffusers' order", 1.9),
        "hint": ("hint computed once", 1.62),
        "update": ("guidance and sampler as one graph", 1.55),
        "binding": ("I/O binding", 1.49),
        "graphs": ("CUDA graph per engine", None),
        "loop": ("whole loop as one CUDA graph", None),
        "plan": ("TensorRT plans", None),
    }
    first = samples(1.9, 9, 0.02, rng)
    optimizations: list[OptimizationResult] = []
    for name, (title, median) in medians.items():
        if median is None:
            optimizations.append(
                OptimizationResult(name=name, title=title, reason="no NVIDIA GPU here: libcuda was not found")
            )
            continue
        seconds = first if name == "naive" else samples(median, 9, 0.02, rng)
        optimization = OptimizationResult(name=name, title=title, seconds=seconds, reason="")
        if name != "naive":
            optimization.update({"ratio": paired_ratio(first["samples"], seconds["samples"]), "difference": 1.3e-6})
        optimizations.append(optimization)
    return Waterfall(
        model="miniature", condition="seg", case=make_case(width=128, height=128), optimizations=optimizations
    )


def picture(seed: int, width: int = 128, height: int = 128, gray: bool = False) -> str:
    """A PNG in base64: random blocks."""
    cells = np.random.default_rng(seed).integers(0, 60 if gray else 256, (8, 8, 1 if gray else 3), np.uint8)
    pixels = np.repeat(np.repeat(cells, height // 8, 0), width // 8, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze() if gray else pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def make_parity(seed: int = 0, passed: bool = True) -> Parity:
    rng = np.random.default_rng(seed)
    graphs = [
        GraphParity(
            graph=graph,
            launches=20 if graph in ("unet", "update") or graph.startswith("controlnet") else 1,
            max_abs=error * 8,
            relative_l2=error,
            cosine=1 - error**2,
            worst=f"{graph} step 3: out",
        )
        for graph, error in {"text_encoder": 3e-7, "hint_seg": 2e-7, "controlnet_seg": 1.2e-6, "unet": 2.4e-6,
                             "update": 1e-7, "vae_decoder": 3e-6}.items()
    ]  # fmt: skip

    def images(condition: str, levels: int, psnr: float) -> ImageParity:
        found = [float(p) for p in psnr + 3 * rng.standard_normal(16)]
        worst = [int(d) for d in rng.integers(0, levels + 1, 16)]
        return ImageParity(
            condition=condition,
            max_difference=worst,
            psnr=[None if not d else p for d, p in zip(worst, found, strict=True)],
            ssim=[1 - 10 ** (-p / 15) for p in found],
            lpips=None,
        )

    growth = np.cumsum(np.abs(rng.standard_normal((5, 20))) + 0.3, 1)
    return Parity(
        model="miniature",
        backend="onnxruntime-cpu",
        precision="fp32",
        reference="PyTorch 2.13.0, fp32, cpu",
        graphs=graphs,
        steps=[
            {
                "condition": condition,
                "free": [float(v) for v in 4e-7 * growth[i]],
                "forced": [float(v) for v in 3e-7 * (1 + 0.2 * rng.random(20))],
            }
            for i, condition in enumerate(CONDITIONS)
        ],
        images=[images(condition, 1, 75) for condition in CONDITIONS],
        half=[images(condition, 9, 58) for condition in ("seg", "depth")],
        heatmaps=[
            {
                "condition": condition,
                "seed": 3,
                "reference": picture(i),
                "deployed": picture(i),
                "difference": picture(i, gray=True),
                "scale": 1,
            }
            for i, condition in enumerate(CONDITIONS)
        ],
        thresholds={"graph_relative_l2": 1e-4, "image_max_difference": 1, "image_psnr": 50.0},
        missed=[] if passed else ["image max difference: 3 of 255 for depth, seed 9, more than 1"],
        passed=passed,
        unavailable={"lpips": "lpips is not installed: pip install lpips"},
    )


def difference(minus: str, value: float, spread: float) -> PairedDifference:
    return PairedDifference(of="deployed", minus=minus, value=value, low=value - spread, high=value + spread)


def make_consistency(seed: int = 0) -> Consistency:
    rng = np.random.default_rng(seed)
    conditions = []
    for condition, metric in CONDITIONS.items():
        score = {"mIoU": 91.85, "F1": 39.58, "SSIM": 0.8837, "RMSE": 7.38}[metric]
        spread, sign = score * 0.01, -1 if metric == "RMSE" else 1
        apart, gain = 1e-5 * score * rng.standard_normal(), 0.08 * score * sign

        def interval(value: float, spread: float = spread) -> Any:
            return {"value": value, "low": value - spread, "high": value + spread}

        conditions.append(
            ConditionScores(
                condition=condition,
                metric=metric,
                higher_is_better=metric != "RMSE",
                prompts=64,
                images=256,
                scores={
                    "deployed": interval(score),
                    "reference": interval(score - apart),
                    "controlnet": interval(score - gain),
                },
                differences=[
                    difference("reference", apart, 2e-5 * score),
                    difference("controlnet", gain, spread),
                ],
            )
        )
    return Consistency(
        model="miniature",
        data="64 fresh scenes",
        images_per_prompt=4,
        systems={
            "deployed": "cnpp-trt, onnxruntime-cpu",
            "reference": "PyTorch, fp32",
            "controlnet": "ControlNet, before reward tuning",
        },
        conditions=conditions,
        sheets=[{"condition": condition, "png": picture(i, 384, 400)} for i, condition in enumerate(CONDITIONS)],
        quality={},
    )


def make_plans() -> Plans:
    rows = [
        ("unet", 17.5, 1659, 545, 32, 109, 77),
        ("update", 0.1, 1, 7, 0, 0, 0),
        ("vae_decoder", 0.8, 98, 118, 1, 30, 29),
    ]
    rows += [(f"hint_{c}", 0.1, 3, 10, 0, 0, 0) for c in CONDITIONS]
    rows += [(f"controlnet_{c}", 3.6 + i, 699, 257, 14, 48, 34) for i, c in enumerate(CONDITIONS)]
    return Plans(
        model="full-size",
        flavor="tensorrt-rtx",
        width=512,
        height=512,
        plans=[
            PlanRow(
                graph=graph,
                seconds=seconds,
                bytes=mib * 2**20,
                kernels=kernels,
                attentions=attentions,
                attentions_fused=attentions if attentions > 1 else 0,
                norms=norms,
                norms_fused=fused,
            )
            for graph, seconds, mib, kernels, attentions, norms, fused in rows
        ],
        seconds=67.2,
        peak_bytes=int(6.5 * 2**30),
    )


def make_end_to_end() -> EndToEnd:
    pictures = [
        PictureRow(
            condition=condition,
            seconds=30.0 + i,
            peak_bytes=11 * 2**30,
            max_difference=i % 2,
            differing=0.0005 * i,
            reference_seconds=35.0,
            reference_peak_bytes=7 * 2**30,
        )
        for i, condition in enumerate(CONDITIONS)
    ]
    stages = [StageRow(stage="export, fp32", seconds=259.8, peak_bytes=int(4.94 * 2**30))]
    return EndToEnd(model="sd15", width=512, height=512, steps=2, stages=stages, pictures=pictures)


def make_first_contact() -> FirstContact:
    found = StageFinding(
        name="cuda",
        title="memory and copies",
        verdict="ok",
        words="",
        numbers={"graph bytes per node": 9000, "driver": "580.1"},
        seconds=2.5,
        said=[],
    )
    refused: StageFinding = {
        **found, "name": "libraries", "verdict": "refused", "words": "no TensorRT", "numbers": {}, "said": ["a line"]
    }  # fmt: skip
    return FirstContact(mode="quick", condition="seg", stages=[found, refused])


def make_reliability() -> Reliability:
    row = Attempts(
        what="manifest",
        tried=400,
        outcomes={"refused": 300, "accepted": 100},
        wrong={"tracebacks": 0},
        seconds=9.5,
        reason="",
    )
    left_out = Attempts(what="SIGKILL", tried=0, outcomes={}, wrong={}, seconds=0.0, reason="there is no module for it")
    part = ReliabilityPart(
        name="fuzz", title="Fuzzed inputs", command="make reliability", measured="2026-03-01", rows=[row, left_out]
    )
    return Reliability(parts=[part])


def make_tuning() -> Tuning:
    rng = np.random.default_rng(4)

    def tried(setting: str, speedup: float, prompts: int) -> Tried:
        value = float(rng.normal(0.1 * speedup**2 - 0.2, 0.3))
        loss = Interval(value=value, low=value - 0.5, high=value + 0.5)
        return Tried(setting=setting, seconds=0.9 / speedup, speedup=speedup, loss=loss, psnr=30.0, prompts=prompts)

    fast = tried("6 steps of dpmpp_2m ays, guidance 0-0.5", 3.1, 96)
    trials = [
        tried(f"{steps} steps of unipc", 20 / steps, 8 if steps > 8 else 32) for steps in (4, 5, 6, 8, 10, 12, 15)
    ]
    ratio = Ratio(median=3.0, low=2.8, high=3.2)
    return Tuning(
        model="miniature",
        condition="seg",
        metric="mIoU",
        higher_is_better=True,
        budget=1.0,
        exact="20 steps of unipc",
        exact_seconds=0.9,
        exact_score=91.4,
        trials=[*trials, fast],
        attempts=[Confirmed(**fast, measured=ratio)],
        ablation=trials[:2],
        against={"PyTorch, fp32": Ratio(median=10.5, low=10.0, high=11.0)},
    )


def make_all() -> list[BenchmarkResult]:
    return [
        make_result("bench", make_bench(), "full-size, seg, cpu"),
        make_result("waterfall", make_waterfall()),
        make_result("parity", make_parity(), "miniature, onnxruntime-cpu"),
        make_result("consistency", make_consistency(), "miniature, onnxruntime-cpu"),
        make_result("plans", make_plans(), "full-size, tensorrt-rtx"),
        make_result("end_to_end", make_end_to_end(), "sd15, every condition"),
        make_result("first_contact", make_first_contact(), "NVIDIA L4"),
        make_result("reliability", make_reliability(), "tiny"),
        make_result("tuning", make_tuning(), "miniature, onnxruntime-cpu, seg"),
    ]
