"""Whether a deployed pipeline is near enough to the reference: measured values against thresholds from a file."""

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...messages import one_line, printable
from ...schema import read_bounded
from ..records import GraphParity, ImageParity, StepParity

DEFAULTS = Path(__file__).with_name("thresholds.toml")
MAX_BYTES = 1 << 20
MAX_THRESHOLD = 1e9
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# Every threshold there is, and whether values must be at least it or at most.
_AT_LEAST = {
    "graph_relative_l2": False,
    "pixels_relative_l2": False,
    "labels_relative_l2": False,
    "forced_relative_l2": False,
    "free_relative_l2": False,
    "image_max_difference": False,
    "image_psnr": True,
    "image_ssim": True,
    "image_lpips": False,
}


def read_thresholds(precision: str, file: Path | None = None) -> dict[str, float]:
    """The thresholds of a precision by name: the file's, and where it is silent those of `thresholds.toml`.

    Raises:
        UserError: the file cannot be read or holds what is no threshold.
    """
    table = precision.partition("-")[0]  # `int8-bf16` is held to what int8 is
    thresholds = _table(DEFAULTS, table)
    return thresholds if file is None else thresholds | _table(file, table)


def violations(
    thresholds: Mapping[str, float],
    graphs: Sequence[GraphParity],
    steps: Sequence[StepParity] = (),
    images: Sequence[ImageParity] = (),
) -> list[str]:
    """One line for each value that misses its threshold, with the value, what is allowed, and where."""
    lines = []
    for name, value, what in _values(graphs, steps, images):
        if name not in thresholds:
            continue
        allowed = thresholds[name]
        if not (value >= allowed if _AT_LEAST[name] else value <= allowed):
            bound = "at least" if _AT_LEAST[name] else "at most"
            lines.append(f"{what}: {value:.4g}, allowed is {bound} {allowed:.4g} ({name})")
    return lines


def _values(
    graphs: Sequence[GraphParity], steps: Sequence[StepParity], images: Sequence[ImageParity]
) -> Iterator[tuple[str, float, str]]:
    """The threshold's name, the value, and what it is of."""
    for g in graphs:
        yield _graph_threshold(g["graph"]), g["relative_l2"], f"graph {g['graph']}, worst at {g['worst']}"
    for s in steps:
        forced = max(s["forced"])
        yield "forced_relative_l2", forced, f"{s['condition']}, step {s['forced'].index(forced) + 1} by itself"
        yield "free_relative_l2", s["free"][-1], f"{s['condition']}, latents of the whole loop"
    for i in images:
        of = f"{i['condition']}, worst of {len(i['ssim'])} images"
        yield "image_max_difference", max(i["max_difference"]), f"{of}, largest difference"
        yield "image_psnr", min((p for p in i["psnr"] if p is not None), default=math.inf), f"{of}, PSNR"
        yield "image_ssim", min(i["ssim"]), f"{of}, SSIM"
        if i["lpips"] is not None:
            yield "image_lpips", max(i["lpips"]), f"{of}, LPIPS"


def _graph_threshold(graph: str) -> str:
    if graph == "extractor_seg":
        return "labels_relative_l2"
    return "pixels_relative_l2" if graph.startswith(("extractor_", "vae_decoder")) else "graph_relative_l2"


def _table(file: Path, precision: str) -> dict[str, float]:
    try:
        content = tomllib.loads(read_bounded(file, MAX_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else one_line(e)
        raise UserError(f"cannot read the thresholds {printable(file)}: {reason}") from None
    tables = {name: _checked(file, name, table) for name, table in content.items()}
    return tables.get(precision, {})


def _checked(file: Path, name: str, table: Any) -> dict[str, float]:
    where = printable(file)
    if name not in PRECISIONS or not isinstance(table, dict):
        shown = printable(repr(name), 80)
        raise UserError(f"{where}: {shown} is no table of thresholds: there are {', '.join(PRECISIONS)}")
    for key, value in table.items():
        if key not in _AT_LEAST:
            shown = f"{name}.{printable(key, 80)}"
            raise UserError(f"{where}: unknown threshold {shown}: there are {', '.join(_AT_LEAST)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_THRESHOLD:
            shown = printable(repr(value), 80)
            raise UserError(f"{where}: {name}.{key} must be a number, not {shown}")
    return {key: float(value) for key, value in table.items()}
