"""A bundle on a node: plans for its GPU are built where they are missing, once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import RuntimeOptions
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.flavor import Flavor
from cnpp_trt.engines.store import PlanStore
from cnpp_trt.errors import BackendError
from cnpp_trt.runtime.nodes import BundleOnNodes

CODE = """
import sys
from cnpp_trt import RuntimeOptions
from cnpp_trt.engines import build
from cnpp_trt.runtime.nodes import BundleOnNodes
real, built = build.build_plan, []
build.build_plan = lambda *a, **k: (built.append(1), real(*a, **k))[1]
BundleOnNodes(sys.argv[1], sys.argv[2], 2).open(RuntimeOptions("tensorrt", plans=sys.argv[3]))
print(len(built))
"""


def test_workers_of_a_node_build_its_plans_once(small: Bundle, rtx: Flavor, tmp_path: Path) -> None:
    """TensorRT-RTX, which builds without a GPU; two workers at the same time, and one later."""
    line = [sys.executable, "-c", CODE, str(small.folder), small.digest, str(tmp_path / "plans")]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    built = [int(process.communicate(timeout=300)[0]) for process in running]
    graphs = small.manifest.graphs
    assert sum(built) == len(graphs)
    plans = PlanStore(tmp_path / "plans").plans()
    assert sorted(plan.key.graph for plan in plans) == sorted(graphs)
    unet = next(plan for plan in plans if plan.key.graph == "unet")
    assert {row["x"]["opt"][0] for row in unet.key.profiles} == {2, 4}  # 1 and 2 images, with guidance
    assert subprocess.run(line, capture_output=True, text=True, timeout=300).stdout == "0\n"


def test_other_backends_build_nothing(small: Bundle, tmp_path: Path) -> None:
    options = RuntimeOptions("onnxruntime-cpu", plans=tmp_path / "plans")
    assert BundleOnNodes.of(small, None, 1).open(options).digest == small.digest
    assert not (tmp_path / "plans").exists()


def test_another_bundle(small: Bundle, small_bundle: Any, tmp_path: Path) -> None:
    other = small_bundle(tmp_path / "other", 1)
    with pytest.raises(BackendError, match="another bundle on a worker"):
        BundleOnNodes(str(other.folder), small.digest).open(RuntimeOptions())
