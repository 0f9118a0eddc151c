"""The two flavors: which one is taken, what is said where none is, and that nobody else imports them."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import cnpp_trt
import pytest
from cnpp_trt.doctor import examine
from cnpp_trt.engines import flavor
from cnpp_trt.engines.flavor import MODULES, Flavor, installed_flavors, load_flavor
from cnpp_trt.errors import BackendError, UserError
from cnpp_trt.gpu import Gpu, GpuSearch
from cnpp_trt.versions import installed
from hints import hint

H200 = Gpu("NVIDIA H200", (9, 0), 150 * 10**9, "13.0", 132)
NO_DRIVER = GpuSearch(reason="no NVIDIA driver (libcuda.so.1)")
PACKAGE = Path(cnpp_trt.__path__[0])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine("tensorrt", gpu=True)`: one where only these flavors are installed, with or without a GPU."""

    def make(*installed: str, gpu: bool = False) -> None:
        monkeypatch.setattr(flavor, "find_gpu", lambda: GpuSearch(H200) if gpu else NO_DRIVER)
        for name, module_name in flavor.MODULES.items():
            module = None
            if name in installed:
                module = ModuleType(module_name)
                module.__spec__ = ModuleSpec(module_name, None)
                module.__version__ = f"9.{len(name)}"  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module_name, module)  # None: cannot be imported

    return make


def refusal(name: str) -> str:
    with pytest.raises(BackendError) as refused:
        load_flavor(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["", "TensorRT", "tensorrt_rtx", "cuda", "trt"])
def test_an_unknown_flavor(name: str) -> None:
    with pytest.raises(UserError) as refused:
        load_flavor(name)
    said = str(refused.value)
    assert said.startswith(f"unknown flavor '{name}': ") and said.endswith("choose from auto, tensorrt, tensorrt-rtx")


@pytest.mark.parametrize(
    ("installed", "gpu", "taken"),
    [
        (("tensorrt", "tensorrt-rtx"), True, "tensorrt"),
        (("tensorrt", "tensorrt-rtx"), False, "tensorrt-rtx"),
        (("tensorrt",), True, "tensorrt"),
        (("tensorrt-rtx",), True, "tensorrt-rtx"),
        (("tensorrt-rtx",), False, "tensorrt-rtx"),
    ],
)
def test_auto(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], gpu: bool, taken: str
) -> None:
    machine(*installed, gpu=gpu)
    found = load_flavor()
    assert (found.name, found.rtx, found.version) == (taken, taken == "tensorrt-rtx", f"9.{len(taken)}")
    assert found.trt is sys.modules[flavor.MODULES[taken]]
    assert installed_flavors() == list(installed)


@pytest.mark.parametrize("installed", [(), ("tensorrt",)])
def test_auto_without_a_gpu_wants_the_flavor_that_needs_none(
    machine: Callable[..., None], installed: tuple[str, ...]
) -> None:
    machine(*installed)
    said = refusal("auto")
    assert re.fullmatch(f"tensorrt-rtx needs tensorrt_rtx, which is not installed: {hint('rtx')}", said), said


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "gpu"), ("tensorrt-rtx", "rtx")])
def test_not_installed(machine: Callable[..., None], name: str, extra: str) -> None:
    machine(gpu=True)
    said = refusal(name)
    # Where ONNX Runtime for CPUs is, which the extra `gpu` would break, it is removed first.
    first = r"(`\S+ -m pip uninstall --yes onnxruntime`, then )?" if extra == "gpu" else ""
    assert re.fullmatch(f"{name} needs {MODULES[name]}, which is not installed: {first}{hint(extra)}", said), said


@pytest.mark.parametrize(
    "error", ["ImportError('libnvinfer.so.11: cannot\\nopen')", "OSError('libnvinfer.so.11: cannot\\nopen')"]
)
def test_installed_but_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """A library that is missing: TensorRT loads some with ctypes, which raises OSError."""
    (tmp_path / "tensorrt.py").write_text(f"raise {error}\n")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("tensorrt") == "tensorrt cannot be imported here: libnvinfer.so.11: cannot open"


