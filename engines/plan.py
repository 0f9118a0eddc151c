"""A TensorRT plan: what it depends on, the sizes that it takes, and its record in the store."""

import hashlib
import json
import platform
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..bundles.bundle import Bundle
from ..bundles.manifest import GraphName
from ..errors import BackendError, UserError
from ..files import sha256_of
from ..schema import Meta, SchemaError, read_bounded
from .flavor import Flavor
from .fusion import FusionReport

ENGINE = "plan.engine"

# Raised by whoever changes what is built from the same settings: older plans are then built anew.
REVISION = 2

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Sizes that a plan takes: exactly one where the three are equal."""

    min: Shape
    opt: Shape
    max: Shape

    def __contains__(self, shape: object) -> bool:
        return (
            isinstance(shape, tuple)
            and len(shape) == len(self.min)
            and all(low <= s <= high for low, s, high in zip(self.min, shape, self.max, strict=True))
        )


# An optimization profile: the range of every input, by name.
Profile = Mapping[str, Range]


_RANGES = {"optimization_level": (0, 5), "aux_streams": (0, 16), "tiling_level": (0, 3), "timing_iterations": (1, 100)}


@dataclass(frozen=True)
class BuilderSettings:
    """TensorRT's builder settings; None leaves TensorRT's own default. The images are the same up to rounding.

    Attributes:
        optimization_level: 0 to 5, how long TensorRT searches (`builder_optimization_level`).
        aux_streams: 0 to 16, how many streams beside the launch's own one engine may use (`max_aux_streams`).
        tiling_level: 0 to 3, how long it searches for tiles that stay in the cache (`tiling_optimization_level`).
        timing_iterations: 1 to 100, how often it times each kernel (`avg_timing_iterations`).
    """

    optimization_level: int | None = None
    aux_streams: int | None = None
    tiling_level: int | None = None
    timing_iterations: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name.replace('_', ' ')} {value} cannot be used: {low} to {high}")

    def __str__(self) -> str:
        given = [f"{name.replace('_', ' ')} {value}" for name, value in asdict(self).items() if value is not None]
        return ", ".join(given) or "TensorRT's defaults"


@dataclass(frozen=True)
class BuildResult:
    """What a build gives.

    Attributes:
        plan: the serialized engine (a buffer).
        weights, activations: device bytes that the plan says it needs.
        timing_cache: to give to the next build; None where the flavor has none here.
        peak: the process's peak memory so far, in bytes.
    """

    plan: Any
    fusion: FusionReport
    seconds: float
    weights: int
    activations: int
    timing_cache: bytes | None
    peak: int


_Word = Annotated[str, Meta(min_length=1, max_length=128)]
Count = Annotated[int, Meta(ge=0, le=2**50)]
_Sizes = Annotated[list[Annotated[int, Meta(ge=0, le=2**31)]], Meta(max_length=8)]


class Row(TypedDict):
    """The sizes of one input in one profile."""

    min: _Sizes
    opt: _Sizes
    max: _Sizes


@dataclass(frozen=True)
class PlanKey:
    """Everything a plan depends on.

    Attributes:
        source: SHA-256 over the digests of the graph's ONNX files.
        target: what it was built for, as `Flavor.target` says.
        profiles: the sizes it takes, as JSON-able rows.
        revision: of the builder's own code.
    """

    graph: GraphName
    source: _Word
    flavor: _Word
    version: _Word
    target: _Word
    system: _Word
    profiles: Annotated[
        tuple[Annotated[dict[_Word, Row], Meta(max_length=256)], ...],
        Meta(max_length=256),
    ]
    settings: Annotated[dict[_Word, Annotated[int, Meta(ge=0, le=100)] | None], Meta(max_length=16)]
    revision: Count = REVISION

    @classmethod
    def of(
        cls, bundle: Bundle, graph: str, flavor: Flavor, profiles: Sequence[Profile], settings: BuilderSettings
    ) -> "PlanKey":
        """The key of a graph's plan for the target of `flavor`."""
        return cls(
            graph=graph,
            source=graph_digest(bundle, graph),
            flavor=flavor.name,
            version=flavor.version,
            target=flavor.target(),
            system=system(),
            # Through JSON, so that a key is the same before it is written and after.
            profiles=tuple(json.loads(json.dumps([{name: asdict(r) for name, r in p.items()} for p in profiles]))),
            # Only what was given beside the level, so that plans from before there were other settings stay found.
            settings={
                name: value
                for name, value in asdict(settings).items()
                if value is not None or name == "optimization_level"
            },
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the whole key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> str:
        """The name of the plan's folder."""
        return f"{self.graph}-{self.digest[:16]}"


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan of the store.

    Attributes:
        model: the bundle it was built from, for people.
        size, sha256: of the engine file.
        seconds, peak: what building took: time, and the process's peak memory in bytes.
        weights, activations: device bytes it needs.
    """

    folder: Path
    key: PlanKey
    model: str
    size: int
    sha256: str
    seconds: float
    peak: int
    weights: int
    activations: int
    fusion: FusionReport

    @property
    def engine(self) -> Path:
        """The path of the engine file."""
        return self.folder / ENGINE

    def profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The index of the first profile that takes inputs of these shapes; one of fixed sizes before a range."""
        found = [i for i, p in enumerate(self._profiles()) if all(shapes.get(name) in r for name, r in p.items())]
        return min(found, key=lambda i: any(r.min != r.max for r in self._profiles()[i].values()), default=None)

    def _profiles(self) -> list[dict[str, Range]]:
        return [
            {name: Range(tuple(r["min"]), tuple(r["opt"]), tuple(r["max"])) for name, r in profile.items()}
            for profile in self.key.profiles
        ]

    def integrity_error(self) -> str | None:
        """Reads the engine file whole and compares it with its record.

        Returns:
            What is wrong with the file; None where it is as it was built.
        """
        try:
            status = self.engine.stat()
        except OSError:
            return f"{self.engine} is missing"
        if status.st_size != self.size:
            return f"{self.engine} has {status.st_size} bytes instead of {self.size}"
        if not stat.S_ISREG(status.st_mode):
            return f"{self.engine} is no file"
        if sha256_of(self.engine) != self.sha256:
            return f"{self.engine} changed since it was built"
        return None

    def header(self, nbytes: int) -> bytes:
        """The first bytes of the engine; empty where it cannot be read, which `read` then says."""
        try:
            with self.engine.open("rb") as file:
                return file.read(nbytes)
        except OSError:
            return b""

    def read(self) -> bytes:
        """Reads the engine's bytes.

        Raises:
            BackendError: the bytes are not those that were built.
        """
        try:
            content = read_bounded(self.engine, self.size)
        except SchemaError:
            content = b""
        except OSError as e:
            raise BackendError(f"cannot read {self.engine} ({e.strerror}): run `cnpp-trt build` again") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise BackendError(f"{self.engine} is damaged and was not loaded: run `cnpp-trt build` again")
        return content


def graph_digest(bundle: Bundle, graph: str) -> str:
    """SHA-256 over the recorded digests of the graph's files: its ONNX file and the weights beside it."""
    parts = [entry["sha256"] for entry in bundle.graph_files(graph).values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def system() -> str:
    """A plan runs only on the operating system and processor family that it was built on."""
    return f"{platform.system()}-{platform.machine()}"
