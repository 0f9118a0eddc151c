"""The bundle folder: what counts as one, what is refused, and what a writer leaves behind."""

import errno
import json
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import Pipeline, Request
from cnpp_trt.bundles import verified
from cnpp_trt.bundles.bundle import (
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
from cnpp_trt.export.recipe import Recipe
from cnpp_trt.files import sha256_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import edit, signed


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
    st.from_regex(r"[A-Za-z0-9_.]{1,12}", fullmatch=True),
    st.sampled_from(["float32", "uint8"]),
    st.lists(st.one_of(st.integers(1, 64), st.sampled_from(["batch", "images"])), max_size=4).map(tuple),
)
DIFFERENCES = st.floats(0, 1)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)


@pytest.mark.slow
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,9}\.onnx", fullmatch=True), st.lists(TENSORS).map(tuple)),
    NAMES,
    DIFFERENCES,
)
def test_a_manifest_round_trips(tensors: dict[str, tuple[TensorSpec, ...]], model: str, difference: float) -> None:
    graphs = {
        file.removesuffix(".onnx"): GraphSpec(file, inputs, inputs[::-1], difference, difference, "relative L2", 1e-5)
        for file, inputs in tensors.items()
    }
    files = {file: {"size": 3, "sha256": "ab" * 32} for file in tensors}
    made = manifest(model=model, graphs=graphs, files=files, conditions={"seg": {}}, defaults={"guidance_scale": 2.0})
    assert Manifest.loads(made.dumps()) == made


def test_a_real_manifest_round_trips(tiny: Any) -> None:
    text = (tiny.bundle / "manifest.json").read_text()
    assert Manifest.loads(text).dumps() == text
    assert json.loads(text)["format"] == FORMAT


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/../../secret", ".."])
def test_files_outside_the_bundle_are_refused(bundle_copy: Path, outside: str) -> None:
    (bundle_copy.parent / "secret").write_text("secret")
    edit(bundle_copy, lambda m: m["files"].update({outside: {"size": 6, "sha256": "0" * 64}}))
    refused(bundle_copy, "manifest.json cannot be read", "$.files")


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/passwd", "examples/not-listed.png"])
def test_examples_outside_the_bundle_are_refused(bundle_copy: Path, outside: str) -> None:
    edit(bundle_copy, lambda m: m["conditions"].update(seg={"image": outside}))
    refused(bundle_copy, "not listed in files: examples/not-listed.png" if "not" in outside else "conditions")


@pytest.mark.parametrize("file", ["../unet.onnx", "other.onnx"])
def test_graphs_whose_file_is_not_listed_are_refused(bundle_copy: Path, file: str) -> None:
    edit(bundle_copy, lambda m: m["graphs"]["unet"].update(file=file))
    refused(bundle_copy, "graphs" if ".." in file else "not listed in files: other.onnx")


@pytest.mark.parametrize("graph", ["../../x", "a/b", "UNet", "", "x" * 65, "u\x1b[2J"])
def test_graph_names_that_would_leave_a_folder_are_refused(bundle_copy: Path, graph: str) -> None:
    """Plans are kept in folders that are called after their graphs."""
    edit(bundle_copy, lambda m: m["graphs"].update({graph: m["graphs"]["unet"]}))
    assert "\x1b" not in refused(bundle_copy, "manifest.json cannot be read", "graphs")


def test_a_changed_manifest_is_noticed(bundle_copy: Path) -> None:
    """Everything that it says is under a digest, settings of the scheduler too."""
    before = Bundle.open(bundle_copy).digest
    path = bundle_copy / "manifest.json"
    text = path.read_text()
    assert '"beta_end": 0.012' in text
    path.write_text(text.replace('"beta_end": 0.012', '"beta_end": 0.013'))
    refused(bundle_copy, "it was changed since the export")
    edit(bundle_copy, lambda m: None)  # who changes the digest too has made another bundle
    assert Bundle.open(bundle_copy).digest != before


