"""The plan store: what a plan depends on, that it is whole or not there, and that it is built once."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines import store as module
from cnpp_trt.engines.flavor import Flavor
from cnpp_trt.engines.fusion import FusionReport
from cnpp_trt.engines.plan import ENGINE, BuilderSettings, Plan, PlanKey, Range, Row, graph_digest, system
from cnpp_trt.engines.store import RECORD, PlanStore, bundle_sources, installed_versions
from cnpp_trt.errors import BackendError, UserError
from cnpp_trt.files import PARTIAL

ROW: dict[str, Row] = {"x": {"min": [2, 16], "opt": [2, 16], "max": [2, 16]}}
KEY = PlanKey("unet", "ab" * 32, "tensorrt-rtx", "1.7.1", "portable", system(), (ROW,), {"optimization_level": None})
CONTENT = bytes(range(256)) * 8


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


@pytest.fixture
def put(store: PlanStore, fake_built: Any) -> Callable[..., Plan]:
    """A plan of `key` in the store, with this content."""

    def call(key: PlanKey = KEY, content: bytes = CONTENT) -> Plan:
        plan, new = store.get_or_build(key, "small", lambda: fake_built(content))
        assert new
        return plan

    return call


@pytest.fixture(autouse=True)
def nothing_else_is_logged(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Only tests that ask for `told` have a plan of which something is told."""
    caplog.set_level("INFO", "cnpp_trt")
    yield
    assert "told" in request.fixturenames or not caplog.get_records("call")


def unexpected() -> Any:
    raise AssertionError("nothing was to be built")


def left(root: Path) -> list[str]:
    """What is there besides lock files."""
    return sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock")) if root.is_dir() else []


# ------------------------------------------------------------------------------------------------------------- the key


OTHER: dict[str, Any] = {
    "graph": "controlnet_seg",
    "source": "cd" * 32,
    "flavor": "tensorrt",
    "version": "1.7.2",
    "target": "sm90",
    "system": "Windows-AMD64",
    "profiles": ({"x": {"min": [2, 16], "opt": [2, 16], "max": [4, 16]}},),
    "settings": {"optimization_level": 5},
    "revision": KEY.revision + 1,
}


def test_every_field_of_the_key_is_varied_below() -> None:
    assert set(OTHER) == {f.name for f in fields(PlanKey)}


@pytest.mark.parametrize("field", OTHER)
def test_the_key_changes_with(field: str) -> None:
    other = replace(KEY, **{field: OTHER[field]})
    assert other.digest != KEY.digest
    assert other.folder != KEY.folder
    assert replace(other, **{field: getattr(KEY, field)}).folder == KEY.folder


@pytest.mark.parametrize("profiles", [(ROW, ROW), ({"x": ROW["x"], "y": ROW["x"]},), ({"y": ROW["x"]},), ()])
def test_the_key_changes_with_the_sizes(profiles: Any) -> None:
    assert replace(KEY, profiles=profiles).folder != KEY.folder


def test_the_key_is_the_same_after_it_was_written(store: PlanStore, put: Callable[..., Plan]) -> None:
    put()
    [found] = store.plans()
    assert found.key == KEY
    assert found.key.digest == KEY.digest
    assert found.folder == store.root / KEY.folder


