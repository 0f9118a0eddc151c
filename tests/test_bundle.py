"""The bundle folder: what counts as one, what is refused, and what a writer leaves behind."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import Pipeline, bundle
from cnpp_trt.bundle import (
    FORMAT,
    Bundle,
    GraphSpec,
    Manifest,
    TensorSpec,
    bundle_folder,
    find_bundle,
    lock_bundle,
    model_name,
    write_bundle,
)
from cnpp_trt.errors import BundleError, UserError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def manifest(**fields: Any) -> Manifest:
    basic = {"model": "m", "base": "0", "precision": "fp32", "width": 64, "height": 64}
    geometry: dict[str, Any] = {"latent_channels": 4, "vae_scale_factor": 8, "text_encoder_layers": 12}
    geometry["scheduler_config"] = {"a": [1, None, 0.5]}
    return Manifest(**{**basic, **geometry, **fields})


def make(folder: Path, **files: str) -> Bundle:
    """A bundle of text files."""
    with lock_bundle(folder), write_bundle(folder, manifest()) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)
    return Bundle.open(folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(BundleError) as error:
        Bundle.open(folder)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# ---------------------------------------------------------------------------------------------------- the manifest


TENSORS = st.builds(
    TensorSpec,
    st.text(min_size=1),
    st.sampled_from(["float32", "uint8"]),
    st.lists(st.one_of(st.integers(0, 4096), st.sampled_from(["batch", "images"]))).map(tuple),
)
DIFFERENCES = st.floats(0, 1)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,9}\.onnx", fullmatch=True), st.lists(TENSORS).map(tuple)),
    st.text(),
    DIFFERENCES,
)
def test_a_manifest_round_trips(tensors: dict[str, tuple[TensorSpec, ...]], model: str, difference: float) -> None:
    graphs = {
        file: GraphSpec(file, inputs, inputs[::-1], difference, difference, "relative L2", 1e-5)
        for file, inputs in tensors.items()
    }
    files = {file: {"size": 3, "sha256": "ab"} for file in tensors}
    made = manifest(model=model, graphs=graphs, files=files, conditions={"seg": {}}, defaults={"guidance_scale": 2.0})
    assert Manifest.loads(made.dumps()) == made


def test_a_real_manifest_round_trips(tiny: Any) -> None:
    text = (tiny.bundle / "manifest.json").read_text()
    assert Manifest.loads(text).dumps() == text
    assert json.loads(text)["format"] == FORMAT


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/../../secret", ".."])
def test_files_outside_the_bundle_are_refused(bundle_copy: Path, outside: str) -> None:
    (bundle_copy.parent / "secret").write_text("secret")
    edit(bundle_copy, lambda m: m["files"].update({outside: {"size": 6, "sha256": "0"}}))
    refused(bundle_copy, "file outside the bundle")


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/passwd", "examples/not-listed.png"])
def test_examples_outside_the_bundle_are_refused(bundle_copy: Path, outside: str) -> None:
    edit(bundle_copy, lambda m: m["conditions"].update(seg={"image": outside}))
    refused(bundle_copy, "not listed in files", outside)


def test_graphs_whose_file_is_not_listed_are_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda m: m["graphs"]["unet"].update(file="../unet.onnx"))
    refused(bundle_copy, "not listed in files", "../unet.onnx")


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", None, [FORMAT]])
def test_another_versions_manifest(bundle_copy: Path, found: Any) -> None:
    edit(bundle_copy, lambda m: m.update(format=found))
    refused(bundle_copy, "manifest format", f"this version reads {FORMAT}", "export the bundle again")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_half_written_manifest(bundle_copy: Path, share: float) -> None:
    path = bundle_copy / "manifest.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(bundle_copy, "manifest.json cannot be read", "export the bundle again")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"', "{}", "[" * 100_000, "\udcff", '{"format": 3}'])
def test_a_manifest_that_is_none(bundle_copy: Path, text: str) -> None:
    (bundle_copy / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(bundle_copy, "manifest.json cannot be read")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                    max_leaves=4)  # fmt: skip
KEYS = ["format", "files", "graphs", "conditions", "scheduler_config"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), st.data())
def test_a_damaged_manifest_is_opened_or_refused_in_one_line(tiny: Any, key: str, data: st.DataObject) -> None:
    """Whatever stands in the manifest, `open` never ends in a traceback."""
    content = json.loads((tiny.bundle / "manifest.json").read_text())
    node, path = content, key
    while isinstance(node[path], dict) and node[path] and data.draw(st.booleans()):
        node = node[path]
        path = data.draw(st.sampled_from(sorted(node)))
    node[path] = data.draw(JSON)
    folder = tiny.bundle.parent / "damaged"
    if not folder.exists():
        folder.mkdir()
        for file in tiny.bundle.iterdir():
            if file.name != "manifest.json":
                (folder / file.name).symlink_to(file)
    (folder / "manifest.json").write_text(json.dumps(content))
    try:
        Bundle.open(folder)
    except BundleError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------------------- the files


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no bundle at", "cnpp-trt export")
    refused(tmp_path, "is no bundle", "it has no manifest.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no bundle at")


@pytest.mark.parametrize("name", ["unet.onnx", "unet.onnx.data", "tokenizer/tokenizer.json"])
def test_a_missing_file(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    refused(bundle_copy, "is incomplete", f"{name} is missing")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_the_wrong_size(bundle_copy: Path, change: int) -> None:
    path = bundle_copy / "vae_decoder.onnx.data"
    size = path.stat().st_size
    os.truncate(path, size + change)
    refused(bundle_copy, f"vae_decoder.onnx.data has {size + change} bytes instead of {size}")


@pytest.mark.parametrize("name", ["unet.onnx", "hint_seg.onnx.data", "tokenizer/tokenizer_config.json"])
def test_verify_names_the_file_with_a_flipped_byte(bundle_copy: Path, name: str) -> None:
    assert Bundle.open(bundle_copy).verify() == sum(
        p.stat().st_size for p in bundle_copy.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    path = bundle_copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    opened = Bundle.open(bundle_copy)  # which reads no content
    with pytest.raises(BundleError, match=f"is damaged: {name} changed since the export"):
        opened.verify()


def test_a_bundle_may_be_moved(tiny: Any, bundle_copy: Path) -> None:
    moved = Path(shutil.move(bundle_copy, bundle_copy.parent / "elsewhere"))
    assert Bundle.open(moved).verify() > 0
    assert Bundle.open(moved).digest == Bundle.open(tiny.bundle).digest
    Pipeline.open(moved)


def test_nothing_is_written_into_a_bundle_that_is_used(tiny: Any, bundle_copy: Path) -> None:
    """A bundle on read-only media works."""
    for path in sorted(bundle_copy.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    bundle_copy.chmod(0o555)
    before = {p: p.stat().st_mtime_ns for p in bundle_copy.rglob("*")}
    Pipeline.open(bundle_copy)
    Bundle.open(bundle_copy).verify()
    assert {p: p.stat().st_mtime_ns for p in bundle_copy.rglob("*")} == before


def test_digests_tell_bundles_apart(tmp_path: Path) -> None:
    a, b, c = (make(tmp_path / n, **{"f": text}) for n, text in (("a", "one"), ("b", "one"), ("c", "two")))
    assert a.digest == b.digest != c.digest


# ----------------------------------------------------------------------------------------------------- the writing


def left(parent: Path) -> list[str]:
    """What is there besides lock files."""
    return sorted(p.name for p in parent.iterdir() if not p.name.endswith(".lock"))


def test_a_bundle_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "bundle"
    with pytest.raises(RuntimeError, match="half way"):  # noqa: SIM117
        with lock_bundle(folder), write_bundle(folder, manifest()) as staging:
            (staging / "unet.onnx").write_text("half")
            assert not folder.exists()
            raise RuntimeError("half way")
    assert left(folder.parent) == []
    assert make(folder, f="x").manifest.files.keys() == {"f"}


def test_a_failed_addition_leaves_the_old_bundle_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    old = make(folder, f="x")
    with (
        pytest.raises(RuntimeError),
        lock_bundle(folder),
        write_bundle(folder, Bundle.open(folder).manifest) as staging,
    ):
        (staging / "g").write_text("y")
        raise RuntimeError
    assert Bundle.open(folder).digest == old.digest
    assert left(folder) == ["f", "manifest.json"]
    assert left(tmp_path) == ["bundle"]


def test_leftovers_of_a_killed_export_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".bundle.partial-abc" / "deep").mkdir(parents=True)
    (tmp_path / ".other.partial-abc").mkdir()
    make(tmp_path / "bundle", f="x")
    assert left(tmp_path) == [".other.partial-abc", "bundle"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(bundle.os, "fsync", full)
    with pytest.raises(UserError) as error:
        make(tmp_path / "bundle", f="x")
    assert ("no space left" in str(error.value)) is (code in (errno.ENOSPC, errno.EDQUOT))
    assert "\n" not in str(error.value)
    assert left(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*choose another --out"):
        make(tmp_path / "file" / "bundle", f="x")


def test_writers_of_one_bundle_wait_for_each_other(tmp_path: Path) -> None:
    """Each reads what is there and adds a file: were they not alone, additions would be lost."""
    folder = tmp_path / "bundle"
    make(folder, first="x")

    def add(name: str) -> None:
        with lock_bundle(folder), write_bundle(folder, Bundle.open(folder).manifest) as staging:
            (staging / name).write_text(name)

    threads = [threading.Thread(target=add, args=(f"file{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Bundle.open(folder).manifest.files.keys() == {"first", *(f"file{i}" for i in range(8))}
    assert Bundle.open(folder).verify() > 0


# ------------------------------------------------------------------------------------------------------- the places


def test_names_of_models() -> None:
    assert [model_name(m) for m in ("miniature", "/a/b/My Model/", "org/sd-v1.5", "..", "ü", "/")] == [
        "miniature", "My-Model", "sd-v1.5", "model", "model", "model",
    ]  # fmt: skip


def test_finding_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no bundle of 'm' under .*cnpp-trt export --model m --cond"):
        find_bundle("m")
    for precision, size in (("fp32", (64, 64)), ("fp16", (64, 96))):
        bundle_folder("m", precision, *size).mkdir(parents=True)
    bundle_folder("m-fp32", "fp32", 8, 8).mkdir()
    with pytest.raises(UserError, match=r"several bundles of 'm': m-fp16-64x96, m-fp32-64x64; choose with --size"):
        find_bundle("m")
    assert find_bundle("m", "fp16").name == "m-fp16-64x96"
    assert find_bundle("m", size=(64, 64)).name == "m-fp32-64x64"
    assert find_bundle("some/where/m", "fp32", (64, 64)).name == "m-fp32-64x64"
    with pytest.raises(UserError, match="--precision fp16 --size 64x64"):
        find_bundle("m", "fp16", (64, 64))