def test_a_manifest_is_json(bundle_copy: Path) -> None:
    """RFC 8259 has no numbers that are not finite, which Python's `json` writes and reads all the same."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((bundle_copy / "manifest.json").read_text(), parse_constant=refuse)
    # diffusers writes that for "clips nothing", its default: it is left out. No other number may be infinite.
    unlimited = manifest(scheduler_config={"lambda_min_clipped": -math.inf, "beta_end": 0.012})
    assert json.loads(unlimited.dumps(), parse_constant=refuse)["scheduler_config"] == {"beta_end": 0.012}
    with pytest.raises(ValueError):
        manifest(scheduler_config={"beta_end": -math.inf}).dumps()
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text().replace('"beta_end": 0.012', '"beta_end": -Infinity'))
    refused(bundle_copy, "manifest.json cannot be read")


@pytest.mark.parametrize("path", ["/dev/zero", "fifo", "large"])
def test_what_is_no_file_is_not_read_for_ever(bundle_copy: Path, path: str) -> None:
    target = bundle_copy / "manifest.json"
    target.unlink()
    if path == "fifo":
        os.mkfifo(target)
    elif path == "large":
        target.touch()
        os.truncate(target, 1 << 32)  # sparse
    else:
        target.symlink_to(path)
    refused(bundle_copy, "manifest.json cannot be read", "bytes" if path == "large" else "not a regular file")


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", None, [FORMAT]])
def test_another_versions_manifest(bundle_copy: Path, found: Any) -> None:
    edit(bundle_copy, lambda m: m.update(format=found))
    refused(bundle_copy, "manifest format", f"this version reads {FORMAT}", "export the bundle again")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_half_written_manifest(bundle_copy: Path, share: float) -> None:
    path = bundle_copy / "manifest.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(bundle_copy, "manifest.json cannot be read", "export the bundle again")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"', "{}", "[" * 100_000, "\udcff", f'{{"format": {FORMAT}}}'])
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
    try:
        text = signed(content)
    except (ValueError, TypeError):
        text = json.dumps(content)
    (folder / "manifest.json").write_text(text)
    try:
        Bundle.open(folder)
    except BundleError as error:
        assert str(error).isprintable()


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
    with pytest.raises(BundleError, match=f"is damaged: {name} changed since the export"):
        opened.file(name)


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

    monkeypatch.setattr(os, "fsync", full)
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


SOURCES = (
    "./模型.safetensors", "./夜景.safetensors", "owner/модель", "owner/模型", "/a/ink.safetensors",
    "/b/ink.safetensors", "a/ink", "b/ink", "My Model", "My/Model", "My-Model", "é", "e",
    "/a/b/" + "x" * 300, "/a/b/" + "x" * 299 + "y",
)  # fmt: skip


def test_names_of_models() -> None:
    """Short for people, different for what is different; every one is the name of a folder on every file system."""
    assert model_name("miniature") == "miniature"
    assert model_name("sd15-lcm") == "sd15-lcm"
    names = {source: model_name(source) for source in SOURCES}
    assert len(set(names.values())) == len(SOURCES)
    for source, start in {
        "./模型.safetensors": "模型-", "owner/модель": "модель-", "/a/ink.safetensors": "ink-", "My Model": "My-Model-"
    }.items():  # fmt: skip
        assert names[source].startswith(start)
    for name in names.values():
        assert len(bundle_folder(name, "fp32", 2048, 2048).name.encode()) < 200
        assert not set(name) & set('/\\:*?"<>| ') and name.strip(".-") == name
    assert model_name("e\u0301") == model_name("\u00e9")  # one letter, composed or not


def test_finding_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe in the manifest, never by what a folder is called alone."""
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no bundle of 'm' under .*cnpp-trt export --model m --cond seg"):
        find_bundle("m")
    for file in ("夜景.safetensors", "模型.safetensors"):
        (tmp_path / file).touch()

    def export(model: str, precision: str = "fp32", width: int = 64, **parts: Any) -> str:
        recipe = Recipe(model, **parts)
        made = manifest(model=recipe.name, precision=precision, width=width, recipe=recipe.recorded())
        made.identity = recipe.identity
        folder = bundle_folder(recipe.name, precision, width, 64)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(made.dumps())
        return folder.name

    mine = export("./模型.safetensors")
    assert find_bundle("./模型.safetensors").name == mine
    assert find_bundle(str(tmp_path / "模型.safetensors")).name == mine  # the same file
    with pytest.raises(UserError, match=r"no bundle of '\./夜景\.safetensors'"):
        find_bundle("./夜景.safetensors")
    (tmp_path / "bundles" / mine).rename(tmp_path / "bundles" / "model-fp32-64x64")  # as earlier versions called it
    with pytest.raises(UserError, match="no bundle of"):
        find_bundle("./夜景.safetensors")

    one, two = export("owner/m"), export("other/m")
    assert (find_bundle("owner/m").name, find_bundle("other/m").name) == (one, two)
    with_variant, with_net = export("owner/m", variant="fp16"), export("owner/m", controlnets={"seg": "sd15"})
    assert len({one, two, with_variant, with_net}) == 4
    assert find_bundle("owner/m").name == one  # the plain one
    shutil.rmtree(tmp_path / "bundles" / one)
    with pytest.raises(UserError, match=r"several bundles of 'owner/m': .*choose with --size, --precision or --bundle"):
        find_bundle("owner/m")
    shutil.rmtree(tmp_path / "bundles" / with_variant)
    assert find_bundle("owner/m").name == with_net  # the only one of this model

    export("sd15")
    export("sd15", loras=["lcm"])
    export("sd15", "fp16", 72)
    assert find_bundle("sd15-lcm").name == "sd15-lcm-fp32-64x64"
    with pytest.raises(UserError, match="several bundles of 'sd15': sd15-fp16-72x64, sd15-fp32-64x64"):
        find_bundle("sd15")
    assert find_bundle("sd15", "fp16").name == "sd15-fp16-72x64"
    assert find_bundle("sd15", size=(64, 64)).name == "sd15-fp32-64x64"
    assert find_bundle("sd15", preferred=("fp16", "fp32")).name == "sd15-fp16-72x64"
    with pytest.raises(UserError, match="--precision fp16 --size 64x64"):
        find_bundle("sd15", "fp16", (64, 64))


