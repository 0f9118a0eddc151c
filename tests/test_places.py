"""Where things go when nothing is said, and finding out beforehand whether they can be written."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cnpp_trt import places
from cnpp_trt.errors import UserError
from cnpp_trt.files import require_writable, require_writable_file


def test_home_is_the_variable_or_the_platforms_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "mine"))
    assert places.home() == tmp_path / "mine"
    assert places.bundles() == tmp_path / "mine" / "bundles"
    assert places.plans() == tmp_path / "mine" / "plans"
    monkeypatch.setenv("CNPP_TRT_HOME", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.home() == tmp_path / "mine"
    monkeypatch.delenv("CNPP_TRT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the XDG base directory specification's variable
    if sys.platform == "linux":
        assert places.home() == tmp_path / "cache" / "cnpp-trt"


def test_home_of_a_user_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", "~no-such-user-here/x")
    with pytest.raises(UserError, match="CNPP_TRT_HOME ~no-such-user-here/x"):
        places.home()


def test_what_a_command_was_run_for_is_in_the_current_folder() -> None:
    assert not places.runs().is_absolute()
    assert not places.results().is_absolute()


@pytest.mark.parametrize("name", ["", "new", "new/deeper/still", "with space and *", "模型"])
def test_writable(tmp_path: Path, name: str) -> None:
    require_writable(tmp_path / name)
    require_writable_file(tmp_path / name / "file.json")
    assert list(tmp_path.iterdir()) == []  # nothing is left


@pytest.mark.parametrize(
    "name", ["/proc/nope/deeper", "/dev/full", "/dev/null/x", "a\0b", "\ud800", "x" * 300, "x/" * 3000]
)
def test_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="choose another --records") as refused:
        require_writable(Path(name), "--records")
    assert str(refused.value).isprintable()
    with pytest.raises(UserError):
        require_writable_file(Path(name) / "file.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_where_a_file_is_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    require_writable_file(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"
    for bad in (tmp_path, Path("/dev/null"), tmp_path / "loop", tmp_path / "old.json" / "inside"):
        with pytest.raises(UserError):
            require_writable_file(bad)
    with pytest.raises(UserError, match="is no folder"):
        require_writable(tmp_path / "old.json")


def test_a_folder_that_only_others_may_write() -> None:
    """As another user where this one is root, whom no mode stops."""
    code = """
import os, sys
from pathlib import Path
from cnpp_trt.files import require_writable
if os.getuid() == 0:
    os.setuid(65534)
require_writable(Path(sys.argv[1]) / "new")
"""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which no other user may enter
        Path(folder).chmod(0o555)
        ended = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
        Path(folder).chmod(0o755)
    assert "UserError" in ended.stderr
    assert "Permission denied" in ended.stderr
