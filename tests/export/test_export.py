"""checkpoint → bundle: what it writes, that it is checked, and what an end before its time leaves."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cnpp_trt
import graph_cache
import numpy as np
import onnx
import pytest
import torch
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.errors import ExportError, UserError
from cnpp_trt.export import graphs, onnx_graph
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.export.graphs import GraphDims, base_graphs
from cnpp_trt.export.onnx_graph import ExportSpec, compare, export_graph
from cnpp_trt.files import sha256_of
from reliability_bundle import WRONG, kill_exports
from torch import Tensor, nn

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).parent / "cnpp-trt"


def left(parent: Path) -> list[str]:
    """What is there besides lock files."""
    return sorted(p.name for p in parent.iterdir() if not p.name.endswith(".lock")) if parent.exists() else []


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and digest of every file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, sha256_of(p)) for p in files}


def compared(told: list[str]) -> list[str]:
    """The lines that say that a graph is done."""
    return [line for line in told if "largest difference" in line]


# ------------------------------------------------------------------------------------------------------ one graph


class Affine(nn.Module):
    """2x + 3y: a graph that confuses its inputs is found out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x @ self.weight + 3 * y, x - y


def affine(**changes: Any) -> ExportSpec:
    fields: dict[str, Any] = {
        "name": "affine",
        "module": Affine().eval(),
        "inputs": {"x": torch.randn(3, 8), "y": torch.randn(3, 8)},
        "outputs": ["sum", "difference"],
        "nested": {},
        "free": {name: {0: "batch"} for name in ("x", "y", "sum", "difference")},
    }
    return ExportSpec(**{**fields, **changes})