# ------------------------------------------------------------------------------------------------- what is read of it


def test_links(bundle_copy: Path, tmp_path: Path) -> None:
    """One that leads outside is refused; the bundle's folder may be one itself, and links inside of it are fine."""
    (tmp_path / "link").symlink_to(bundle_copy)
    Bundle.open(tmp_path / "link")
    weights = bundle_copy / "unet.onnx.data"
    weights.rename(bundle_copy / "moved")
    weights.symlink_to("moved")
    Bundle.open(bundle_copy)
    shutil.move(bundle_copy / "moved", tmp_path / "outside")
    weights.unlink()
    weights.symlink_to(tmp_path / "outside")
    refused(bundle_copy, "unet.onnx.data is a link that leads outside")
    weights.unlink()
    shutil.copy(tmp_path / "outside", weights)
    (tmp_path / "tokenizer").mkdir()
    for file in (bundle_copy / "tokenizer").iterdir():
        shutil.move(file, tmp_path / "tokenizer" / file.name)
    (bundle_copy / "tokenizer").rmdir()
    (bundle_copy / "tokenizer").symlink_to(tmp_path / "tokenizer")
    refused(bundle_copy, "is a link that leads outside")


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "unet.onnx.data"])
def test_a_file_that_is_not_listed_is_not_read(bundle_copy: Path, name: str) -> None:
    edit(bundle_copy, lambda m: m["files"].pop(name))
    with pytest.raises(BundleError, match=f"does not list {name}"):
        Pipeline.open(bundle_copy, threads=1)(Request("x", num_inference_steps=1))


def test_what_was_hashed_is_remembered(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read again where anything of it changed: size, inode or a time. A damaged memo does not count.

    Times that lie less than some seconds back are not trusted: a file system may tell two of them by one number.
    """
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "home"))
    read: list[str] = []
    monkeypatch.setattr(verified, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    monkeypatch.setattr(verified, "_SETTLED_NS", 0)
    name = "unet.onnx.data"

    def look() -> list[str]:
        read.clear()
        Bundle.open(bundle_copy).file(name)
        return read

    assert look() == [name]
    assert look() == []
    status = (bundle_copy / name).stat()
    os.utime(bundle_copy / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # changes ctime alone
    assert look() == [name]
    assert look() == []
    memo = next((tmp_path / "home" / "verified").iterdir())
    for damage in (b"", b"[]", memo.read_bytes()[:-20], b"\xff" * 100):
        memo.write_bytes(damage)
        assert look() == [name]
    memo.unlink()
    memo.parent.rmdir()
    memo.parent.write_text("no folder")  # nothing can be remembered
    assert look() == [name]
    assert look() == [name]