def test_the_key_of_a_graph(small: Bundle, small_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flavor, settings = Flavor("tensorrt-rtx", None, "1.7.1"), BuilderSettings()
    profiles = [{"x": Range((1, 16), (1, 16), (2, 16))}]

    def key(bundle: Bundle = small, graph: str = "unet") -> PlanKey:
        return PlanKey.of(bundle, graph, flavor, profiles, settings)

    first = key()
    assert first == PlanKey.of(Bundle.open(small.folder), "unet", flavor, profiles, settings)
    assert (first.graph, first.flavor, first.version, first.target) == ("unet", "tensorrt-rtx", "1.7.1", "portable")
    assert first.profiles == ({"x": {"min": [1, 16], "opt": [1, 16], "max": [2, 16]}},)

    # Where the bundle lies, what it is called and what else is in it does not matter.
    elsewhere = Bundle.open(shutil.move(small.folder, tmp_path / "moved"))
    elsewhere.manifest.model = "another name"
    elsewhere.manifest.files["unet.onnx"]["size"] += 0
    elsewhere.manifest.files["controlnet_seg.onnx"]["sha256"] = "0" * 64
    del elsewhere.manifest.conditions["depth"]
    assert key(elsewhere) == first
    # A graph of the same bytes in another model serves both.
    assert key(small_bundle(tmp_path / "same", 0)) == first

    # The digest of the graph's file, of its weights beside it, and which graph it is, do.
    assert key(small_bundle(tmp_path / "other", 1)).source != first.source
    assert key(elsewhere, "controlnet_depth").source != key(elsewhere, "update").source
    elsewhere.manifest.files["unet.onnx.data"] = {"size": 1, "sha256": "1" * 64}
    with_weights = key(elsewhere)
    assert with_weights.source != first.source
    elsewhere.manifest.files["unet.onnx.data"]["sha256"] = "2" * 64
    assert key(elsewhere).source not in (first.source, with_weights.source)

    for other in (
        PlanKey.of(small, "unet", replace(flavor, version="1.7.2"), profiles, settings),
        PlanKey.of(small, "unet", flavor, [{"x": Range((1, 16), (2, 16), (2, 16))}], settings),
        PlanKey.of(small, "unet", flavor, profiles, BuilderSettings(3)),
    ):
        assert other.source == first.source
        assert other.folder != first.folder
    plain = Flavor("tensorrt", None, "1.7.1")
    targets = []
    for sm in ("sm89", "sm90"):
        monkeypatch.setattr(Flavor, "target", lambda self, sm=sm: sm)
        targets.append(PlanKey.of(small, "unet", plain, profiles, settings))
    assert len({first.folder, *(k.folder for k in targets)}) == 3


# ------------------------------------------------------------------------------------------------- writing and reading


def test_a_plan_is_built_once_and_read_back(store: PlanStore, fake_built: Any) -> None:
    fusion = FusionReport(9, 2, 1, 4, 3, 5, 1, ("soft", "norm"))
    built = fake_built(CONTENT, fusion=fusion, seconds=1.234, weights=10, activations=20, peak=30)
    plan, new = store.get_or_build(KEY, "small", lambda: built)
    assert new
    again, new = store.get_or_build(KEY, "small", unexpected)
    assert not new
    for p in (plan, again):
        assert (p.key, p.model, p.size, p.fusion) == (KEY, "small", len(CONTENT), fusion)
        assert (p.seconds, p.weights, p.activations, p.peak) == (1.23, 10, 20, 30)
        assert p.read() == p.engine.read_bytes() == CONTENT
        assert p.integrity_error() is None
    assert left(store.root) == [KEY.folder]
    assert left(plan.folder) == [ENGINE, RECORD]
    if os.name == "posix":
        assert plan.folder.stat().st_mode & 0o777 == 0o755


def test_a_failed_build_leaves_nothing(store: PlanStore) -> None:
    def fail() -> Any:
        raise BackendError("TensorRT cannot build")

    for _ in range(2):
        with pytest.raises(BackendError, match="TensorRT cannot build"):
            store.get_or_build(KEY, "small", fail)
        assert left(store.root) == []


def test_the_store_is_under_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    assert PlanStore().root == tmp_path / "plans"
    assert PlanStore().plans() == []
    assert not (tmp_path / "plans").exists()
    monkeypatch.chdir(tmp_path)
    assert PlanStore(Path("mine")).root == tmp_path / "mine"


def test_a_relative_store_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_built: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    plan, _ = PlanStore(Path("mine")).get_or_build(KEY, "small", lambda: fake_built(CONTENT))
    monkeypatch.chdir("/")
    assert plan.read() == CONTENT


# ---------------------------------------------------------------------------------------------------------- processes


def child(store: PlanStore, function: str) -> "subprocess.Popen[str]":
    """A function of tests/programs/plan_store.py in a process of its own."""
    key = repr({f.name: getattr(KEY, f.name) for f in fields(KEY)})
    program = Path(__file__).parent.parent / "programs" / "plan_store.py"
    line = [sys.executable, str(program), function, key, str(store.root), str(store.root.parent / "builds")]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("function", "word", "partial"),
    [
        ("build_slowly", "building", False),
        ("write_slowly", "writing", True),
        ("rename_slowly", "renaming", True),
    ],
)
def test_a_killed_build(store: PlanStore, fake_built: Any, function: str, word: str, partial: bool) -> None:
    """With SIGKILL nothing can be tidied up: what is left must pass for nothing, and the next build clears it."""
    with child(store, function) as process:
        assert process.stdout
        assert any(line.strip() == word for line in process.stdout)
        there = left(store.root)
        process.kill()
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert [name.startswith(f".{KEY.folder}{PARTIAL}") for name in there] == [True] * partial
    assert left(store.root) == there
    assert store.plans() == []
    built: list[bytes] = []
    start = time.perf_counter()
    plan, new = store.get_or_build(KEY, "small", lambda: (built.append(CONTENT), fake_built(CONTENT))[1])
    assert time.perf_counter() - start < 30  # half of what the killed build would have taken
    assert (new, built, plan.read()) == (True, [CONTENT], CONTENT)
    assert left(store.root) == [KEY.folder]


