"""The plan store: a folder of plans, each found by everything that it depends on.

    <root>/unet-3f9c0e1b2a4d5e6f/
      plan.engine    the serialized engine
      plan.json      its key in full, its digest, how it was built, what was fused
      runtime-….cache  what TensorRT-RTX compiled for one GPU when the plan first ran there
    <root>/timing-….cache  how fast TensorRT found each kernel on one kind of GPU, for builds to come

A plan contains executable code, so its digest is checked before every load. A plan is written into a temporary
sibling and renamed when whole; a lock lets two processes that ask for one plan build it once.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from .. import places
from ..bundles.bundle import Bundle
from ..bundles.manifest import Sha256
from ..errors import BundleError, UserError
from ..files import PARTIAL, Busy, exclusive, new_partial_folder, remove_folder, replace_file
from ..schema import Meta, Record, SchemaError, convert_closed, decode, read_bounded, to_json
from ..versions import installed
from .flavor import Flavor, installed_flavors
from .fusion import FusionReport
from .plan import ENGINE, BuildResult, Count, Plan, PlanKey, graph_digest, system

logger = logging.getLogger(__name__)

RECORD = "plan.json"
_MAX_RECORD = 8 << 20
# SD 1.5's has some megabytes.
_MAX_TIMING = 1 << 30


class _Record(Record, kw_only=True):
    """What `plan.json` holds; its fields are those of `Plan`."""

    format: Literal[2] = 2
    key: PlanKey
    model: Annotated[str, Meta(max_length=255)]
    size: Count
    sha256: Sha256
    seconds: Annotated[float, Meta(ge=0)]
    peak: Count
    weights: Count
    activations: Count
    fusion: FusionReport


class PlanStore:
    """A folder of plans.

    Args:
        root: the folder; None for `<home>/plans`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or places.plans()).absolute()

    def plans(self) -> list[Plan]:
        """Those whose record can be read, by name. Their engines are not looked at."""
        return [plan for folder in self._folders() if (plan := _read(folder / RECORD))]

    def find(self, bundle: Bundle, graph: str, flavor: Flavor) -> list[Plan]:
        """The plans of a graph that this flavor and version can load, the newest first."""
        return [plan for plan in self.of(bundle, graph, flavor.name) if plan.key.version == flavor.version]

    def of(self, bundle: Bundle, graph: str, flavor: str) -> list[Plan]:
        """The plans of a graph that some version of the flavor of this name can load, the newest first."""
        wanted = (graph_digest(bundle, graph), flavor, system())
        matches = [p for p in self._of_graph(graph) if (p.key.source, p.key.flavor, p.key.system) == wanted]
        return sorted(matches, key=lambda plan: -_modified(plan.folder / RECORD))

    def get_or_build(self, key: PlanKey, model: str, build: Callable[[], BuildResult]) -> tuple[Plan, bool]:
        """The plan of `key`, and whether it had to be built.

        Raises:
            UserError: the store cannot be written or its disk is full; what `build` raises.
        """
        folder = self.root / key.folder
        with self._lock(key.folder):
            for leftover in self._leftovers():
                if leftover.name.startswith(f".{key.folder}{PARTIAL}"):
                    remove_folder(leftover)
                else:  # another plan's: it may be being built
                    with suppress(Busy), self._lock(_plan_of(leftover), wait=False):
                        remove_folder(leftover)
            if folder.exists():
                plan = _read(folder / RECORD)
                reason = plan.integrity_error() if plan and plan.key == key else f"{folder / RECORD} cannot be read"
                if plan and not reason:
                    return plan, False
                logger.info(f"{key.graph}: {reason}: building it again")
            else:
                reason = self._outdated(key)
                if reason:
                    logger.info(f"{key.graph}: {reason}: building it again")
            built = build()
            self._write(folder, key, model, built)
        plan = _read(folder / RECORD)
        assert plan is not None
        return plan, True

    def timing_cache(self, flavor: Flavor) -> bytes:
        """What builds of this flavor and version measured on this kind of GPU; empty where there were none.

        A file that is not what was written is as none: what it would have told is measured again.
        """
        try:
            saved = read_bounded(self._timing_file(flavor), _MAX_TIMING)
        except (OSError, SchemaError):
            return b""
        digest, content = saved[:32], saved[32:]
        return content if hashlib.sha256(content).digest() == digest else b""

    def save_timing_cache(self, flavor: Flavor, content: bytes) -> None:
        """Keeps what a build measured; of two builds at once the later one's stays, and a full disk keeps none."""
        with suppress(OSError, UserError):
            replace_file(self._timing_file(flavor), hashlib.sha256(content).digest() + content)

    def _timing_file(self, flavor: Flavor) -> Path:
        return self.root / f"timing-{flavor.name}-{flavor.version}-{flavor.target()}.cache"

    def find_unusable(self, versions: Mapping[str, str], sources: Collection[str] | None = None) -> dict[Plan, str]:
        """Plans that nothing here can use, each with the reason.

        Args:
            versions: of the flavors that are installed, by name.
            sources: digests of the graphs of the bundles to keep plans for; None keeps the plans of any bundle.
        """
        reasons = {}
        for plan in self.plans():
            installed = versions.get(plan.key.flavor)
            if plan.key.system != system():
                reasons[plan] = f"for {plan.key.system}"
            elif installed is not None and installed != plan.key.version:
                reasons[plan] = f"{plan.key.flavor} {plan.key.version}, installed is {installed}"
            elif sources is not None and plan.key.source not in sources:
                reasons[plan] = "no bundle has its graph"
            elif error := plan.integrity_error():
                reasons[plan] = error
        return reasons

    def remove(self, plans: Collection[Plan]) -> int:
        """Deletes plans.

        Returns:
            The bytes freed.
        """
        freed = 0
        for plan in plans:
            with self._lock(plan.folder.name):
                freed += _delete(plan.folder)
        return freed

    def remove_leftovers(self) -> int:
        """Deletes what killed builds left, and engines whose record cannot be read.

        Returns:
            The bytes freed.
        """
        freed = 0
        lost = [f for f in self._folders() if os.path.lexists(f / ENGINE) and not _read(f / RECORD)]
        for leftover in [*self._leftovers(), *lost]:
            with self._lock(_plan_of(leftover)):
                if leftover in lost and _read(leftover / RECORD):
                    continue  # built again meanwhile
                freed += _delete(leftover)
        return freed

    def _folders(self) -> list[Path]:
        """Those that may be plans, by name."""
        try:
            return sorted(p for p in self.root.iterdir() if not p.name.startswith(".") and p.is_dir())
        except OSError:
            return []

    def _leftovers(self) -> list[Path]:
        """What builds that were killed left, and what those that go on have written so far."""
        try:
            hidden = [p for p in self.root.iterdir() if p.name.startswith(".") and PARTIAL in p.name]
        except OSError:
            return []
        return sorted(p for p in hidden if p.is_dir() and not p.is_symlink())

    def _of_graph(self, graph: str) -> Iterator[Plan]:
        for folder in self._folders():
            if folder.name.startswith(f"{graph}-") and (plan := _read(folder / RECORD)) and plan.key.graph == graph:
                yield plan

    def _outdated(self, key: PlanKey) -> str | None:
        """Why a plan of the same graph and sizes in the store cannot serve; None where there is no such plan."""
        for plan in self._of_graph(key.graph):
            if plan.key.profiles != key.profiles or plan.key.flavor != key.flavor:
                continue
            if plan.key.source != key.source:
                continue  # another model's
            for what in ("version", "target", "settings", "system", "revision"):
                before, now = getattr(plan.key, what), getattr(key, what)
                if before != now:
                    return f"the plan that is there was built for {what} {_short(before)}, not {_short(now)}"
        return None

    def _write(self, folder: Path, key: PlanKey, model: str, built: BuildResult) -> None:
        staging = new_partial_folder(folder)
        try:
            digest = hashlib.sha256(built.plan)
            with (staging / ENGINE).open("wb") as f:
                size = f.write(built.plan)
                f.flush()
                os.fsync(f.fileno())
            record = _Record(
                key=key,
                model=model,
                size=size,
                sha256=digest.hexdigest(),
                seconds=round(built.seconds, 2),
                peak=built.peak,
                weights=built.weights,
                activations=built.activations,
                fusion=built.fusion,
            )
            (staging / RECORD).write_text(to_json(record), "utf-8")
            remove_folder(folder)
            staging.rename(folder)
        finally:
            remove_folder(staging)

    def _lock(self, name: str, wait: bool = True) -> AbstractContextManager[None]:
        return exclusive(self.root / f".{name}.lock", self.root, wait, "--plans")


