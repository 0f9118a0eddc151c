"""Bundles from addresses of fsspec: fetched once, verified, and refused where they are something else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import Bundle
from cnpp_trt.bundles.fetching import fetch_bundle, is_address
from cnpp_trt.errors import BundleError, CnppError, UserError

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'cnpp-trt[remote]'")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def memory(tiny: Any, home: Path) -> Iterator[Any]:
    """A store in memory that has a bundle at memory://models/tiny."""
    files = fsspec.filesystem("memory")
    files.put(str(tiny.bundle), "/models/tiny", recursive=True)
    yield files
    files.rm("/models", recursive=True)


def test_what_is_an_address() -> None:
    assert all(map(is_address, ("s3://a/b", "gs://a", "hf://owner/name", "file:///a", "memory://x")))
    assert not any(map(is_address, ("./a", "/a/b", "a", "C:\\a", "c:/a", "~/x")))


def test_it_is_fetched_once(memory: Any, tiny: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_bundle("memory://models/tiny")
    found = Bundle.open(folder)
    assert found.digest == Bundle.open(tiny.bundle).digest
    assert found.verify() > 0
    listed = {*found.manifest.files, "manifest.json"}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == listed
    opened: list[str] = []
    real = type(memory).open
    monkeypatch.setattr(
        type(memory), "open", lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k)
    )
    assert fetch_bundle("memory://models/tiny") == folder
    assert [Path(path).name for path in opened] == ["manifest.json"]
    assert fetch_bundle("memory://models/tiny", found.digest) == folder
    assert len(opened) == 1
    assert not [p.name for p in (home / "fetched").iterdir() if p != folder]


def test_processes_that_want_it_together(tiny: Any, home: Path) -> None:
    """Each gets the same whole bundle, and nothing is left of those that waited."""
    code = "import sys; from cnpp_trt.bundles.fetching import fetch_bundle; print(fetch_bundle(sys.argv[1]))"
    line = [sys.executable, "-c", code, f"file://{tiny.bundle}"]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    [folder] = said
    assert Bundle.open(folder).verify() > 0
    assert [p.name for p in (home / "fetched").iterdir()] == [Path(folder).name]


def test_another_bundle_than_the_jobs(memory: Any, home: Path) -> None:
    with pytest.raises(BundleError, match="another bundle than the job's"):
        fetch_bundle("memory://models/tiny", "0" * 64)
    assert not (home / "fetched").exists()


def change(memory: Any, name: str, content: bytes | None) -> None:
    path = f"/models/tiny/{name}"
    memory.rm(path)
    if content is not None:
        memory.pipe(path, content)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        (
            "unet.onnx.data",
            lambda old: bytes([old[0] ^ 1]) + old[1:],
            "unet.onnx.data is not what its manifest says",
        ),
        ("unet.onnx.data", lambda old: old + b"x" * (3 << 20), "unet.onnx.data is not what its manifest says"),
        ("unet.onnx.data", lambda old: old[:-1], "unet.onnx.data is not what its manifest says"),
        ("unet.onnx", lambda old: None, "it has no unet.onnx"),
        ("manifest.json", lambda old: None, "it has no manifest.json"),
        ("manifest.json", lambda old: b"{", "has a manifest.json that cannot be read"),
        ("manifest.json", lambda old: b" " * (17 << 20), "of more than 16 MiB"),
    ],
)
def test_what_is_damaged(memory: Any, home: Path, name: str, make: Any, said: str) -> None:
    change(memory, name, make(memory.cat(f"/models/tiny/{name}")))
    with pytest.raises(BundleError, match=said):
        fetch_bundle("memory://models/tiny")
    assert not list((home / "fetched").iterdir() if (home / "fetched").exists() else ())


def test_names_that_lead_elsewhere(tiny: Any, home: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny.bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["files"]["../../outside"] = {"size": 1, "sha256": "0" * 64}
    (copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        fetch_bundle(f"file://{copy}")


@pytest.mark.parametrize("address", ["nothing://a/b", "s3://a/b"])
def test_addresses_that_cannot_be_used(home: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """No such kind, and a kind whose package is not installed: one line."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"cannot (fetch|read)") as caught:
        fetch_bundle(address)
    assert "\n" not in str(caught.value)


def test_without_fsspec(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(CnppError, match="remote"):
        fetch_bundle("s3://a/b")
