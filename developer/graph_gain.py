"""What sharing the prefix and hoisting save at full size, with random weights: 512×512, one guided image.

    python -m cnpp_trt.developer.graph_gain count   NETWORK        operations and weights, in seconds
    python -m cnpp_trt.developer.graph_gain export  NETWORK DIR    the graphs that the others need, 6 to 20 GB
    python -m cnpp_trt.developer.graph_gain steps   NETWORK DIR    a step on ONNX Runtime's CPU provider, or OpenVINO
    python -m cnpp_trt.developer.graph_gain plans   NETWORK DIR    TensorRT-RTX plans, built without a GPU

NETWORK is `unet` or `controlnet`. `steps` runs the same inputs in turn: with that image given twice, which shares
nothing (docs/design.md), with one image and two prompts, and so with what is hoisted computed beforehand.
"""

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import numpy as np
import onnx
import torch
import typer
from diffusers import ControlNetModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..bundles.bundle import GraphSpec, Manifest, TensorSpec
from ..bundles.graph_names import STEPS_AT_ONCE
from ..bundles.manifest import GraphOptions
from ..engines.build import Sizes
from ..engines.builder import build_plan
from ..engines.flavor import load_flavor
from ..engines.plan import BuilderSettings
from ..export.checkpoint import Checkpoint
from ..export.graphs import GraphDims, base_graphs, condition_graphs
from ..export.onnx_graph import OPSET, ExportSpec, export_graph
from .random_models.checkpoint import make_checkpoint, make_unet

# How a network is divided into graphs, by the folder that they are in.
VARIANTS = {
    "as-one": GraphOptions(hoist_prompt=False, hoist_time=False),
    "prompt": GraphOptions(hoist_prompt=True, hoist_time=False),
    "time": GraphOptions(hoist_prompt=False, hoist_time=True),
    "both": GraphOptions(hoist_prompt=True, hoist_time=True),
    "split": GraphOptions(hoist_prompt=True, hoist_time=True, split_unet=True),
}
SIZES = {"batch": 2, "images": 1, "tokens": 77, "steps": STEPS_AT_ONCE}
SIDE = 512

Network = Annotated[Literal["unet", "controlnet"], typer.Argument(help="What is measured.")]
Folder = Annotated[Path, typer.Argument(help="Where the checkpoint and the graphs are kept.")]
Precision = Annotated[Literal["fp32", "fp16"], typer.Option(help="fp16 for plans.")]
Variants = Annotated[list[str] | None, typer.Option("--variant", help=f"Of {', '.join(VARIANTS)}. Default: all.")]

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def export(network: Network, folder: Folder, precision: Precision = "fp32", variant: Variants = None) -> None:
    """Exports the graphs that are not there yet, each compared with PyTorch."""
    root = folder / "checkpoint"
    if not (root / "model_index.json").is_file():
        make_checkpoint(root, tiny=False, conditions=("seg",))
    checkpoint = Checkpoint(str(root))
    for name in variant or VARIANTS:
        told = SimpleNamespace(
            width=SIDE, height=SIDE, precision=precision, latent_channels=4, vae_scale_factor=8, options=VARIANTS[name]
        )
        dims = GraphDims.of(checkpoint, cast(Manifest, told))
        described = base_graphs(checkpoint, dims) if network == "unet" else condition_graphs(checkpoint, "seg", dims)
        place = folder / precision / name
        place.mkdir(parents=True, exist_ok=True)
        for graph, make in described:
            if graph in _GRAPHS[network] and not (place / f"{graph}.onnx").exists():
                start = time.perf_counter()
                export_graph(make(), place, precision, OPSET[precision])
                print(f"{name}: {graph} in {time.perf_counter() - start:.0f} s", flush=True)