def test_what_a_plan_is_for(machine: Callable[..., None]) -> None:
    machine("tensorrt", "tensorrt-rtx", gpu=True)
    rtx, plain = load_flavor("tensorrt-rtx"), load_flavor("tensorrt")
    assert (rtx.target(), plain.target()) == ("portable", "sm90-132-nvidia-h200")
    assert plain.runs("sm90-132-nvidia-h200", H200)
    for other in ("sm90", "sm90-132-nvidia-h100-80gb-hbm3", "sm90-16-nvidia-h200-mig-1g-18gb"):
        assert not plain.runs(other, H200)
    assert rtx.runs("portable", H200)


def test_tensorrt_builds_only_where_a_gpu_is(machine: Callable[..., None]) -> None:
    machine("tensorrt")
    with pytest.raises(BackendError) as refused:
        load_flavor("tensorrt").target()
    line = str(refused.value)
    assert "no NVIDIA driver" in line
    assert "--flavor tensorrt-rtx" in line
    assert "\n" not in line


def test_the_real_one(rtx: Flavor) -> None:
    from importlib.metadata import version

    assert rtx.name == "tensorrt-rtx"
    assert version("tensorrt-rtx").startswith(rtx.version)
    assert rtx.target() == "portable"
    assert "tensorrt-rtx" in installed_flavors()


def test_tensorrt_for_one_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install tensorrt-cu12`, as docs/troubleshooting.md says, installs no package called `tensorrt`."""
    assert "tensorrt" not in installed(["tensorrt"]), "this test wants a machine without TensorRT"
    for part in ("tensorrt_cu12", "tensorrt_cu12_bindings", "tensorrt_cu12_libs"):
        folder = tmp_path / f"{part}-10.14.1.48.post1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part}\nVersion: 10.14.1.48.post1\n")
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.14.1.48.post1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # so that it is gone afterwards
    del sys.modules["tensorrt"]
    found = load_flavor("tensorrt")
    assert (found.version, found.cuda) == ("10.14.1.48.post1", 12)
    assert installed(["tensorrt"]) == {"tensorrt": found.version}
    assert examine()["tensorrt_flavors"][0] == "tensorrt"
    # Where the package that stands for all parts has a version of its own, plans know that of the bindings.
    (tmp_path / "tensorrt-10.14.1.48.dist-info").mkdir()
    (tmp_path / "tensorrt-10.14.1.48.dist-info" / "METADATA").write_text("Name: tensorrt\nVersion: 10.14.1.48\n")
    assert installed(["tensorrt"]) == {"tensorrt": found.version}


# --------------------------------------------------------------------------------------------- who imports what


def imported(path: Path) -> set[str]:
    """The first part of every absolute import of a file, wherever in it, and of `import_module("…")`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value).partition(".")[0])
    return names


def test_one_file_imports_tensorrt() -> None:
    rooms = ["engines", "runtime", "export", "miniature", "benchmarks", "commands"]
    files = [*PACKAGE.glob("*.py"), *(p for room in rooms for p in (PACKAGE / room).rglob("*.py"))]
    assert {"cli.py", "build.py", "flavor.py", "builder.py", "store.py", "pipeline.py"} <= {p.name for p in files}
    modules = {"tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings"}
    # Not even flavor.py by name: it picks one of the two.
    assert [p for p in files if imported(p) & modules] == []
    texts = [p for p in files if "tensorrt_rtx" in p.read_text("utf-8")]
    assert PACKAGE / "engines" / "flavor.py" in texts


def test_the_store_imports_no_tensorrt(tmp_path: Path) -> None:
    """Listing and pruning plans, and finding one, must not load gigabytes of libraries, or need them at all."""
    program = Path(__file__).parent.parent / "programs" / "store_alone.py"
    ended = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, env={"CNPP_TRT_HOME": str(tmp_path)}
    )
    assert ended.returncode == 0, ended.stderr
    versions, loaded = json.loads(ended.stdout)
    assert loaded == []
    assert set(versions) == set(installed_flavors())
