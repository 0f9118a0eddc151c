"""A batch job on 64 GPUs, calculated: how long a million images take, what they cost, and what saturates first.

    python -m cnpp_trt.developer.cluster_cost [--gpus 64] [--efficiency 0.3] [--leader-rate 350]

Nothing here was measured on a GPU. Seconds of an image are the operations of SD 1.5 at 512×512 (20 guided steps with a
ControlNet, and the decoder) over a share of the GPU's published peak. Prints Markdown tables.
"""

from dataclasses import dataclass
from typing import Annotated

import typer

IMAGE_TFLOP = 46.0
"""20 guided steps of UNet and ControlNet at 2.173, and the decoder at 2.515: benchmarks/latency/flop_count.py."""
IMAGE_BYTES = 450_000
"""Of a PNG of 512×512 with its metadata."""
FILES = 3  # an image, its record, its control image
OPERATIONS = 3  # of a file system for each: create, fsync, rename
BUNDLE_GB = 2.8  # SD 1.5 with one condition, fp16, and the plans beside the graphs
MILLION = 1_000_000


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be rented.

    Attributes:
        name: and who rents it out.
        dollars: an hour, on demand.
        peak: dense fp16, TFLOP/s, by NVIDIA's data sheet.
    """

    name: str
    dollars: float
    peak: float


# On demand, verified by techbytes.app ("Serverless GPU Pricing Matrix") with the vendors on 2026-05-07.
PRICES_OF = "2026-05-07"
GPUS = (
    Gpu("H100 SXM, Lambda", 3.78, 989),
    Gpu("H100, Modal", 3.9492, 989),
    Gpu("L40S, Modal", 1.9512, 362),
    Gpu("L4, Modal", 0.7992, 121),
)


@dataclass(frozen=True)
class Limits:
    """What the rest of a cluster can do.

    Attributes:
        leader: requests a second that the process that leads the job hands out and notes: developer/batch_dry.py.
        bandwidth: GB/s of the shared file system.
        operations: a second, of its metadata.
        network: GB/s from where a bundle is fetched, all nodes together.
    """

    leader: float
    bandwidth: float
    operations: float
    network: float


def seconds_of_image(gpu: Gpu, efficiency: float) -> float:
    """Of one image on one GPU."""
    return IMAGE_TFLOP / (gpu.peak * efficiency)


def shares(rate: float, limits: Limits) -> dict[str, float]:
    """How much of each limit so many images a second take."""
    return {
        "leader": rate / limits.leader,
        "bandwidth": rate * IMAGE_BYTES / 1e9 / limits.bandwidth,
        "metadata": rate * FILES * OPERATIONS / limits.operations,
    }


def _main(
    gpus: int = 64,
    efficiency: Annotated[float, typer.Option(help="Share of the peak that a step reaches; not measured.")] = 0.3,
    leader_rate: Annotated[float, typer.Option(help="Requests a second, as batch_dry prints them.")] = 350.0,
    bandwidth: Annotated[float, typer.Option(help="GB/s of the shared file system.")] = 1.0,
    operations: Annotated[float, typer.Option(help="A second, of its metadata.")] = 5000.0,
    network: Annotated[float, typer.Option(help="GB/s from the store of bundles.")] = 5.0,
) -> None:
    limits = Limits(leader_rate, bandwidth, operations, network)
    print(f"| GPU, rented from | $ an hour ({PRICES_OF}) | an image | {gpus} GPUs | a million images | cost |")
    print("|---|---:|---:|---:|---:|---:|")
    for gpu in GPUS:
        each = seconds_of_image(gpu, efficiency)
        hours = MILLION * each / gpus / 3600
        cost = hours * gpus * gpu.dollars
        print(
            f"| {gpu.name} | {gpu.dollars:.2f} | {each:.3f} s | {gpus / each:.0f} images/s | {hours:.2f} h "
            f"| ${cost:,.0f} |"
        )
    print(f"\n| {gpus} GPUs | requests handed out | bytes written | metadata | saturates first | GPUs until then |")
    print("|---|---:|---:|---:|---|---:|")
    for gpu in GPUS[1:]:
        rate = gpus / seconds_of_image(gpu, efficiency)
        taken = shares(rate, limits)
        first = max(taken, key=lambda name: taken[name])
        cells = " | ".join(f"{share:.0%}" for share in taken.values())
        print(f"| {gpu.name.partition(',')[0]} | {cells} | {first} | {gpus / taken[first]:.0f} |")
    start = gpus * BUNDLE_GB / network
    print(f"\nBefore the first image: {gpus} nodes fetch {BUNDLE_GB} GB each in {start:.0f} s at {network:g} GB/s.")


if __name__ == "__main__":
    typer.run(_main)
