"""Bundles of the embedded model without an export: they are what the exporter writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cnpp_trt import Bundle
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.bundles.library import find_bundle
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.export.graphs import GraphDims, base_graphs, condition_graphs
from cnpp_trt.export.onnx_graph import OPSET, export_graph
from cnpp_trt.miniature import EMBEDDED
from fixture_cache import exported

pytestmark = pytest.mark.slow

AGAIN = "run `python -m cnpp_trt.developer.miniature.graphs`"


def described(bundle: Bundle) -> dict[str, Any]:
    """The manifest without what was measured or depends on the machine, and without files, which are compared."""
    told = json.loads(bundle.manifest.dumps())
    for spec in told["graphs"].values():
        del spec["difference"], spec["max_abs_difference"]
    return {key: value for key, value in told.items() if key not in ("digest", "exported_with", "files")}


def test_it_is_what_the_exporter_writes(tmp_path: Path) -> None:
    conditions = ["seg", "depth"]
    export = exported(
        "miniature", tmp_path / "export", lambda out: export_bundle(Checkpoint("miniature"), conditions, out)
    )
    assemble("miniature", tmp_path / "assembled")
    one, other = Bundle.open(export), Bundle.open(tmp_path / "assembled")
    assert other.verify() > 0
    for name, record in one.manifest.files.items():
        assert other.manifest.files[name] == record, f"{name} differs: {AGAIN}"
    told = described(other)
    for key in ("graphs", "conditions"):
        told[key] = {name: value for name, value in told[key].items() if name in described(one)[key]}
    assert told == described(one), AGAIN


@pytest.mark.parametrize(
    ("model", "names"), [("miniature-lcm", {"unet"}), ("miniature-controlnet", {"hint_depth", "controlnet_depth"})]
)
def test_variants_have_their_own_weights(model: str, names: set[str], tmp_path: Path) -> None:
    """Graphs whose weights are not those of `miniature`, beside a fresh export of each."""
    assemble(model, tmp_path / "bundle")
    checkpoint, manifest = Checkpoint(model), Bundle.open(tmp_path / "bundle").manifest
    dims = GraphDims.of(checkpoint, manifest)
    for name, make in (*base_graphs(checkpoint, dims), *condition_graphs(checkpoint, "depth", dims)):
        if name in names:
            export_graph(make(), tmp_path, "fp32", OPSET["fp32"])
            graph = f"{name}.onnx"
            assert (tmp_path / graph).read_bytes() == (tmp_path / "bundle" / graph).read_bytes(), AGAIN
            mine, its = (onnx.load(folder / graph).graph.initializer for folder in (tmp_path / "bundle", tmp_path))
            for a, b in zip(mine, its, strict=True):
                # A fused LoRA's product is summed in another order than PyTorch does it.
                np.testing.assert_allclose(
                    onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b), rtol=1e-5, atol=1e-6, err_msg=a.name
                )


@pytest.mark.parametrize("model", EMBEDDED)
def test_its_manifest_names_the_checkpoint_that_is_here(model: str, tmp_path: Path) -> None:
    """Weights that changed since the graphs were written show."""
    assemble(model, tmp_path / "bundle")
    checkpoint, manifest = Checkpoint(model), Bundle.open(tmp_path / "bundle").manifest
    assert manifest.base == checkpoint.fingerprint(), AGAIN
    assert manifest.identity == checkpoint.recipe.identity
    assert manifest.recipe == checkpoint.recipe.recorded()
    assert manifest.defaults == checkpoint.examples()[0], AGAIN
    assert manifest.scheduler_config == checkpoint.config("scheduler")
    expected = [
        c for c in CONDITIONS if (Path(checkpoint.resolved.model.uri) / EMBEDDED[model].controlnets / c).is_dir()
    ]
    assert list(manifest.conditions) == expected
    for condition, record in manifest.conditions.items():
        assert record.get("controlnet") == checkpoint.controlnet_fingerprint(condition), AGAIN


def test_it_is_found_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    folder = find_bundle("miniature")
    assert folder == tmp_path / "bundles" / "miniature-fp32-128x128"
    digest = Bundle.open(folder).digest
    changed = (folder / "manifest.json").stat().st_mtime_ns
    assert find_bundle("miniature", "fp32", (128, 128), ("fp16",)) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == changed
    assert Bundle.find("miniature").digest == digest
    for precision, size in (("fp16", None), (None, (64, 64))):
        with pytest.raises(UserError, match=r"no bundle of 'miniature-lcm' .*`cnpp-trt export --model miniature-lcm"):
            find_bundle("miniature-lcm", precision, size)


def test_processes_that_need_it_at_once_write_it_once(tmp_path: Path) -> None:
    code = "import sys; from cnpp_trt.bundles.library import find_bundle; print(find_bundle('miniature'))"
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert Bundle.open(outputs[0][0].strip()).verify() > 0
    assert [path.name for path in (tmp_path / "bundles").iterdir() if not path.name.startswith(".")] == [
        "miniature-fp32-128x128"
    ]


@pytest.mark.parametrize("model", EMBEDDED)
def test_the_first_picture_takes_no_pytorch(model: str, tmp_path: Path) -> None:
    """From nothing to a scored picture, where what exports is not installed."""
    blocked = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "huggingface_hub", "accelerate")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv[0] = 'cnpp-trt'; "
        "from cnpp_trt.cli import main; main()"
    )
    words = ["run", "--model", model, "--cond", "depth", "--out", str(tmp_path / "out"), "--json"]
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path / "home")}
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert Path(told["images"][0]).is_file()
    assert "the embedded model's bundle" in ended.stderr


def test_a_bundle_of_another_version_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other one: a damaged manifest is said, a whole bundle is kept."""
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    folder = find_bundle("miniature", "fp32")
    manifest = folder / "manifest.json"
    written, inode = manifest.read_text("utf-8"), (folder / "unet.onnx").stat().st_ino
    assert find_bundle("miniature", "fp32") == folder and (folder / "unet.onnx").stat().st_ino == inode
    told = json.loads(written)
    manifest.write_text(json.dumps({**told, "format": told["format"] - 1}), "utf-8")
    (folder / "old.onnx").write_bytes(b"of a graph that is no more")
    assert find_bundle("miniature") == folder
    assert manifest.read_text("utf-8") == written and not (folder / "old.onnx").exists()
    assert Bundle.open(folder).verify() > 0
    manifest.write_text(written[:-20], "utf-8")
    assert find_bundle("miniature", "fp32") == folder  # opening it says what is wrong
    manifest.write_text(written, "utf-8")
