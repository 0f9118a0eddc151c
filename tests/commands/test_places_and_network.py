"""What a command leaves and asks for: nothing in the home folder or of the network, results where they are said."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

# Every attempt to reach a network is written down and fails; strace below sees what native code does.
FORBID = """
import os, socket
def forbidden(*arguments, **options):
    with open(os.environ["ASKED"], "a") as file:
        print(arguments, file=file)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.socket.connect = socket.create_connection = forbidden
"""


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., tuple[int, str, set[str]]]:
    """A command in an empty folder with an empty home: its status, its stderr, and what it left where."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FORBID)
    for folder in ("home", "tmp", "here"):
        (tmp_path / folder).mkdir()

    def call(*arguments: Any, home: str | None = None, **more: str) -> tuple[int, str, set[str]]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "HF_", "XDG_", "CNPP"))}
        env = kept | {
            "HOME": home or str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "tmp"),
            "CNPP_TRT_HOME": str(tmp_path / "artifacts"),
            "ASKED": str(tmp_path / "asked"),
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **more,
        }
        line = [sys.executable, "-m", "cnpp_trt", *map(str, arguments)]
        ended = subprocess.run(line, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path / "here")
        assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
        left = {
            str(p.relative_to(tmp_path)) for folder in ("home", "tmp", "here") for p in (tmp_path / folder).iterdir()
        }
        return ended.returncode, ended.stderr, left

    return call


@pytest.fixture
def seg(tmp_path: Path) -> Path:
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(tmp_path / "seg.png")
    return tmp_path / "seg.png"


def test_run_leaves_its_pictures_alone(watched: Any, tiny: Any, seg: Path) -> None:
    run = ["run", "--bundle", tiny.bundle, "--cond", "seg", "--image", seg, "--steps", 1, "--seed", 1]
    status, err, left = watched(*run)
    assert (status, left) == (0, {"here/cnpp-trt-runs"}), err
    assert "telemetry" not in err.lower()
    status, err, left = watched(*run, home="/proc/nope")  # a home that cannot be written
    assert (status, left) == (0, {"here/cnpp-trt-runs"}), err
    assert "telemetry" not in err.lower()


def test_openvino_too(watched: Any, tiny: Any, seg: Path) -> None:
    pytest.importorskip("openvino")
    run = ["run", "--bundle", tiny.bundle, "--cond", "seg", "--image", seg, "--steps", 1, "--backend", "openvino"]
    status, err, left = watched(*run)
    assert (status, left) == (0, {"here/cnpp-trt-runs"}), err


def test_export_leaves_its_bundle_alone(watched: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, err, left = watched("export", "--model", tiny_checkpoint, "--cond", "seg")
    assert (status, left) == (0, set()), err
    (bundle,) = (tmp_path / "artifacts" / "bundles").iterdir()
    status, err, left = watched("verify", bundle)
    assert (status, left) == (0, set()), err


def test_commands_that_only_look(watched: Any, tmp_path: Path) -> None:
    for arguments in (["doctor"], ["engines", "list"], ["engines", "prune"], ["--help"], ["run", "--help"]):
        status, err, left = watched(*arguments)
        assert (status, left) == (0, set()), err
        assert not (tmp_path / "artifacts").exists()


def test_measuring_leaves_results_alone(watched: Any, tiny: Any) -> None:
    pytest.importorskip("skimage")
    own = ["--bundle", tiny.bundle, "--model", tiny.checkpoint, "--backend", "onnxruntime-cpu", "--steps", 1]
    status, err, left = watched("parity", *own, "--cond", "seg", "--num-images", 1, "--half", 0)
    assert (status in (0, 1), left) == (True, {"here/cnpp-trt-results"}), err
    status, err, left = watched("report")
    assert (status, left) == (0, {"here/cnpp-trt-results"}), err


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_native_code_connects_nowhere(tiny: Any, seg: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    run = ["run", "--bundle", tiny.bundle, "--cond", "seg", "--image", seg, "--steps", 1, "--out", tmp_path / "out"]
    line = ["strace", "-f", "-e", "trace=connect,sendto", "-o", trace, sys.executable, "-m", "cnpp_trt", *run]
    ended = subprocess.run([str(a) for a in line], capture_output=True, text=True, timeout=300)
    if "ptrace" in ended.stderr:
        pytest.skip("strace may not trace here")
    assert ended.returncode == 0, ended.stderr
    assert not [text for text in trace.read_text().splitlines() if "AF_INET" in text]


def test_telemetry_is_off_unless_the_user_says_otherwise() -> None:
    show = "import os, cnpp_trt; print(os.environ['ORT_DISABLE_TELEMETRY'])"

    def asked(**env: str) -> str:
        kept = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
        return subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=kept | env).stdout

    assert asked() == "1\n"
    assert asked(ORT_DISABLE_TELEMETRY="0") == "0\n"


@pytest.mark.parametrize(
    ("blocked", "arguments", "extra"),
    [
        ("onnxruntime", ["run", "--backend", "onnxruntime-cpu"], "cpu"),
        ("openvino", ["run", "--backend", "openvino"], "openvino"),
        ("tensorrt_rtx", ["build", "--cond", "seg", "--flavor", "tensorrt-rtx"], "rtx"),
        ("torch", ["parity", "--backend", "onnxruntime-cpu"], "export"),
        ("skimage", ["parity", "--backend", "onnxruntime-cpu"], "bench"),
        ("skimage", ["bench", "--no-waterfall"], "bench"),
        ("matplotlib", ["report", "RESULTS"], "bench"),
        ("jinja2", ["report", "RESULTS"], "bench"),
        ("polygraphy", ["engines", "capability", "ONNX", "--flavor", "tensorrt-rtx"], "rtx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    watched: Any, tiny: Any, tmp_path: Path, blocked: str, arguments: list[str], extra: str
) -> None:
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys; sys.modules[{blocked!r}] = None\n")
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    places = {"RESULTS": str(results / "bench-miniature.json"), "ONNX": str(tiny.bundle / "unet.onnx")}
    own = [] if arguments[0] in ("report", "engines") else ["--bundle", str(tiny.bundle)]
    own += ["--model", str(tiny.checkpoint)] if arguments[0] in ("bench", "parity") else []
    status, err, left = watched(*[places.get(a, a) for a in arguments], *own)
    assert status == 1, err
    assert len(err.splitlines()) == 1 and f"[{extra}" in err and blocked in err, err
    assert left <= {"here/cnpp-trt-results"}


def test_auto_without_onnxruntime_takes_openvino(watched: Any, tiny: Any, seg: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['onnxruntime'] = None\n")
    line = [
        "run", "--bundle", tiny.bundle, "--cond", "seg", "--image", seg, "--steps", 1, "--seed", 1,
        "--out", tmp_path / "out",
    ]  # fmt: skip
    status, err, _ = watched(*line)
    assert status == 0, err
    assert "on openvino" in err and "not onnxruntime-cpu" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["run-0001"]
