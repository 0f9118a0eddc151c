"""The least that a guided step can take on this CPU, by what its bundle computes in.

    python -m cnpp_trt.developer.step_floor BUNDLE … [--threads N]

The matrix operations of one launch of the UNet and one of a ControlNet, over this machine's measured rates
(`benchmarks/latency/machine_peak.py`): those between QuantizeLinear and DequantizeLinear at the rate of int8, the rest
at that of fp32 or of bfloat16. Everything else (normalizations, memory) is taken to cost nothing, so that no
implementation of the same operations is faster; one of fewer, as Winograd's convolutions, could be.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..benchmarks.environment import physical_cores
from ..benchmarks.latency.flop_count import free_sizes, launches, split_flop
from ..benchmarks.latency.machine_peak import measure_machine
from ..benchmarks.report import numbers
from ..bundles.bundle import Bundle
from ..runtime.shape import LoopShape, Schedule

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: list[Path], threads: Annotated[int | None, typer.Option(help="Default: every physical core.")] = None
) -> None:
    """Measures the machine and prints a Markdown table."""
    rates = measure_machine("cpu", threads or physical_cores())["flop_per_second"]
    print("Measured: " + ", ".join(f"{rate / 1e9:.0f} G/s in {name}" for name, rate in rates.items()), end="\n\n")
    print("| bundle | GFLOP in int8 | others | least, others in fp32 | least, others in bfloat16 |")
    print("|---|---:|---:|---:|---:|")
    for folder in bundle:
        quantized, others = step_operations(Bundle.open(folder))
        least = (quantized / rates["int8"] + others / rates[name] for name in ("fp32", "bf16"))
        asked = (numbers.number(flop / 1e9) for flop in (quantized, others))
        print("|", " | ".join([folder.name, *asked, *map(numbers.duration, least)]), "|", flush=True)


def step_operations(bundle: Bundle) -> tuple[int, int]:
    """Matrix operations of a guided step with one ControlNet: in the quantized format, and others."""
    shape = LoopShape(images=1, guided=True, controls=(next(iter(bundle.manifest.conditions)),), uncontrolled=False)
    steps = launches(bundle, shape, Schedule(active=((True,),), noisy=(False,)))
    networks = [step for step in steps if step.stage in ("unet", "controlnet")]
    counted = [split_flop(bundle, step.graph, free_sizes(bundle, step)) for step in networks]
    return sum(quantized for quantized, _ in counted), sum(others for _, others in counted)


if __name__ == "__main__":
    app()