def test_two_processes_build_one_plan_once(store: PlanStore) -> None:
    """They are let go at once; the slow build gives the others time to come."""
    processes = [child(store, "queue_for_one_plan") for _ in range(3)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    builds = (store.root.parent / "builds").read_text().split()
    assert len(builds) == 1
    ends = [output[-1].split() for output in outputs]
    assert sorted(new for new, _ in ends) == ["False", "False", "True"]
    assert len({digest for _, digest in ends}) == 1
    assert sorted(map(len, outputs)) == [1, 1, 2]  # one told that it builds, and none that anything was wrong


def test_other_plans_do_not_wait(store: PlanStore, fake_built: Any) -> None:
    """While one plan is built, another of the same store can be."""
    with child(store, "build_slowly") as process:
        assert process.stdout
        assert process.stdout.readline() == "building\n"
        other = replace(KEY, graph="update")
        _, new = store.get_or_build(other, "small", lambda: fake_built(CONTENT))
        assert new
        assert [p.key for p in store.plans()] == [other]
        process.kill()


# ------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ENGINE_DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "flipped": (flip, "changed since it was built", "is damaged and was not loaded"),
    "truncated": (lambda p: os.truncate(p, 100), f"has 100 bytes instead of {len(CONTENT)}", "is damaged"),
    "longer": (lambda p: p.write_bytes(CONTENT + b"x"), f"{len(CONTENT) + 1} bytes", "is damaged"),
    "emptied": (lambda p: p.write_bytes(b""), "has 0 bytes", "is damaged"),
    "missing": (Path.unlink, "is missing", "No such file or directory"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "bytes instead of", "cannot read"),
}


