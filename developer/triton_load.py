"""What Triton gives to concurrent clients, with dynamic batching and without, side by side in one run.

    python -m cnpp_trt.developer.triton_load WHEEL NUMPY [--clients 1,2,4,8] [--requests 48] [--rounds 2]

WHEEL and NUMPY are the folders of the unpacked wheels that developer/triton_server.py names. One server has the
miniature twice: as `batched`, which draws up to four images together, and as `single`. Clients ask over gRPC, each as
soon as it was answered, and the two models take turns. Every picture is compared with the pipeline's. Prints a Markdown
table.
"""

import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..bundles.bundle import Bundle, find_bundle
from ..deploy.triton_config import ModelSettings
from ..deploy.triton_repository import package
from ..errors import CnppError
from ..runtime.images.image_files import Pixels, read_image
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import Control
from .triton_server import triton_server

_WAYS = {"batched": 4, "single": 1}


class Client:
    """Asks for one picture at a time."""

    def __init__(self, address: str, control: Pixels) -> None:
        import tritonclient.grpc as module

        self._module = module
        self._client: Any = module.InferenceServerClient(address)
        self._control = control

    def draw(self, model: str, seed: int) -> Pixels:
        """The image uint8 [H,W,3] of this seed."""
        arrays = {
            "prompt": ("BYTES", np.array([[b"a house by a road"]], np.object_)),
            "condition": ("BYTES", np.array([[b"seg"]], np.object_)),
            "control_image": ("UINT8", self._control[None, None]),
            "seed": ("UINT64", np.array([[seed]], np.uint64)),
        }
        inputs = []
        for name, (kind, array) in arrays.items():
            tensor = self._module.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        answer = self._client.infer(model, inputs, outputs=[self._module.InferRequestedOutput("image")])
        found: Pixels = answer.as_numpy("image")[0]
        return found


def measure(address: str, control: Pixels, model: str, clients: int, images: list[Pixels]) -> tuple[float, list[float]]:
    """All images, from so many clients. Returns the seconds of everything, and of each request.

    Raises:
        CnppError: an image differs by more than the rounding of another batch size.
    """
    left = list(range(len(images)))
    spent: list[float] = []
    wrong: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        client = Client(address, control)
        while True:
            with lock:
                if not left:
                    return
                seed = left.pop()
            began = time.perf_counter()
            found = client.draw(model, seed)
            spent.append(time.perf_counter() - began)
            if np.abs(found.astype(int) - images[seed]).max() > 1:
                wrong.append(seed)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if wrong or len(spent) != len(images):
        raise CnppError(f"{model}, {clients} clients: {len(spent)} of {len(images)} answers, {len(wrong)} wrong")
    return seconds, spent


def _main(
    wheel: Path,
    numpy: Path,
    clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(help="Of each measurement.")] = 48,
    rounds: int = 2,
    model: str = "miniature-lcm",
) -> None:
    bundle = Bundle.open(find_bundle(model, "fp32", None, ("fp32",)))
    path = bundle.file(bundle.manifest.conditions["seg"].get("image", ""))
    control = read_image(path).pixels
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipeline:
        images = [
            pipeline("a house by a road", Control("seg", control), seed=seed).images[0] for seed in range(requests)
        ]
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-triton-") as name:
        folder = Path(name)
        for way, most in _WAYS.items():
            settings = ModelSettings(max_batch=most, backend="onnxruntime-cpu", threads=1)
            package(bundle, folder / "models", way, settings)
        (folder / "run").mkdir()
        with triton_server(wheel, numpy, folder / "models", list(_WAYS), folder / "run") as server:
            print("| clients | batched | single | batched beside single | batched: median | single: median |")
            print("|---:|---:|---:|---:|---:|---:|")
            for count in map(int, clients.split(",")):
                rates: dict[str, list[float]] = {way: [] for way in _WAYS}
                spent: dict[str, list[float]] = {way: [] for way in _WAYS}
                for _ in range(rounds):
                    for way in _WAYS:
                        seconds, each = measure(server.grpc, control, way, count, images)
                        rates[way].append(requests / seconds)
                        spent[way] += each
                ratio = statistics.median(b / s for b, s in zip(rates["batched"], rates["single"], strict=True))
                shown = " | ".join(f"{statistics.median(rates[way]):.2f} images/s" for way in _WAYS)
                medians = " | ".join(f"{statistics.median(spent[way]):.3f} s" for way in _WAYS)
                print(f"| {count} | {shown} | {ratio:.2f} | {medians} |", flush=True)
    print(f"\n{os.cpu_count()} CPU cores; load average {before:.1f} before and {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    typer.run(_main)
