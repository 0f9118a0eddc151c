"""`cnpp-trt build` and `cnpp-trt engines` as users have them, on the real TensorRT-RTX."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.flavor import Flavor
from cnpp_trt.engines.plan import ENGINE
from cnpp_trt.engines.store import RECORD, PlanStore
from cnpp_trt.errors import BackendError
from cnpp_trt.files import PARTIAL
from hints import hint

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).parent / "cnpp-trt"
GRAPHS = {"unet", "update", "hint_seg", "controlnet_seg", "extractor_seg"}


@pytest.fixture
def build(small: Bundle, tmp_path: Path) -> list[Any]:
    """The start of a valid `build` of no time, to append to."""
    return [
        "build",
        "--bundle",
        small.folder,
        "--cond",
        "seg",
        "--flavor",
        "tensorrt-rtx",
        "--plans",
        tmp_path / "plans",
    ]


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


def left(root: Path) -> set[str]:
    """What is there besides lock files."""
    return {p.name for p in root.iterdir() if not p.name.endswith(".lock")} if root.is_dir() else set()


def batches(store: PlanStore, graph: str = "unet") -> list[list[int]]:
    """Of every plan of a graph, the first size of `x` in each profile."""
    return [[row["x"]["opt"][0] for row in p.key.profiles] for p in store.plans() if p.key.graph == graph]


# --------------------------------------------------------------------------------------------------------------- build


def test_build_a_real_bundle(command: Any, real: Bundle, rtx: Flavor, tmp_path: Path) -> None:
    """To the end and again: first as JSON, then as text, which builds nothing."""
    arguments = ["build", "--bundle", real.folder, "--cond", "seg", "--flavor", "tensorrt-rtx", "--plans", tmp_path]
    first = command(*arguments, "--json")
    assert first.status == 0, first.err
    assert len(first.out.splitlines()) == 1
    [engines] = json.loads(first.out)
    graphs = list(real.manifest.graphs)
    assert sorted(engines["built"]) == sorted(graphs)
    assert engines["seconds"] > 0
    # Progress on stderr: a line for each graph, with what it took.
    assert [line.partition(":")[0] for line in first.err.splitlines()] == engines["built"]
    for plan in engines["plans"]:
        folder = Path(plan["folder"])
        assert folder.parent == tmp_path
        assert plan["size"] == (folder / ENGINE).stat().st_size
        assert plan["model"] == real.manifest.model
        key = plan["key"]
        assert (key["flavor"], key["version"], key["target"]) == ("tensorrt-rtx", rtx.version, "portable")
    unet = next(p for p in engines["plans"] if p["key"]["graph"] == "unet")
    assert unet["fusion"]["attentions"] > 0
    assert unet["weights"] > sum(real.manifest.files[f]["size"] for f in ("unet.onnx.data",)) / 2

    start = time.process_time()
    second = command(*arguments)
    assert time.process_time() - start < 5
    assert (second.status, second.err) == (0, "")
    lines = second.out.splitlines()
    assert lines[0] == str(real.folder)
    assert lines[-1] == f"in {tmp_path}"
    rows, total = lines[1 : len(graphs) + 1], lines[len(graphs) + 1]
    assert [row.split()[0] for row in rows] == [p["key"]["graph"] for p in engines["plans"]]
    assert all("cached" in row and " kernels" in row for row in rows)
    assert total.startswith(f"{len(graphs)} plans, ")
    assert ", 0 built in " in total
    assert total.endswith(f"; tensorrt-rtx {rtx.version}, portable")


@pytest.mark.usefixtures("rtx")
def test_build_as_text(command: Any, build: list[Any], small: Bundle, store: PlanStore) -> None:
    outcome = command(*build)
    assert outcome.status == 0, outcome.err
    assert {p.key.graph for p in store.plans()} == GRAPHS
    rows = outcome.out.splitlines()[1 : len(GRAPHS) + 1]
    assert {row.split()[0] for row in rows} == GRAPHS
    assert all(re.search(r" MiB  \d+\.\d s +\d+ kernels", row) for row in rows)
    assert f", {len(GRAPHS)} built in " in outcome.out
    assert left(store.root) == {p.folder.name for p in store.plans()}


@pytest.mark.usefixtures("rtx")
def test_all_conditions(command: Any, build: list[Any], store: PlanStore) -> None:
    build[build.index("seg")] = "all"
    [engines] = json.loads(command(*build, "--json").out)
    assert set(engines["built"]) == GRAPHS | {"hint_depth", "controlnet_depth"}


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("options", "scale", "wanted"),
    [
        ([], None, [2]),  # diffusers guides with 7.5 where nothing is said
        ([], 3.0, [2]),
        ([], 1.0, [1]),
        (["--guided"], 1.0, [2]),
        (["--unguided"], None, [1]),
        (["--both"], 1.0, [2, 1]),
        (["--guided", "--unguided"], None, [2, 1]),
        (["--images", "1-3"], None, [2, 4, 6]),
        (["--images", "1,4"], 1.0, [1, 4]),
        (["--images", "1-2,2,4"], 1.0, [1, 2, 4]),
        (["--images", "1-4", "--dynamic"], None, [2]),
    ],
)
def test_options_reach_the_profiles(
    command: Any, small_bundle: Any, tmp_path: Path, store: PlanStore,
    options: list[str], scale: float | None, wanted: list[int],
) -> None:  # fmt: skip
    bundle = small_bundle(tmp_path / "scaled", guidance_scale=scale)
    outcome = command("build", "--bundle", bundle.folder, "--cond", "seg", "--plans", store.root, *options)
    assert outcome.status == 0, outcome.err
    assert batches(store) == [wanted]


@pytest.mark.usefixtures("rtx")
def test_the_optimization_level_makes_another_plan(command: Any, build: list[Any], store: PlanStore) -> None:
    assert command(*build).status == 0
    outcome = command(*build, "--optimization-level", 1)
    assert outcome.status == 0, outcome.err
    assert "was built for settings optimization_level=None, not optimization_level=1: building it again" in outcome.err
    assert len(store.plans()) == 2 * len(GRAPHS)


@pytest.mark.usefixtures("rtx")
def test_a_damaged_plan_is_built_again(command: Any, build: list[Any], store: PlanStore) -> None:
    assert command(*build).status == 0
    unet = next(p for p in store.plans() if p.key.graph == "unet")
    content = bytearray(unet.engine.read_bytes())
    content[100] ^= 255
    unet.engine.write_bytes(content)
    outcome = command(*build, "--json")
    assert outcome.status == 0
    assert json.loads(outcome.out)[0]["built"] == ["unet"]
    assert outcome.err.splitlines()[0] == f"unet: {unet.engine} changed since it was built: building it again"
    assert unet.read() != bytes(content)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--flavor", "cuda"], "unknown flavor 'cuda': choose from auto, tensorrt, tensorrt-rtx"),
        (["--size", "128"], "--size goes with --model: a bundle has its one size"),
        (["--images", "0"], "plans are for 1 to 16 images, not 0"),
        (["--images", "17"], "cannot read --num-images '17': give 1, 1-4 or 1,4, up to 16"),
        (["--images", "many"], "cannot read --num-images 'many': give 1, 1-4 or 1,4"),
        (["--images", "1-"], "cannot read --num-images '1-': give 1, 1-4 or 1,4"),
        (["--images", "-1"], "cannot read --num-images '-1': give 1, 1-4 or 1,4"),
        (["--images", ""], "cannot read --num-images '': give 1, 1-4 or 1,4"),
        (["--images", "4-1"], "cannot read --num-images '4-1': give 1, 1-4 or 1,4"),
        (["--images", "1,,2"], "cannot read --num-images '1,,2': give 1, 1-4 or 1,4"),
        (["--images", "1-99999999999"], "cannot read --num-images '1-99999999999': give 1, 1-4 or 1,4"),
        (["--optimization-level", "6"], "--optimization-level is TensorRT's, 0 to 5, not 6"),
        (["--optimization-level", "-1"], "--optimization-level is TensorRT's, 0 to 5, not -1"),
        (["--cond", "canny"], "has no condition 'canny', only seg, depth"),
        (["--cond", "frob"], "unknown condition 'frob'"),
        (["--frobnicate"], "see `cnpp-trt --help`"),
        (["--optimization-level", "fast"], "see `cnpp-trt --help`"),
    ],
)
def test_what_build_does_not_take(
    refused: Any, build: list[Any], store: PlanStore, options: list[str], said: str
) -> None:
    assert said in refused(*build, *options)
    assert left(store.root) == set()


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("size", ["big", "12x", "65", "0", "64x64x64"])
def test_a_size_that_no_model_has(refused: Any, tmp_path: Path, size: str) -> None:
    line = refused("build", "--cond", "seg", "--size", size, "--flavor", "tensorrt-rtx", "--plans", tmp_path / "plans")
    assert "size" in line
    assert not (tmp_path / "plans").exists()


@pytest.mark.usefixtures("rtx")
def test_what_is_no_bundle(refused: Any, tmp_path: Path) -> None:
    arguments = ["build", "--cond", "seg", "--plans", tmp_path / "plans", "--bundle"]
    assert f"no bundle at {tmp_path / 'none'}" in refused(*arguments, tmp_path / "none")
    assert "is no bundle" in refused(*arguments, tmp_path)


@pytest.mark.usefixtures("rtx")
def test_a_damaged_bundle(refused: Any, build: list[Any], small: Bundle, store: PlanStore, command: Any) -> None:
    path = small.folder / "unet.onnx"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    outcome = command(*build)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1] == (
        f"error: {path.parent} is damaged: {path.name} changed since the export; export the bundle again"
    )
    assert "unet" not in {p.key.graph for p in store.plans()}


@pytest.mark.usefixtures("rtx")
def test_an_fp32_bundle(refused: Any, build: list[Any], small: Bundle, store: PlanStore) -> None:
    """Its graphs have operators that TensorRT-RTX has no kernels for."""
    from cnpp_trt.bundles.bundle import MANIFEST

    small.manifest.precision = "fp32"
    (small.folder / MANIFEST).write_text(small.manifest.dumps())
    assert "--precision fp16" in refused(*build)
    assert left(store.root) == set()


@pytest.mark.usefixtures("rtx")
def test_a_store_that_is_a_file(refused: Any, build: list[Any], store: PlanStore) -> None:
    store.root.write_text("mine")
    assert refused(*build).startswith(f"cannot write to {store.root}")
    assert store.root.read_text() == "mine"


def test_a_flavor_that_is_not_installed(
    command: Any, build: list[Any], store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    build[build.index("tensorrt-rtx")] = "tensorrt"
    outcome = command(*build)
    assert (outcome.status, outcome.out) == (1, "")
    assert re.fullmatch(rf"error: tensorrt needs tensorrt, which is not installed: .*{hint('gpu')}\n", outcome.err)
    assert left(store.root) == set()


@pytest.mark.usefixtures("rtx")
def test_a_graph_that_tensorrt_refuses(
    command: Any, build: list[Any], small: Bundle, store: PlanStore, onnx_file: Any
) -> None:
    """One line and status 1; the traceback only with --debug. The command that the line gives says more."""
    from cnpp_trt.bundles.bundle import MANIFEST
    from cnpp_trt.files import sha256_of
    from onnx import helper

    path = small.folder / "update.onnx"
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="/update/bad")
    onnx_file(path, [node], {"x": ("guidance", 16)}, {"y": ("guidance", 16)})
    small.manifest.files["update.onnx"] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (small.folder / MANIFEST).write_text(small.manifest.dumps())
    outcome = command(*build)
    assert (outcome.status, outcome.out) == (1, "")
    last = outcome.err.splitlines()[-1]
    assert "Frobnicate '/update/bad'" in last
    assert "Traceback" not in outcome.err
    assert "update" not in {p.key.graph for p in store.plans()}
    assert not list(store.root.glob(f".*{PARTIAL}*"))
    advice = re.search(r"`cnpp-trt (.*)`$", last)
    assert advice
    if find_spec("polygraphy"):
        told = command(*shlex.split(advice[1]))
        assert (told.status, told.err) == (0, "")
        assert "Frobnicate" in told.out
    ended = subprocess.run([SCRIPT, *map(str, build), "--debug"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert BackendError.__name__ in ended.stderr


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("kind", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_stopped_while_building(real: Bundle, store: PlanStore, kind: signal.Signals, status: int, word: str) -> None:
    """The plans that were done stay; of the others nothing is there, and the next build makes them."""
    line = [
        SCRIPT,
        "build",
        "--bundle",
        real.folder,
        "--cond",
        "seg",
        "--flavor",
        "tensorrt-rtx",
        "--plans",
        store.root,
    ]
    arguments = [str(a) for a in line]
    # As its own group, as a shell makes it; what is sent is for this process alone.
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr
        first = process.stderr.readline()
        assert first.partition(":")[0] in real.manifest.graphs, first
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert out == ""
    *graphs, last = err.splitlines()
    assert last in (word, f"{word}: stopped at once")  # where TensorRT does not answer within the time it is given
    assert [line for line in graphs if line.partition(":")[0] not in real.manifest.graphs] == []
    done = store.plans()
    assert 1 <= len(done) < len(real.manifest.graphs)
    assert left(store.root) == {p.folder.name for p in done}
    assert all(plan.integrity_error() is None for plan in done)
    assert "unet" not in {plan.key.graph for plan in done}


# -------------------------------------------------------------------------------------------------------------- engines


@pytest.fixture
def plans(build: list[Any], rtx: Flavor, command: Any, store: PlanStore) -> PlanStore:
    assert command(*build).status == 0
    return store


def test_engines_alone_prints_the_help(command: Any) -> None:
    outcome = command("engines")
    assert outcome.status == 2
    assert all(word in outcome.out + outcome.err for word in ("list", "inspect", "prune"))
    assert "Traceback" not in outcome.err
    assert command("engines", "--help").status == 0


@pytest.mark.usefixtures("rtx")
def test_capability(command: Any, refused: Any, small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install polygraphy")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = command("engines", "capability", small.folder / "unet.onnx", "--flavor", "tensorrt-rtx")
    assert (outcome.status, outcome.err) == (0, "")
    assert "fully supported" in outcome.out
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left in the folder that one is in
    assert f"no ONNX file {tmp_path / 'none.onnx'}" in refused("engines", "capability", tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    without = command("engines", "capability", small.folder / "unet.onnx")
    said = rf"error: engines capability needs polygraphy, which is not installed: {hint('rtx')}\n"
    assert without.status == 1 and re.fullmatch(said, without.err), without.err


@pytest.mark.parametrize("arguments", [["frob"], ["list", "--frob"], ["inspect"], ["prune", "unet"]])
def test_what_engines_does_not_take(refused: Any, arguments: list[str]) -> None:
    assert refused("engines", *arguments).endswith(": see `cnpp-trt --help`")


def test_list(command: Any, plans: PlanStore, rtx: Flavor) -> None:
    outcome = command("engines", "list", "--plans", plans.root)
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.folder.name for p in plans.plans())
    assert all(f"small  tensorrt-rtx {rtx.version}, portable" in line for line in lines)
    listed = json.loads(command("engines", "list", "--plans", plans.root, "--json").out)
    assert {p["key"]["graph"] for p in listed} == GRAPHS
    assert all(Path(p["folder"]).is_dir() for p in listed)


def test_list_of_nothing(command: Any, store: PlanStore) -> None:
    outcome = command("engines", "list", "--plans", store.root)
    assert (outcome.status, outcome.out) == (0, "")
    assert outcome.err == f"no plans in {store.root}: make some with `cnpp-trt build --cond seg`\n"
    assert command("engines", "list", "--plans", store.root, "--json").out == "[]\n"
    assert not store.root.exists()


def test_list_of_the_home(command: Any, artifacts: Path) -> None:
    assert str(artifacts / "plans") in command("engines", "list").err


def test_inspect(command: Any, plans: PlanStore, small: Bundle) -> None:
    [unet] = [p for p in plans.plans() if p.key.graph == "unet"]
    outcome = command("engines", "inspect", "unet", "--plans", plans.root)
    assert (outcome.status, outcome.err) == (0, "")
    for part in (str(unet.folder), "unet of small", unet.key.source[:16], "(2, 16)", "whole", unet.sha256[:16]):
        assert part in outcome.out, part
    by_name = command("engines", "inspect", unet.folder.name, "--plans", plans.root, "--json")
    [found] = json.loads(by_name.out)
    assert (found["sha256"], found["damage"]) == (unet.sha256, None)
    several = json.loads(command("engines", "inspect", "u", "--plans", plans.root, "--json").out)
    assert {p["key"]["graph"] for p in several} == {"unet", "update"}
    assert len(command("engines", "inspect", "u", "--plans", plans.root).out.split("\n\n")) == 2


def test_inspect_shows_ranges_and_what_is_not_fused(command: Any, store: PlanStore, fake_built: Any) -> None:
    from cnpp_trt.engines.fusion import FusionReport
    from cnpp_trt.engines.plan import PlanKey, Row, system

    row: dict[str, Row] = {"x": {"min": [1, 16], "opt": [2, 16], "max": [8, 16]}}
    key = PlanKey("unet", "ab" * 32, "tensorrt", "11.1", "sm90", system(), (row,), {"optimization_level": 4})
    fusion = FusionReport(9, 2, 1, 4, 3, 5, 1, ("node_Softmax_7", "node_norm_3"))
    store.get_or_build(key, "sd15", lambda: fake_built(fusion=fusion))
    text = command("engines", "inspect", "unet", "--plans", store.root).out
    for part in (
        "(1, 16) … (2, 16) … (8, 16)", "node_Softmax_7", "node_norm_3", "9 kernels, attention 1/2, norms 3/4",
        "tensorrt 11.1, sm90", "optimization_level=4", "unet of sd15",
    ):  # fmt: skip
        assert part in text, part


def test_inspect_finds_damage(command: Any, plans: PlanStore) -> None:
    [unet] = [p for p in plans.plans() if p.key.graph == "unet"]
    unet.engine.write_bytes(b"")
    assert (
        f"{unet.engine} has 0 bytes instead of {unet.size}"
        in command("engines", "inspect", "unet", "--plans", plans.root).out
    )


def test_inspect_of_an_unknown_plan(refused: Any, plans: PlanStore) -> None:
    line = refused("engines", "inspect", "vae", "--plans", plans.root)
    assert line == f"no plan 'vae' in {plans.root}: see `cnpp-trt engines list`"
    assert "no plan 'nope'" in refused("engines", "inspect", "nope", "--plans", plans.root, "--json")


def edit_version(folder: Path) -> Path:
    """A plan of another version, in a folder that is called after its key as every plan is."""
    record = json.loads((folder / RECORD).read_text())
    record["key"]["version"] = "0.9"
    (folder / RECORD).write_text(json.dumps(record))
    digest = hashlib.sha256(json.dumps(record["key"], sort_keys=True).encode()).hexdigest()
    return folder.rename(folder.with_name(f"{record['key']['graph']}-{digest[:16]}"))


def test_prune(command: Any, plans: PlanStore, rtx: Flavor) -> None:
    by_graph = {p.key.graph: p for p in plans.plans()}
    edit_version(by_graph["unet"].folder)
    by_graph = {p.key.graph: p for p in plans.plans()}
    os.truncate(by_graph["update"].engine, 10)
    partial = plans.root / f".hint_seg-0{PARTIAL}x"
    partial.mkdir()
    (partial / ENGINE).write_bytes(b"x" * 2**20)
    useless = sorted(by_graph[g].folder.name for g in ("unet", "update"))

    dry = command("engines", "prune", "--plans", plans.root, "--dry-run", "--json")
    assert json.loads(dry.out) == {"plans": useless, "freed": 0, "dry_run": True}
    assert f"{by_graph['unet'].folder.name}: tensorrt-rtx 0.9, installed is " in dry.err
    assert f"{by_graph['update'].folder.name}: " in dry.err
    assert "would be deleted" in command("engines", "prune", "--plans", plans.root, "--dry-run").out
    assert len(plans.plans()) == len(GRAPHS)
    assert partial.exists()

    outcome = command("engines", "prune", "--plans", plans.root)
    assert outcome.status == 0
    assert outcome.out.startswith("2 plans deleted, 1.")
    assert {p.key.graph for p in plans.plans()} == GRAPHS - {"unet", "update"}
    assert left(plans.root) == {p.folder.name for p in plans.plans()}
    again = command("engines", "prune", "--plans", plans.root, "--json")
    assert json.loads(again.out) == {"plans": [], "freed": 0, "dry_run": False}


def test_prune_keeps_what_is_in_use(
    command: Any, plans: PlanStore, small_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--unused` asks which bundles are at home; without it, plans of bundles elsewhere stay."""
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "home"))
    assert json.loads(command("engines", "prune", "--plans", plans.root, "--json").out)["plans"] == []
    small_bundle(tmp_path / "home/bundles/mine")  # the same graphs
    outcome = command("engines", "prune", "--unused", "--plans", plans.root, "--json")
    assert json.loads(outcome.out)["plans"] == []
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "other"))
    outcome = command("engines", "prune", "--unused", "--plans", plans.root, "--json")
    assert len(json.loads(outcome.out)["plans"]) == len(GRAPHS)
    assert json.loads(outcome.out)["freed"] > 0
    assert all(": no bundle has its graph" in line for line in outcome.err.splitlines())
    assert left(plans.root) == set()


