"""Two backends on the same requests: how far apart their pictures are, and how well each follows the condition.

    python -m cnpp_trt.benchmarks.backend_parity REFERENCE CANDIDATE [--reference-backend …] [--candidate-backend …]

REFERENCE and CANDIDATE are bundles of the miniature. The conditions are those of fresh scenes that nothing was trained
on; both sides draw them with the same prompts and seeds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from numpy.typing import NDArray

from ..conditions import CONDITIONS
from ..runtime.consistency import Score, score
from ..runtime.pipeline import Pipeline
from ..runtime.request import Request
from .requests import make_requests


@dataclass(frozen=True)
class Parity:
    """Attributes:
    psnr: in dB, of each image against the reference's; infinite where they are equal.
    max_difference: the largest of all uint8 differences.
    reference, candidate: the mean consistency score of either side, in the metric's own unit.
    """

    condition: str
    metric: str
    psnr: tuple[float, ...]
    max_difference: int
    reference: float
    candidate: float

    def __str__(self) -> str:
        digits = 4 if self.metric == "SSIM" else 2
        images = f"{np.median(self.psnr):.1f} | {min(self.psnr):.1f} | {self.max_difference}"
        scores = f"{self.reference:.{digits}f} | {self.candidate:.{digits}f}"
        return (
            f"| {self.condition} | {images} | {self.metric} {scores} | {self.candidate - self.reference:+.{digits}f} |"
        )


TITLE = (
    "| condition | PSNR, median, dB | PSNR, worst, dB | largest difference of 255 "
    "| consistency, reference | candidate | difference |\n|---|---|---|---|---|---|---|"
)


class Draws(Protocol):
    """What `Pipeline` and `benchmarks.pytorch.PyTorch` have in common."""

    def __call__(self, request: Request) -> Any:
        """Something with `images`, uint8 [B,H,W,3]."""
        ...


def compare(reference: Pipeline, candidate: Draws, condition: str, count: int) -> Parity:
    """Draws `count` scenes on both sides; scores are taken by the reference's extractor."""
    psnr: list[float] = []
    largest = 0
    scores: dict[str, list[Score]] = {"reference": [], "candidate": []}
    for request in make_requests(reference, condition, range(count)):
        images = {"reference": reference(request).images[0], "candidate": candidate(request).images[0]}
        difference = images["candidate"].astype(np.int64) - images["reference"]
        largest = max(largest, int(np.abs(difference).max()))
        psnr.append(peak_signal_to_noise(difference))
        for side, image in images.items():
            found = reference.extract(condition, image)
            scores[side].append(score(condition, request.controls[0].image, found))
    means = {side: float(np.mean([s.value for s in found])) for side, found in scores.items()}
    metric = scores["reference"][0].metric
    return Parity(condition, metric, tuple(psnr), largest, means["reference"], means["candidate"])


def peak_signal_to_noise(difference: NDArray[np.int64]) -> float:
    """10 log10(255² / mean squared difference), in dB."""
    error = float(np.mean(difference.astype(np.float64) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def main(
    reference: Path,
    candidate: Annotated[
        Path | None, typer.Argument(help="Default: diffusers in fp16, each operation rounded.")
    ] = None,
    reference_backend: str = "onnxruntime-cpu",
    candidate_backend: str = "onnxruntime-cpu",
    candidate_precision: Annotated[str | None, typer.Option(help="Of openvino: f32 or bf16.")] = None,
    cond: Annotated[list[str] | None, typer.Option(help="Default: all of the reference bundle's.")] = None,
    count: int = 64,
) -> None:
    exact = Pipeline.open(reference, reference_backend)
    other: Draws
    if candidate is None:
        import torch

        from ..export.checkpoint import Checkpoint
        from .pytorch import PyTorch

        other, name = PyTorch(Checkpoint(exact.bundle.manifest.model), torch.float16), "PyTorch fp16, CPU"
    else:
        other = opened = Pipeline.open(candidate, candidate_backend, openvino_precision=candidate_precision)
        name = f"{opened.backend.name} ({candidate.name})"
    print(f"{name} against {exact.backend.name} ({reference.name}), {count} scenes\n\n{TITLE}")
    for condition in cond or [c for c in CONDITIONS if c in exact.bundle.manifest.conditions]:
        print(compare(exact, other, condition, count), flush=True)


if __name__ == "__main__":
    typer.run(main)
