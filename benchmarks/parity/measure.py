"""How close a deployed pipeline is to PyTorch in fp32: graph by graph, step by step, and in its images.

Graphs and steps are compared with the modules that were exported (`pytorch_backend`), on one request of each condition;
images with diffusers' own pipeline (`pytorch`), which knows nothing of this project's loop.
"""

import gc
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ...errors import CnppError
from ...export.checkpoint import Checkpoint
from ...runtime.pipeline import Pipeline
from ...runtime.settings.request import ResolvedRequest
from ...versions import installed
from ..image_metrics import Lpips, Picture, difference_map, max_difference, png, psnr, ssim
from ..pytorch import PyTorch, device_of, exact_float32
from ..records import Heatmap, ImageParity, Parity
from ..requests import make_requests
from ..systems import ImageGenerator
from .graph_parity import compare_launches, request_of_both
from .thresholds import violations

logger = logging.getLogger(__name__)

# A UNet above this runs in PyTorch's fp16 on a CPU only where it is asked for: one step of SD 1.5 takes minutes.
_SMALL = 200 << 20


def compare_with_pytorch(
    deployed: Pipeline,
    checkpoint: Checkpoint,
    conditions: Sequence[str],
    thresholds: Mapping[str, float],
    *,
    images: int = 8,
    half: int | None = None,
    steps: int | None = None,
) -> Parity:
    """Compares graphs, steps and images with PyTorch's.

    Args:
        deployed: the runtime's own pipeline.
        checkpoint: that the bundle was exported from.
        conditions: to compare.
        thresholds: of `thresholds.read_thresholds`.
        images: of each condition.
        half: how many of them PyTorch makes in fp16 too; None: all on a GPU, one of a small model on a CPU, else none.
        steps: None takes the model's own.
    """
    exact_float32()
    device = device_of(deployed)
    fields = {} if steps is None else {"num_inference_steps": steps}
    requests = {c: list(make_requests(deployed, c, range(images), **fields)) for c in conditions}
    firsts = [own[0] for own in requests.values()]
    recorded = [*firsts, *request_of_both(firsts)]
    graphs, step_parities = compare_launches(deployed, checkpoint, recorded, device)

    gc.collect()  # diffusers' models hold themselves in cycles; two copies of the weights are never wanted

    unavailable: dict[str, str] = {}
    lpips = _lpips(unavailable)
    half = _half_count(deployed, images, half, device, unavailable)
    exact = PyTorch(checkpoint, device=device)
    parities: list[ImageParity] = []
    heatmaps: list[Heatmap] = []
    kept: dict[str, list[Picture]] = {}
    for condition, own in requests.items():
        start = time.perf_counter()
        wanted = list(generate(exact, own))
        found = list(generate(deployed, own))
        parities.append(compare_images(condition, wanted, found, lpips))
        heatmaps.append(heatmap(condition, own, wanted, found))
        kept[condition] = wanted[:half]
        logger.info(f"{condition}: {images} images on either side in {time.perf_counter() - start:.1f} s")
    del exact
    gc.collect()

    halves: list[ImageParity] = []
    if half:
        rounded = PyTorch(checkpoint, torch.float16, device)
        for condition, wanted in kept.items():
            start = time.perf_counter()
            halves.append(compare_images(condition, wanted, list(generate(rounded, requests[condition][:half])), lpips))
            logger.info(f"{condition}: {half} images in PyTorch's fp16 in {time.perf_counter() - start:.1f} s")

    failures = violations(thresholds, graphs, step_parities, parities)
    return Parity(
        model=deployed.bundle.manifest.model,
        backend=deployed.backend.name,
        precision=deployed.precision,
        reference=reference_title(device),
        graphs=graphs,
        steps=step_parities,
        images=parities,
        half=halves,
        heatmaps=heatmaps,
        thresholds=dict(thresholds),
        missed=failures,
        passed=not failures,
        unavailable=unavailable,
    )


def generate(system: ImageGenerator, requests: Iterable[ResolvedRequest]) -> Iterator[Picture]:
    """The first image of each request."""
    for request in requests:
        yield system(request).images[0]


def compare_images(
    condition: str, reference: Sequence[Picture], found: Sequence[Picture], lpips: Lpips | None = None
) -> ImageParity:
    """How far images are from the reference's, uint8 [H,W,3] each, pair by pair."""
    pairs = list(zip(reference, found, strict=True))
    return ImageParity(
        condition=condition,
        max_difference=[max_difference(a, b) for a, b in pairs],
        psnr=[psnr(a, b) for a, b in pairs],
        ssim=[ssim(a, b) for a, b in pairs],
        lpips=[lpips(a, b) for a, b in pairs] if lpips is not None else None,
    )


def heatmap(
    condition: str, requests: Sequence[ResolvedRequest], reference: Sequence[Picture], found: Sequence[Picture]
) -> Heatmap:
    """Of the image that is furthest from the reference's."""
    errors = [float(np.mean(np.square(a.astype(np.float64) - b))) for a, b in zip(reference, found, strict=True)]
    worst = int(np.argmax(errors))
    difference, scale = difference_map(reference[worst], found[worst])
    return Heatmap(
        condition=condition,
        seed=requests[worst].seeds[0],
        reference=png(reference[worst]),
        deployed=png(found[worst]),
        difference=png(difference),
        scale=scale,
    )


def reference_title(device: str) -> str:
    """The reference with its versions and device, as in `PyTorch 2.13 on a CPU`."""
    versions = installed(("torch", "diffusers"))
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"PyTorch {versions['torch']}, diffusers {versions['diffusers']}, fp32 on {where}"


def _lpips(unavailable: dict[str, str]) -> Lpips | None:
    try:
        return Lpips()
    except CnppError as e:
        unavailable["lpips"] = str(e)
        return None


def _half_count(deployed: Pipeline, images: int, asked: int | None, device: str, unavailable: dict[str, str]) -> int:
    if asked == 0:
        unavailable["half"] = "it was not asked for"
    if asked is not None or device == "cuda":
        return min(images, images if asked is None else asked)
    if sum(entry["size"] for entry in deployed.bundle.graph_files("unet").values()) <= _SMALL:
        return 1
    unavailable["half"] = "PyTorch's fp16 takes minutes for a step of this size on a CPU: ask for it with --half 1"
    return 0