def test_a_graph_computes_what_its_module_does_at_other_sizes_too(tmp_path):
    source = affine()
    module = source.module
    spec = export_graph(source, tmp_path, "fp32", 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["affine.onnx", "affine.onnx.data"]
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    found = onnx_graph.run_onnx(tmp_path / "affine.onnx", {"x": x.numpy(), "y": y.numpy()})
    with torch.inference_mode():
        for a, b in zip(found, module(x, y), strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-5)
    assert [t.shape for t in (*spec.inputs, *spec.outputs)] == [("batch", 8)] * 4
    assert spec.difference <= spec.tolerance
    assert isinstance(source.module, nn.Identity), "the weights would be in memory twice"


def test_one_tensor_for_two_inputs_is_refused(tmp_path):
    """torch.onnx.export makes a silently wrong graph of it: 2x + 3y becomes 5y."""
    same = torch.randn(3, 8)
    with pytest.raises(AssertionError, match="two inputs share one tensor"):
        export_graph(affine(inputs={"x": same, "y": same}), tmp_path, "fp32", 20)


def test_a_graph_that_differs_from_its_module_is_refused(tmp_path):
    source = affine()
    real = source.module

    class Drifting(nn.Module):
        """Gives the reference one result and the exporter, which traces it later, another."""

        def __init__(self) -> None:
            super().__init__()
            self.real, self.calls = real, 0

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            first, second = self.real(x, y)
            return (first, second) if self.calls == 1 else (first, second * 1.001)

    source.module = Drifting()
    with pytest.raises(ExportError, match=r"affine differs from PyTorch in difference: 1\.0\de-03, allowed 2e-05"):
        export_graph(source, tmp_path, "fp32", 20)


def test_what_cannot_be_exported_is_one_line(tmp_path):
    class DataDependent(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return (x + 1 if bool(x.sum() > 0) else x - 1), y

    with pytest.raises(ExportError, match="PyTorch cannot export affine") as error:
        export_graph(affine(module=DataDependent()), tmp_path, "fp32", 20)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_differences():
    a = np.array([3.0, 4.0], np.float32)
    assert compare(a, a) == onnx_graph.Difference(0.0, 0.0, 0.0)
    found = compare(a, a + np.array([0.5, 0], np.float32))
    assert (found.max_abs, found.relative_l2, found.share) == (0.5, 0.1, 0.5)
    infinite = onnx_graph.Difference(*[float("inf")] * 3)
    assert compare(a, np.array([3.0, np.nan], np.float32)) == infinite
    assert compare(a, a[:1]) == infinite
    assert compare(np.array([250], np.uint8), np.array([5], np.uint8)).max_abs == 245  # no wrap around
    assert compare(np.zeros(2), np.zeros(2)).relative_l2 == 0


# ----------------------------------------------------------------------------------------------------- the bundle


def test_what_a_bundle_holds(tiny):
    m = tiny.pipeline.bundle.manifest
    base = {"update", "add_residuals", "text_encoder", "vae_decoder", "vae_encoder", "text_kv", "time_embeds", "unet"}
    roles = ("hint", "text_kv", "time_embeds", "controlnet")
    own = {f"{graph}_{c}" for graph in roles for c in ("seg", "depth")}
    assert m.graphs.keys() == base | own
    assert list(m.conditions) == ["seg", "depth"]
    assert m.scheduler_config == json.loads((tiny.checkpoint / "scheduler" / "scheduler_config.json").read_text())
    on_disk = {p.relative_to(tiny.bundle).as_posix() for p in tiny.bundle.rglob("*") if p.is_file()}
    assert on_disk == m.files.keys() | {"manifest.json"}
    assert m.exported_with["torch"] == torch.__version__
    Bundle.open(tiny.bundle).verify()
    assert tiny.bundle.stat().st_mode & 0o055 == 0o055, "others may read it"


def test_a_bundle_says_nothing_of_the_machine(tiny):
    """Graphs neither: PyTorch's exporter writes stack traces with paths into every node."""
    places = [str(tiny.checkpoint), str(SCRIPT.parent.parent), str(Path(cnpp_trt.__file__).parent), "site-packages"]
    for path in tiny.bundle.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [place for place in places if place.encode() in content], path


def test_every_graph_was_compared_and_is_what_the_manifest_says(tiny):
    """Signatures and opset as ONNX itself reads them; external data lies beside each graph under its own name."""
    kinds = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, "uint8": onnx.TensorProto.UINT8}
    for name, spec in tiny.pipeline.bundle.manifest.graphs.items():
        assert 0 <= spec.difference <= spec.tolerance
        graph = onnx.load(tiny.bundle / spec.file, load_external_data=False)
        assert {e.version for e in graph.opset_import if e.domain == ""} == {23}
        for values, tensors in ((graph.graph.input, spec.inputs), (graph.graph.output, spec.outputs)):
            assert [v.name for v in values] == [t.name for t in tensors], name
            for value, tensor in zip(values, tensors, strict=True):
                shape = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                assert shape == tensor.shape, f"{name}.{tensor.name}"
                assert value.type.tensor_type.elem_type == kinds[tensor.dtype]
        free = {d for t in (*spec.inputs, *spec.outputs) for d in t.shape if isinstance(d, str)}
        assert free <= {"batch", "images", "guidance", "tokens", "prompts", "steps"}
        locations = {e.value for i in graph.graph.initializer for e in i.external_data if e.key == "location"}
        assert locations <= {f"{spec.file}.data"}


def test_examples_of_a_batch_share_no_tensor(tiny):
    """The guard against wrong graphs sees nested inputs too."""
    checkpoint = Checkpoint(str(tiny.checkpoint))
    geometry = GraphDims.of(checkpoint, tiny.pipeline.bundle.manifest)
    for name, make in base_graphs(checkpoint, geometry):
        if name == "add_residuals":
            source = make()
            residuals = source.inputs["residuals"]
            source.inputs = {"residuals": residuals, "others": residuals}
            with pytest.raises(AssertionError, match="share one tensor"):
                source.flat()


def test_adding_a_condition_exports_only_its_own_graphs(tiny, checkpoint_copy, tmp_path, command):
    bundle = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    before = state(bundle)
    controlnet = Path(shutil.move(checkpoint_copy / "controlnet" / "depth", tmp_path / "lineart"))
    arguments = ["export", "--model", checkpoint_copy, "--cond", "lineart", "--cond", "seg"]
    arguments += ["--controlnet", f"lineart={controlnet}", "--out", bundle]
    outcome = command(*arguments)
    assert (outcome.status, outcome.out) == (0, f"{bundle}\n"), outcome.err
    told = outcome.err.splitlines()
    after = state(bundle)
    graphs_of_it = [f"{role}_lineart" for role in ("hint", "text_kv", "time_embeds", "controlnet")]
    assert [line.split(":")[0] for line in compared(told)] == graphs_of_it
    assert {k: v for k, v in after.items() if k in before and k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    new = {f"{graph}.onnx{end}" for graph in graphs_of_it for end in ("", ".data")}
    assert after.keys() - before.keys() <= new
    opened = Bundle.open(bundle)
    opened.verify()
    assert list(opened.manifest.conditions) == ["seg", "depth", "lineart"]
    # depth's weights under another name: the same picture.
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    drawn = [
        Pipeline.open(bundle, threads=1)(Request("", "", [Control(c, image)], 2, seed=0)).latents
        for c in ("depth", "lineart")
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])

    assert command(*arguments).err == f"{bundle} has lineart, seg already: nothing to export\n"
    assert state(bundle) == after


@pytest.mark.parametrize(
    ("what", "fields"),
    [("width", {"size": (72, 64)}), ("height", {"size": (64, 72)}), ("precision", {"precision": "fp16"})],
)
def test_another_size_or_precision_is_refused(tiny, what, fields):
    before = state(tiny.bundle)
    with pytest.raises(UserError, match=f"has another {what}: choose another --out"):
        export_bundle(Checkpoint(str(tiny.checkpoint)), ["seg"], tiny.bundle, **fields)
    assert state(tiny.bundle) == before


def test_graphs_that_are_divided_otherwise_are_refused(tiny, command):
    before = state(tiny.bundle)
    arguments = ["export", "--model", tiny.checkpoint, "--cond", "seg", "--out", tiny.bundle]
    for given in ("--no-hoist-prompt", "--no-hoist-time", "--split-unet"):
        outcome = command(*arguments, given)
        assert outcome.status == 2 and "has its graphs divided in another way: choose another --out" in outcome.err
    for options in ([], ["--hoist-prompt", "--no-split-unet"]):
        assert command(*arguments, *options).err.endswith("has seg already: nothing to export\n")
    assert state(tiny.bundle) == before


def test_another_base_model_is_refused(tiny, v_prediction):
    with pytest.raises(UserError, match="has another base model's weights"):
        export_bundle(Checkpoint(str(v_prediction.checkpoint)), ["seg"], tiny.bundle)


def test_another_controlnet_is_refused(tiny):
    other = Checkpoint(str(tiny.checkpoint), {"seg": tiny.checkpoint / "controlnet" / "depth"})
    with pytest.raises(UserError, match="has another ControlNet for seg: choose another --out"):
        export_bundle(other, ["seg"], tiny.bundle)


def test_looking_at_a_bundle_that_has_all_takes_no_pytorch(tiny):
    """So that a second `make run` starts at once."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout);"
        "sys.modules['torch'] = None; from pathlib import Path;"
        "from cnpp_trt.export.checkpoint import Checkpoint; from cnpp_trt.export.exporter import export_bundle;"
        f"export_bundle(Checkpoint({str(tiny.checkpoint)!r}), ['seg'], Path({str(tiny.bundle)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "nothing to export" in done.stdout, done.stderr


def test_a_damaged_bundle_is_not_added_to(bundle_copy, tiny_checkpoint):
    (bundle_copy / "unet.onnx").unlink()
    before = state(bundle_copy)
    with pytest.raises(UserError, match=r"unet\.onnx is missing; delete it first, or choose another --out"):
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], bundle_copy)
    (bundle_copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="delete it first, or choose another --out"):
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], bundle_copy)
    assert state(bundle_copy).keys() == before.keys()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_not_touched(tiny_checkpoint, tmp_path, kind):
    out = tmp_path / "mine"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("dear")
    else:
        out.write_text("dear")
    with pytest.raises(UserError, match="exists and is no bundle: choose another --out"):
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], out)
    assert (out / "thesis.txt" if kind == "folder" else out).read_text() == "dear"
    assert left(tmp_path) == ["mine"]


def test_beyond_the_tolerance_no_bundle_appears(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_graph.TOLERANCE, "fp32", 0.0)
    with pytest.raises(ExportError, match=r"differs from PyTorch in .*allowed 0e"):
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], tmp_path / "bundle")
    assert left(tmp_path) == []


def test_a_failed_addition_changes_nothing(bundle_copy, checkpoint_copy, monkeypatch):
    shutil.move(checkpoint_copy / "controlnet" / "depth", checkpoint_copy / "controlnet" / "hed")
    before = state(bundle_copy)
    monkeypatch.setitem(onnx_graph.TOLERANCE, "fp32", 0.0)
    with pytest.raises(ExportError):
        export_bundle(Checkpoint(str(checkpoint_copy)), ["hed"], bundle_copy)
    assert state(bundle_copy) == before
    assert "hed" not in Bundle.open(bundle_copy).manifest.conditions


def test_fp16(tiny, tiny_half, control_image):
    """Half precision is for TensorRT; on the CPU it runs too, and draws nearly the same picture."""
    bundle = Bundle.open(tiny_half)
    m = bundle.manifest
    assert m.precision == "fp16"
    unet = m.graphs["unet"]
    assert {t.dtype for t in unet.inputs if t.name not in ("timestep", "rows")} == {"float16"}
    assert {e.version for e in onnx.load(bundle.folder / unet.file, load_external_data=False).opset_import} == {20}
    half = sum(e["size"] for name, e in m.files.items() if name.endswith(".data"))
    full = sum(
        e["size"] for n, e in tiny.pipeline.bundle.manifest.files.items() if n.endswith(".data") and "depth" not in n
    )
    assert 0.4 < half / full < 0.7
    request = Request("a house", "", [Control("seg", control_image(64, 64))], 4, seed=1)
    found, expected = Pipeline.open(bundle, threads=1)(request), tiny.pipeline(request)
    difference = np.linalg.norm(found.latents - expected.latents) / np.linalg.norm(expected.latents)
    assert 0 < difference < 0.05


# -------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture
def exporting(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, exporting into `tmp_path / "bundles" / "b"`, its second graph under way."""
    (tmp_path / "bundles").mkdir()
    line = [SCRIPT, "export", "--model", tiny_checkpoint, "--cond", "seg", "--out", tmp_path / "bundles" / "b"]
    with subprocess.Popen(
        [str(a) for a in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr
        assert any(compared([line]) for line in process.stderr), "it ended before its first graph"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("kind", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_interrupted(exporting, tiny, tmp_path, caplog, kind, status, word):
    """The graphs that are finished are kept, which is said, and the next export goes on from them."""
    exporting.send_signal(kind)
    out, err = exporting.communicate(timeout=120)
    assert exporting.returncode == status
    # What was under way before the signal was served may still be told.
    *kept, last = [e for e in err.splitlines() if "PyTorch" not in e and not compared([e])]
    # A process that is held up by native code for too long is ended before it can say more.
    assert last == word or (last, kept) == (f"{word}: stopped at once", []), err
    assert out == ""
    (partial,) = left(tmp_path / "bundles")
    assert partial.startswith(".b.partial-")
    caplog.set_level("INFO", "cnpp_trt")
    bundle = export_bundle(Checkpoint(str(tiny.checkpoint)), ["seg"], tmp_path / "bundles" / "b")
    goes_on = r"(\d+) of (\d+) graphs are there from an interrupted export, which goes on"
    (taken,) = filter(None, (re.fullmatch(goes_on, line) for line in caplog.messages))
    if kept:
        assert kept == [f"interrupted: {taken[1]} of {taken[2]} graphs are kept; the same command goes on from there"]
    assert len(compared(caplog.messages)) == int(taken[2]) - int(taken[1])
    assert bundle.verify() > 0
    assert left(tmp_path / "bundles") == ["b"]


def test_killed(exporting, tiny, tmp_path):
    """What a killed export leaves is no bundle, and the next export clears it."""
    bundles = tmp_path / "bundles"
    exporting.kill()
    exporting.wait(timeout=60)
    leftovers = left(bundles)
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".b.partial-")
    with pytest.raises(UserError):
        Bundle.open(bundles / "b")
    with pytest.raises(UserError):
        Bundle.open(bundles / leftovers[0])
    # The next one, which here fails at once, so as not to export it all.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ExportError):
        patch.setitem(onnx_graph.TOLERANCE, "fp32", -1.0)
        export_bundle(Checkpoint(str(tiny.checkpoint)), ["seg"], bundles / "b")
    assert left(bundles) == []


def test_two_exports_into_one_folder(tiny, tmp_path, monkeypatch):
    """Both wait for each other and neither's condition is lost: the second sees what the first wrote.

    One is in a process of its own and adds `lineart`; this one adds `hed` meanwhile.
    """
    checkpoint = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    for condition in ("lineart", "hed"):
        shutil.copytree(checkpoint / "controlnet" / "seg", checkpoint / "controlnet" / condition)
    bundle = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    line = [SCRIPT, "export", "--model", checkpoint, "--cond", "lineart", "--out", bundle]
    pipe, env = subprocess.PIPE, {**os.environ, **graph_cache.environment()}
    with subprocess.Popen([str(a) for a in line], stderr=pipe, stdout=pipe, text=True, env=env) as other:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".bundle.partial-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        export_bundle(Checkpoint(str(checkpoint)), ["hed"], bundle)
        _, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    opened = Bundle.open(bundle)
    assert sorted(opened.manifest.conditions) == ["depth", "hed", "lineart", "seg"]
    opened.verify()
    assert left(tmp_path) == ["bundle", "checkpoint"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB, less than the tiny bundle needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small(small_disk, tiny_checkpoint, script):
    """Known before anything is exported."""
    ended = script("export", "--model", tiny_checkpoint, "--cond", "seg", "--out", small_disk / "bundle")
    assert ended.returncode == 2, ended.stderr
    *_, last = ended.stderr.splitlines()
    free = "0 MB are free: free some, or choose another --out"
    assert re.fullmatch(rf"error: [1-9]\d* MB do not fit on the disk of {small_disk}, {free}", last)
    assert "exporting" not in ended.stderr
    assert ended.stdout == ""
    assert left(small_disk) == []


def test_a_disk_that_fills_up_while_a_graph_is_written(tiny_checkpoint, tmp_path, monkeypatch):
    """Something else took the space: writing the second graph's weights fails."""
    real, calls = onnx_graph._write, []

    def write(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(onnx_graph, "_write", write)
    with pytest.raises(UserError, match=r"no space left for .*bundle: free some"):
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], tmp_path / "bundle")
    assert left(tmp_path) == []


def test_progress_is_told(tiny_checkpoint, tmp_path, monkeypatch, caplog):
    """Each graph with its seconds and its difference, as it is made."""
    caplog.set_level("INFO", "cnpp_trt")
    real = graphs.base_graphs
    monkeypatch.setattr(graphs, "base_graphs", lambda *a: list(real(*a))[:2])
    export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], tmp_path / "bundle")
    assert [line.split(":")[0] for line in compared(caplog.messages)] == [
        "update",
        "add_residuals",
        "hint_seg",
        "text_kv_seg",
        "time_embeds_seg",
        "controlnet_seg",
    ]
    assert all(re.search(r": \d+\.\d s, .*allowed 2e-05", line) for line in compared(caplog.messages))
    assert re.search(r"bundle.*: seg in \d+\.\d s", caplog.messages[-1])


def test_an_export_leaves_the_process_as_it_was(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    """A service may export: its log levels, arguments, streams, threads, environment and warnings stay."""
    real = graphs.base_graphs
    monkeypatch.setattr(graphs, "base_graphs", lambda *a: list(real(*a))[:1])
    before = process_state()
    export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], tmp_path / "bundle")
    after = process_state()
    # Loggers that a library made meanwhile are its own; those that were there stay as they were.
    assert {name: after["levels"].get(name) for name in before["levels"]} == before["levels"]
    assert {key: after[key] for key in after if key != "levels"} == {k: before[k] for k in before if k != "levels"}
    assert capfd.readouterr() == ("", "")


def process_state() -> dict[str, Any]:
    """What an export could change of its process, but for modules that it imports."""
    import diffusers  # noqa: F401  # each sets up its loggers
    import torch.onnx

    named = {n: logger for n, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    return {
        "levels": {name: (logger.level, logger.propagate) for name, logger in named.items()},
        "root": (logging.root.level, logging.root.handlers[:]),
        "arguments": sys.argv[:],
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "environment": dict(os.environ),
        "warnings": warnings.filters[:],
        "signals": [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)],
        "folder": Path.cwd(),
    }


def test_exports_that_are_killed(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they leave is whole or goes on with the next one, and nothing of it is there when one finishes."""
    for name, value in graph_cache.environment().items():
        monkeypatch.setenv(name, value)
    found = kill_exports(tiny_checkpoint, 3, tmp_path)
    assert sum(found.values()) == 3 and not any(found[way] for way in WRONG), found
