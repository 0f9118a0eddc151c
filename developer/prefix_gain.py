"""What the shared guidance prefix saves at full size: a UNet of SD 1.5's shapes on ONNX Runtime's CPU provider.

    python -m cnpp_trt.developer.prefix_gain [--rounds 8] [--folder DIR]

Random weights, 512×512, one guided image. The same graph runs with one image and two prompts, and with that image given
twice, which shares nothing (docs/design.md), in turn.
"""

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from ..bundles.bundle import Manifest
from ..bundles.manifest import GraphOptions
from ..export.checkpoint import Checkpoint
from ..export.graphs import GraphDims, base_graphs
from ..export.onnx_graph import OPSET, export_graph
from .random_models.checkpoint import make_checkpoint


def measure(folder: Path, rounds: int) -> None:
    """Exports the UNet into `folder` where it is not there yet, and prints each round and the median."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "unet.onnx"
    if not file.exists():
        checkpoint = Checkpoint(str(make_checkpoint(folder / "checkpoint", tiny=False, conditions=("seg",))))
        as_one = GraphOptions(hoist_prompt=False, hoist_time=False)
        told = SimpleNamespace(
            width=512, height=512, precision="fp32", latent_channels=4, vae_scale_factor=8, options=as_one
        )
        dims = GraphDims.of(checkpoint, cast(Manifest, told))
        export_graph(dict(base_graphs(checkpoint, dims))["unet"](), folder, "fp32", OPSET["fp32"])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    rng, sizes = np.random.default_rng(0), {"batch": 2, "images": 1, "tokens": 77}
    feeds: dict[str, Any] = {"timestep": np.array([601], np.float32)}
    for tensor in session.get_inputs():
        shape: list[Any] = [sizes.get(str(d), d) for d in tensor.shape]
        feeds.setdefault(tensor.name, rng.standard_normal(shape).astype(np.float32))
    image = feeds["model_input"]
    shared = {**feeds, "rows": np.zeros(2, np.int64)}
    twice = {**feeds, "model_input": np.concatenate([image, image]), "rows": np.arange(2)}
    results: list[Any] = [session.run(None, given)[0] for given in (twice, shared)]
    print(f"largest difference {np.abs(results[0] - results[1]).max()}")
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for given, found in zip((twice, shared), seconds, strict=True):
            start = time.perf_counter()
            session.run(None, given)
            found.append(time.perf_counter() - start)
        print(f"given twice {seconds[0][-1]:.2f} s, shared {seconds[1][-1]:.2f} s")
    ratios = np.array(seconds[0]) / np.array(seconds[1])
    low, high = np.quantile(ratios, [0.25, 0.75])
    print(f"faster by {np.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}), {rounds} rounds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cnpp_trt.developer.prefix_gain")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keeps the exported graph")
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="cnpp-trt-prefix-") as made:
            measure(Path(made), arguments.rounds)