def test_prune_all(command: Any, plans: PlanStore) -> None:
    size = sum(p.stat().st_size for p in plans.root.rglob("*") if p.is_file())
    pruned = json.loads(command("engines", "prune", "--all", "--plans", plans.root, "--json").out)
    assert len(pruned["plans"]) == len(GRAPHS)
    assert pruned["freed"] == size
    assert left(plans.root) == set()
    assert "0 plans deleted" in command("engines", "prune", "--all", "--plans", plans.root).out


def test_without_tensorrt(command: Any, plans: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was uninstalled, plans can still be listed, inspected and deleted; none is called useless for it."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(command("engines", "list", "--plans", plans.root).out.splitlines()) == len(GRAPHS)
    assert command("engines", "inspect", "unet", "--plans", plans.root).status == 0
    assert json.loads(command("engines", "prune", "--plans", plans.root, "--json").out)["plans"] == []
    assert command("engines", "prune", "--all", "--plans", plans.root).status == 0


def test_help_is_light() -> None:
    code = """
import atexit, sys
atexit.register(lambda: print([m for m in ("numpy", "torch", "onnx", "tensorrt_rtx") if m in sys.modules],
    file=sys.stderr))
from cnpp_trt.cli import main
main()
"""
    for arguments in (["build", "--help"], ["engines", "--help"], ["engines", "prune", "--help"]):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, "[]\n")