def bundle_sources() -> set[str]:
    """The digests of every graph of every bundle under `places.bundles()`."""
    sources: set[str] = set()
    with suppress(FileNotFoundError):
        for folder in places.bundles().iterdir():
            with suppress(BundleError):
                bundle = Bundle.open(folder)
                sources |= {graph_digest(bundle, graph) for graph in bundle.manifest.graphs}
    return sources


def installed_versions() -> dict[str, str]:
    """The versions of the flavors that are installed; none is imported."""
    return installed(installed_flavors())


def _read(record: Path) -> Plan | None:
    """The plan of a record; None where the record is none, or is not that of its folder."""
    try:
        content = decode(read_bounded(record, _MAX_RECORD), dict[str, Any])
        found = convert_closed(content, _Record)
    except (OSError, SchemaError):
        return None
    rows = [row for profile in found.key.profiles for row in profile.values()]
    if not all(len(r["min"]) == len(r["opt"]) == len(r["max"]) for r in rows):
        return None
    if found.key.folder != record.parent.name:
        return None
    values = {f.name: getattr(found, f.name) for f in fields(Plan) if f.name != "folder"}
    return Plan(folder=record.parent, **values)


def _plan_of(leftover: Path) -> str:
    """The name of the plan that a partial folder, or a plan's own, is of."""
    return leftover.name.removeprefix(".").partition(PARTIAL)[0]


def _delete(folder: Path) -> int:
    """Deletes a plan's folder.

    Returns:
        The bytes freed.
    """
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        return 0
    freed = sum(p.lstat().st_size for p in folder.iterdir() if p.is_file())
    remove_folder(folder)
    return freed


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _short(value: Any) -> str:
    text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text[:80]
