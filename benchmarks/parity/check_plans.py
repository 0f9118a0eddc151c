"""`cnpp-trt build --check`: plans that were just built, graph by graph against PyTorch."""

import logging
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TypedDict

from ...bundles.bundle import Bundle
from ...engines.build import Sizes
from ...export.checkpoint import Checkpoint
from ...gpu import find_gpu
from ...runtime.pipeline import Pipeline
from ..pytorch import device_of
from ..records import GraphParity
from ..report.fidelity import graph_table, verdict_text
from .graph_parity import check_graphs
from .thresholds import read_thresholds, violations

logger = logging.getLogger(__name__)


class Check(TypedDict):
    """backend: what ran; `note` says why that were not the plans, where it were not."""

    backend: str
    note: str
    graphs: list[GraphParity]
    missed: list[str]
    passed: bool


def check_plans(
    bundle: Bundle, checkpoint: Checkpoint, conditions: Sequence[str], sizes: Sizes, plans: Path | None
) -> Check:
    """Every graph that these conditions launch, at every size that there is a plan for.

    Without a GPU no plan runs: their source, the bundle's graphs, is checked in ONNX Runtime on the CPU, at one size.

    Raises:
        BackendError: there is a GPU and the plans do not run on it.
    """
    search = find_gpu()
    wanted = list(product(sizes.images, sizes.guided))
    if search.gpu is not None:
        note, deployed = "", Pipeline.open(bundle, "tensorrt", plans=plans)
    else:
        note = f"no plan can run here ({search.reason}): their source graphs were checked in ONNX Runtime on the CPU"
        deployed, wanted = Pipeline.open(bundle, "onnxruntime-cpu"), wanted[:1]
        logger.info(note)
    graphs = check_graphs(deployed, checkpoint, conditions, wanted, device_of(deployed))
    failures = violations(read_thresholds(bundle.manifest.number_format), graphs)
    return Check(backend=deployed.backend.name, note=note, graphs=graphs, missed=failures, passed=not failures)


def describe_check(check: Check, precision: str) -> str:
    """The check as Markdown: what ran, the table of graphs, and the verdict."""
    ran = f"on {check['backend']}, against PyTorch in fp32"
    lines = [ran, graph_table(check["graphs"]).markdown(), check["note"], verdict_text(check["missed"], precision)]
    return "\n\n".join(line for line in lines if line)
