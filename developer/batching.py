"""What a batch of different requests is worth beside the same requests one by one.

    python -m cnpp_trt.developer.batching BUNDLE [--backend onnxruntime-cpu] [--rounds 10]

Both sides run the same requests in turn, each round with its own prompts, control images and seeds, after their images
were compared. Prints a Markdown table.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..benchmarks.requests import make_requests
from ..benchmarks.statistics import paired_ratio, summarize
from ..errors import CnppError
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import ResolvedRequest

SIZES = (1, 2, 4, 8)


def measure(pipeline: Pipeline, condition: str, size: int, rounds: int, steps: int | None) -> str:
    """One row of the table: a batch of this size.

    Raises:
        CnppError: the images of both sides differ by more than 1 of 255.
    """
    fields = {} if steps is None else {"num_inference_steps": steps}
    numbers = range(size * (rounds + 1))
    requests = list(make_requests(pipeline, condition, numbers, **fields))
    groups = [requests[i * size : (i + 1) * size] for i in range(rounds + 1)]
    runs = (lambda group: [pipeline(request) for request in group]), pipeline.batch
    alone, together = (np.concatenate([result.images for result in run(groups[0])]) for run in runs)
    difference = int(np.abs(alone.astype(int) - together).max())
    if difference > 1:
        raise CnppError(f"a batch of {size} differs from its requests by {difference} of 255")
    pairs = [[_seconds(run, group) for run in runs] for group in groups[1:]]
    before, after = zip(*pairs, strict=True)
    ratio = paired_ratio(before, after)
    one, batch = summarize(before)["median"], summarize(after)["median"]
    interval = f"{ratio['median']:.2f}x ({ratio['low']:.2f}–{ratio['high']:.2f})"
    return f"| {size} | {one:.3f} s | {batch:.3f} s | {interval} | {size / batch:.2f} | {difference} |"


def _seconds(run: Callable[[Sequence[ResolvedRequest]], object], group: Sequence[ResolvedRequest]) -> float:
    start = time.perf_counter()
    run(group)
    return time.perf_counter() - start


def _main(
    bundle: Path,
    backend: str = "onnxruntime-cpu",
    cond: str = "seg",
    rounds: int = 10,
    threads: Annotated[int | None, typer.Option(help="Of the backends on the CPU.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
) -> None:
    print("| requests | one by one | in a batch | faster by (range) | images/s in a batch | images differ by |")
    print("|---:|---:|---:|---:|---:|---:|")
    with Pipeline.open(bundle, backend, threads=threads) as pipeline:
        for size in SIZES:
            print(measure(pipeline, cond, size, rounds, steps), flush=True)


if __name__ == "__main__":
    typer.run(_main)