@app.command()
def steps(
    network: Network,
    folder: Folder,
    backend: Annotated[Literal["onnxruntime", "openvino"], typer.Option()] = "onnxruntime",
    rounds: int = 8,
) -> None:
    """Prints the seconds of each round, and how many times faster than with nothing shared, round by round."""
    opened = _onnxruntime if backend == "onnxruntime" else _openvino
    main = "unet" if network == "unet" else "controlnet_seg"
    suffix = "" if network == "unet" else "_seg"
    as_one, both = (folder / "fp32" / name for name in ("as-one", "both"))
    rng = np.random.default_rng(0)

    def random(graph: GraphSpec) -> dict[str, Any]:
        shapes = {t.name: [SIZES.get(str(d), d) for d in t.shape] for t in graph.inputs}
        return {name: rng.standard_normal(cast(list[int], shape)).astype(np.float32) for name, shape in shapes.items()}

    given = random(_specs(as_one)[main])
    given |= {"timestep": np.array([601], np.float32), "rows": np.zeros(2, np.int64)}
    twice = {**given, "rows": np.arange(2)}
    for name in ("model_input", "hint"):
        if name in given:
            twice[name] = np.concatenate([given[name]] * 2)
    hoisted = {name: given[name] for name in given if name not in ("timestep", "prompt_embeds")}
    timesteps = np.linspace(961, 1, STEPS_AT_ONCE).round().astype(np.float32)
    timesteps[0] = 601
    once = {
        f"text_kv{suffix}": {"prompt_embeds": given["prompt_embeds"]},
        f"time_embeds{suffix}": {"timesteps": timesteps},
    }
    for graph, feeds in once.items():
        run = opened(both / f"{graph}.onnx", feeds)
        found = run(feeds)
        start = time.perf_counter()
        run(feeds)
        print(f"{graph}: {time.perf_counter() - start:.3f} s, once", flush=True)
        hoisted |= {"time_embeds": found["time_embeds"][0]} if "time_embeds" in found else found
        del run

    runs: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, Any]], dict[str, Any]]] = {
        "nothing shared": (opened(as_one / f"{main}.onnx", twice), twice),
        "shared prefix": (opened(as_one / f"{main}.onnx", given), given),
        "and hoisted": (opened(both / f"{main}.onnx", hoisted), hoisted),
    }
    results = [run(feeds) for run, feeds in runs.values()]
    for name, result in zip(list(runs)[1:], results[1:], strict=True):
        largest = max(np.abs(result[t] - results[0][t]).max() for t in result)
        print(f"{name}: largest difference {largest:.1e}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, feeds) in runs.items():
            start = time.perf_counter()
            run(feeds)
            seconds[name].append(time.perf_counter() - start)
        print(", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()), flush=True)
    first = np.array(seconds["nothing shared"])
    for name, taken in seconds.items():
        low, median, high = np.quantile(first / np.array(taken), [0.25, 0.5, 0.75])
        print(f"{name}: {median:.3f} times as fast (quartiles {low:.3f} to {high:.3f})")


@app.command()
def count(network: Network) -> None:
    """Prints operations that multiply matrices (a multiply-add is two) and weights, counted by PyTorch.

    Nothing is computed: the modules have shapes alone.
    """
    with torch.device("meta"):
        unet = make_unet(False)
    cases = [("as-one", {**SIZES, "images": 2}, ", nothing shared"), *((name, SIZES, "") for name in VARIANTS)]
    for name, sizes, note in cases:
        told = SimpleNamespace(
            width=SIDE, height=SIDE, precision="fp32", latent_channels=4, vae_scale_factor=8, options=VARIANTS[name]
        )
        # As much of a checkpoint as the graphs ask for.
        shapes = SimpleNamespace(
            unet=lambda dtype: deepcopy(unet),
            controlnet=lambda condition, dtype: _controlnet(unet),
            setting=lambda component, key: unet.config[key],
            config=lambda component: {},
            resolved=SimpleNamespace(extractor=lambda condition: None),
        )
        checkpoint = cast(Checkpoint, shapes)
        dims = GraphDims.of(checkpoint, cast(Manifest, told))
        described = base_graphs(checkpoint, dims) if network == "unet" else condition_graphs(checkpoint, "seg", dims)
        for graph, make in described:
            if graph in _GRAPHS[network]:
                spec = make()
                print(
                    f"{name}{note}: {graph}: {_flop(spec, sizes) / 1e9:.2f} GFLOP, {_weights(spec) / 1e6:.1f} M weights"
                )


def _controlnet(unet: Any) -> Any:
    """That of a UNet on the device `meta`: shapes alone."""
    network: Any = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    return network.to("meta")


def _flop(spec: ExportSpec, sizes: Mapping[str, int]) -> int:
    def empty(name: str, tensor: torch.Tensor) -> torch.Tensor:
        free = spec.free.get(name, {})
        shape = [sizes[free[axis]] if axis in free else size for axis, size in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    given = {
        argument: tuple(map(empty, spec.nested[argument], value))
        if isinstance(value, tuple)
        else empty(argument, value)
        for argument, value in spec.inputs.items()
    }
    # Attention as plain products: the counter knows those on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        spec.module.to("meta")(**given)
    return counter.get_total_flops()


def _weights(spec: ExportSpec) -> int:
    return sum(parameter.numel() for parameter in spec.module.parameters())


@app.command()
def plans(network: Network, folder: Folder, variant: Variants = None) -> None:
    """Builds TensorRT-RTX plans of the fp16 graphs and prints seconds, peak memory and kernels."""
    flavor = load_flavor("tensorrt-rtx")
    for name in variant or VARIANTS:
        place = folder / "fp16" / name
        for graph, spec in _specs(place).items():
            if graph in _GRAPHS[network]:
                built = build_plan(flavor, place / spec.file, Sizes().profiles(spec), BuilderSettings())
                print(
                    f"{name}: {graph}: {built.seconds:.0f} s, peak {built.peak / 2**30:.1f} GiB, {built.fusion}; "
                    f"on the device {built.weights / 2**20:.0f} + {built.activations / 2**20:.0f} MiB",
                    flush=True,
                )


_GRAPHS = {
    "unet": ("unet", "unet_encoder", "unet_decoder", "text_kv", "time_embeds"),
    "controlnet": ("controlnet_seg", "text_kv_seg", "time_embeds_seg"),
}


def _specs(place: Path) -> dict[str, GraphSpec]:
    """The signatures of the graphs of a folder, from their files."""
    found = {}
    for file in sorted(place.glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        inputs, outputs = (tuple(map(_spec, tensors)) for tensors in (graph.input, graph.output))
        found[file.stem] = GraphSpec(file.name, inputs, outputs, 0.0, 0.0, "", 0.0)
    return found


def _spec(tensor: Any) -> TensorSpec:
    kind = tensor.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorSpec(tensor.name, dtype, tuple(d.dim_param or d.dim_value for d in kind.shape.dim))


def _onnxruntime(file: Path, feeds: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = _SESSIONS.get(file) or ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    _SESSIONS[file] = session
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(None, dict(given)), strict=True))


def _openvino(file: Path, feeds: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(file)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    names = [output.get_any_name() for output in model.outputs]

    def run(given: Mapping[str, Any]) -> dict[str, Any]:
        request.infer(dict(given))
        return {name: request.get_tensor(name).data.copy() for name in names}

    return run


# ONNX Runtime's take any size: one copy of the weights serves two of the runs.
_SESSIONS: dict[Path, Any] = {}

if __name__ == "__main__":
    app()
