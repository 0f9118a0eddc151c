"""What a kind of fuzzed input is, and where its inputs are tried."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Place:
    """Attributes:
    folder: empty, for whatever the kind writes.
    bundle: of the tiny model, with `seg` and `depth`; read only.
    checkpoint: that it was exported from; read only.
    """

    folder: Path
    bundle: Path
    checkpoint: Path


@dataclass(frozen=True)
class Kind:
    """Attributes:
    inputs: makes them.
    attempt: tries one; raises a `CnppError` where it is refused.
    show: an input in few words.
    """

    inputs: SearchStrategy[Any]
    attempt: Callable[[Any], object]
    show: Callable[[Any], str] = lambda value: repr(value)[:2_000]


Maker = Callable[[Place], Kind]


def put(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def difference(valid: bytes) -> Callable[[Any], str]:
    """Shows an input by where it differs from a valid one."""

    def show(value: Any) -> str:
        content = value[-1] if isinstance(value, tuple) else value
        if not isinstance(content, bytes):
            return repr(value)[:2_000]
        at = next(
            (i for i, (a, b) in enumerate(zip(content, valid, strict=False)) if a != b), min(len(content), len(valid))
        )
        rest = repr(value[:-1]) if isinstance(value, tuple) else ""
        return f"{rest} from byte {at} of {len(valid)}: {content[max(0, at - 60) : at + 160]!r} ({len(content)} bytes)"

    return show