@pytest.mark.parametrize("kind", ENGINE_DAMAGE)
def test_a_damaged_engine(
    store: PlanStore, put: Callable[..., Plan], fake_built: Any, told: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, reason, refusal = ENGINE_DAMAGE[kind]
    plan = put()
    damage(plan.engine)
    assert reason in (plan.integrity_error() or "")
    with pytest.raises(BackendError) as refused:
        plan.read()
    assert refusal in str(refused.value)
    assert str(plan.engine) in str(refused.value)
    assert str(refused.value).endswith("run `cnpp-trt build` again")
    assert "\n" not in str(refused.value)

    again, new = store.get_or_build(KEY, "small", lambda: fake_built(CONTENT + b"new"))
    assert new
    [line] = told.messages
    assert line.startswith("unet: ")
    assert reason in line
    assert line.endswith("building it again")
    assert again.read() == CONTENT + b"new"
    assert left(store.root) == [KEY.folder]
    assert store.get_or_build(KEY, "small", unexpected)[1] is False


RECORD_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "emptied": lambda p: p.write_text(""),
    "cut off": lambda p: os.truncate(p, 200),
    "no text": lambda p: p.write_bytes(b"\xff\xfe\x00junk"),
    "another kind of JSON": lambda p: p.write_text("[1, 2]"),
    "nothing": lambda p: p.write_text("null"),
    "nested without end": lambda p: p.write_text("[" * 100_000),
    "another format": lambda p: edit(p, format=99),
    "a later field": lambda p: edit(p, color="red"),
    "a field less": lambda p: p.write_text(p.read_text().replace('"sha256"', '"digest"')),
    "no key": lambda p: edit(p, key=None),
    "another key": lambda p: edit(p, key={**json.loads(p.read_text())["key"], "version": "0.1"}),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("kind", RECORD_DAMAGE)
def test_a_damaged_record(
    store: PlanStore, put: Callable[..., Plan], fake_built: Any, told: pytest.LogCaptureFixture, kind: str
) -> None:
    """The engine beside it may be whole: without a record of its digest it is never loaded."""
    plan = put()
    RECORD_DAMAGE[kind](plan.folder / RECORD)
    assert [p.key for p in store.plans() if p.key == KEY] == []
    again, new = store.get_or_build(KEY, "small", lambda: fake_built(b"anew"))
    assert new
    [line] = told.messages
    assert line.startswith("unet: ")
    assert RECORD in line
    assert line.endswith("building it again")
    assert again.read() == b"anew"
    assert left(store.root) == [KEY.folder]
    assert [p.key for p in store.plans()] == [KEY]


@pytest.mark.parametrize("field", ["version", "target", "settings", "system", "revision"])
def test_a_plan_for_something_else_is_built_again_and_said_so(
    store: PlanStore, put: Callable[..., Plan], fake_built: Any, told: pytest.LogCaptureFixture, field: str
) -> None:
    old = put(replace(KEY, **{field: OTHER[field]}), b"old")
    plan, new = store.get_or_build(KEY, "small", lambda: fake_built(CONTENT))
    assert new
    assert plan.folder != old.folder
    assert plan.read() == CONTENT
    [line] = told.messages
    assert line.startswith(f"unet: the plan that is there was built for {field} ")
    assert line.endswith("building it again")

    def shown(value: Any) -> str:
        return next(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

    assert shown(OTHER[field]) in line
    assert f"not {shown(getattr(KEY, field))}" in line


@pytest.mark.parametrize("field", ["graph", "source", "flavor", "profiles"])
def test_a_plan_beside_others_is_nothing_to_speak_of(
    store: PlanStore, put: Callable[..., Plan], fake_built: Any, field: str
) -> None:
    put(replace(KEY, **{field: OTHER[field]}))
    assert store.get_or_build(KEY, "small", lambda: fake_built(CONTENT))[1]
    assert len(store.plans()) == 2


# ----------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("where", ["new_partial_folder", "fsync", "write_text"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(
    store: PlanStore, fake_built: Any, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    targets: dict[str, Any] = {"new_partial_folder": module, "fsync": os, "write_text": Path}
    with monkeypatch.context() as patch:
        patch.setattr(targets[where], where, fail)
        with pytest.raises(UserError) as refused:
            store.get_or_build(KEY, "small", lambda: fake_built(CONTENT))
    line = str(refused.value)
    assert line.startswith(f"no space left for {store.root}")
    assert "\n" not in line
    assert left(store.root) == []
    assert store.get_or_build(KEY, "small", lambda: fake_built(CONTENT))[1]


def test_a_full_disk_takes_no_plan_away(
    store: PlanStore, put: Callable[..., Plan], fake_built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plans of other graphs stay as they are."""
    put(replace(KEY, graph="update"))

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError):
        store.get_or_build(KEY, "small", lambda: fake_built(CONTENT))
    [other] = store.plans()
    assert other.read() == CONTENT


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_a_write_that_the_system_cuts_off(store: PlanStore) -> None:
    """Not simulated: the system lets no file of this process grow beyond 1 KiB."""
    with child(store, "build_beyond_a_limit") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[-1].startswith("refused: cannot write ")
    assert left(store.root) == []


@pytest.mark.parametrize("place", ["under a file", "a file", "read only"])
def test_a_store_that_cannot_be_written(tmp_path: Path, fake_built: Any, place: str) -> None:
    blocked = tmp_path / "blocked"
    if place == "read only":
        if os.name != "posix" or os.geteuid() == 0:
            pytest.skip("to the superuser nothing is read only")
        blocked.mkdir(mode=0o555)
    else:
        blocked.write_text("a file")
    store = PlanStore(blocked if place == "a file" else blocked / "plans")
    with pytest.raises(UserError) as refused:
        store.get_or_build(KEY, "small", unexpected)
    line = str(refused.value)
    assert line.startswith(f"cannot write {blocked}")
    assert line.endswith("choose another --plans")
    assert "\n" not in line
    assert [p.name for p in tmp_path.iterdir()] == ["blocked"]


def test_a_file_system_that_is_read_only(store: PlanStore, fake_built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container mounts it; the plan is refused before it is built for nothing."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(store.root))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match=r"cannot write .*plans \(Read-only file system\): choose another --plans"):
        store.get_or_build(KEY, "small", unexpected)


# --------------------------------------------------------------------------------------------------- finding a profile


def rows(*sizes: tuple[int, int, int]) -> tuple[dict[str, Any], ...]:
    return tuple({"x": {"min": [a, 16], "opt": [b, 16], "max": [c, 16]}} for a, b, c in sizes)


def test_the_profile_for_a_size(put: Callable[..., Plan]) -> None:
    plan = put(replace(KEY, profiles=rows((1, 2, 8), (2, 2, 2), (4, 4, 4), (2, 3, 9))))
    found = {n: plan.profile_for({"x": (n, 16)}) for n in (0, 1, 2, 3, 4, 8, 9, 10)}
    # The fixed size first, then the first range that holds it.
    assert found == {0: None, 1: 0, 2: 1, 3: 0, 4: 2, 8: 0, 9: 3, 10: None}
    assert plan.profile_for({"x": (2, 17)}) is None
    assert plan.profile_for({"x": (2,)}) is None


def test_the_profile_fits_every_input(put: Callable[..., Plan]) -> None:
    both = ({**rows((2, 2, 2))[0], "y": {"min": [1], "opt": [1], "max": [1]}},)
    plan = put(replace(KEY, profiles=both))
    assert plan.profile_for({"x": (2, 16), "y": (1,)}) == 0
    assert plan.profile_for({"x": (2, 16), "y": (2,)}) is None


def test_plans_of_a_graph_the_newest_first(
    small: Bundle, store: PlanStore, put: Callable[..., Plan], told: pytest.LogCaptureFixture
) -> None:
    flavor = Flavor("tensorrt-rtx", None, "1.7.1")
    key = replace(KEY, source=graph_digest(small, "unet"))
    old, new = put(key), put(replace(key, profiles=rows((4, 4, 4))))
    os.utime(old.folder / RECORD, (1, 1))
    put(replace(key, version="1.7.2"))
    put(replace(key, flavor="tensorrt"))
    put(replace(key, system="Windows-AMD64"))
    put(replace(key, source="00"))
    put(replace(key, graph="unet_other"))
    assert [p.folder for p in store.find(small, "unet", flavor)] == [new.folder, old.folder]
    os.utime(new.folder / RECORD, (0, 0))
    assert [p.folder for p in store.find(small, "unet", flavor)] == [old.folder, new.folder]
    assert store.find(small, "update", flavor) == []


# ------------------------------------------------------------------------------------------------------------- pruning


def test_useless_plans_and_why(store: PlanStore, put: Callable[..., Plan]) -> None:
    good = put()
    put(replace(KEY, graph="elsewhere", system="Plan9-mips"))
    put(replace(KEY, graph="older", version="1.6.0"))
    put(replace(KEY, graph="cold", flavor="tensorrt", version="11.0"))  # not installed here: it may be again
    flip(put(replace(KEY, graph="flipped")).engine)
    put(replace(KEY, graph="strange", source="other"))
    versions = {"tensorrt-rtx": "1.7.1"}
    found = {plan.key.graph: reason for plan, reason in store.find_unusable(versions).items()}
    assert set(found) == {"elsewhere", "older", "flipped"}
    assert found["elsewhere"] == "for Plan9-mips"
    assert found["older"] == "tensorrt-rtx 1.6.0, installed is 1.7.1"
    assert "changed since it was built" in found["flipped"]
    unused = {plan.key.graph: reason for plan, reason in store.find_unusable(versions, {good.key.source}).items()}
    assert set(unused) == {"elsewhere", "older", "flipped", "strange"}
    assert unused["strange"] == "no bundle has its graph"
    assert len(store.plans()) == 6


def test_removing_plans_frees_what_it_says(store: PlanStore, put: Callable[..., Plan]) -> None:
    gone, kept = put(), put(replace(KEY, graph="update"))
    (gone.folder / "runtime-sm90.cache").write_bytes(b"x" * 1000)
    sizes = sum(p.stat().st_size for p in gone.folder.iterdir())
    assert sizes > len(CONTENT) + 1000
    assert store.remove([gone]) == sizes
    assert left(store.root) == [kept.folder.name]
    assert kept.read() == CONTENT
    assert store.remove([]) == 0


def test_leftovers_of_killed_builds(store: PlanStore, put: Callable[..., Plan]) -> None:
    plan = put()
    for name in (KEY.folder, "update-0123456789abcdef"):
        partial = store.root / f".{name}{PARTIAL}abc"
        partial.mkdir()
        (partial / ENGINE).write_bytes(b"x" * 500)
    (store.root / "mine.txt").write_text("not a plan")
    assert store.remove_leftovers() == 1000
    assert left(store.root) == sorted(["mine.txt", KEY.folder])
    assert plan.read() == CONTENT
    assert store.remove_leftovers() == 0


@pytest.mark.parametrize("kind", ["missing", "emptied", "another format"])
def test_plans_without_a_readable_record_are_leftovers(store: PlanStore, put: Callable[..., Plan], kind: str) -> None:
    """Nobody can load them, list them or say what they are: else they would fill the disk for ever."""
    plan, kept = put(), put(replace(KEY, graph="update"))
    RECORD_DAMAGE[kind](plan.folder / RECORD)
    mine = store.root / "my-folder"
    mine.mkdir()
    (mine / "thesis.txt").write_text("not a plan")
    assert store.remove_leftovers() >= len(CONTENT)
    assert left(store.root) == sorted(["my-folder", kept.folder.name])


def test_no_store_at_all(store: PlanStore) -> None:
    assert store.plans() == []
    assert store.find_unusable(installed_versions()) == {}
    assert store.remove_leftovers() == 0
    assert not store.root.exists()


def test_digests_of_the_bundles_at_home(small_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    assert bundle_sources() == set()
    a, b = (small_bundle(tmp_path / "bundles" / name, seed) for seed, name in enumerate("ab"))
    wanted = {graph_digest(bundle, graph) for bundle in (a, b) for graph in bundle.manifest.graphs}
    assert bundle_sources() == wanted
    assert len(wanted) == 2 * len(a.manifest.graphs)
    (b.folder / "manifest.json").write_text("{}")
    assert bundle_sources() == {graph_digest(a, graph) for graph in a.manifest.graphs}
