"""Records as JSON lines: one file for each process that generates, appended to, resumed, and merged.

The first line of a file says everything that its records depend on; each other line is a record with an `id`. Every
line carries its own checksum. A process that is killed leaves at most a last line without its end, which nobody reads
and the next run overwrites.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CnppError, UserError
from ...messages import one_line, printable
from ...schema import SchemaError, convert_closed, read_bounded

MAX_BYTES = 1 << 30
MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Shard:
    """Every `of`-th prompt, from the `number`-th on; counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """A shard as it is written, as in `2/4`.

        Raises:
            UserError: it is not of this form.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and len(of) < 6 and 1 <= int(number) <= int(of)):
            raise UserError(f"cannot read --shard {text!r}: give 1/4, 2/4, 3/4 and 4/4, one to each process")
        return cls(int(number), int(of))

    def takes(self, index: int) -> bool:
        """Whether this shard generates the prompt of this index."""
        return index % self.of == self.number - 1

    @property
    def file(self) -> str:
        """The name of the file that its records are in."""
        return f"records-{self.number}of{self.of}.jsonl"


def read_records(folder: Path, header: Mapping[str, Any], kind: Any = dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every record of every file in `folder`, by id; one that was made twice counts once.

    Args:
        folder: of the record files.
        header: what they must depend on; JSON-able.
        kind: what each of them is: a TypedDict with an `id`.

    Raises:
        UserError: a file depends on something else, or is damaged.
    """
    merged = {}
    for path in _files(folder):
        lines = _whole_lines(path)
        if lines:
            _require_same(path, _parse(path, 1, lines[0]), header)
        for number, line in enumerate(lines[1:], 2):
            record = _parse(path, number, line)
            try:
                merged[convert_closed(record, kind)["id"]] = record
            except SchemaError as e:
                raise _damaged(path, number, f" ({e})") from None
    return merged


@contextmanager
def appending(folder: Path, shard: Shard, header: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what appends a record to this shard's file, which is whole again before the first one.

    Each record is with the operating system when the call returns: it outlives this process.

    Raises:
        UserError: another process appends to the same file.
        CnppError: it cannot be written.
    """
    from filelock import FileLock, Timeout

    path = folder / shard.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{shard.file}.lock", timeout=0), path.open("ab") as file:
            whole = _whole_bytes(path)
            file.truncate(whole)

            def append(record: Mapping[str, Any]) -> None:
                file.write(json.dumps({**record, "crc32": _checksum(record)}).encode() + b"\n")
                file.flush()

            if not whole:
                append(header)
            yield append
    except Timeout:
        raise UserError(
            f"another process appends to {printable(path)}: wait for it, or share the work with --shard 1/2, 2/2"
        ) from None
    except OSError as e:
        raise CnppError(
            f"cannot write {printable(path)} ({e.strerror or e}): mend that and run again to go on"
        ) from None


def remove_records(folder: Path) -> None:
    """Removes the records of every shard in a folder."""
    for path in _files(folder):
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("records-*of*.jsonl"))


def _whole_bytes(path: Path) -> int:
    """Up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


def _whole_lines(path: Path) -> list[bytes]:
    try:
        return read_bounded(path, MAX_BYTES).split(b"\n")[:-1]
    except (OSError, SchemaError) as e:
        reason = e.strerror if isinstance(e, OSError) else None
        raise UserError(f"cannot read {printable(path)}: {reason or one_line(e)}") from None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(line[:MAX_LINE])
        if content.pop("crc32") == _checksum(content):
            return content
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # no JSON, or another JSON
        pass
    raise _damaged(path, number)


def _damaged(path: Path, number: int, why: str = "") -> UserError:
    what, where = "line" if number > 1 else "file", f"{printable(path)}, line {number}"
    return UserError(f"{where} is damaged{why}: delete the {what} to have it generated again, or give --fresh")


def _checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of its JSON, which is the same text again after it was read back."""
    return zlib.crc32(json.dumps(content, allow_nan=False).encode())


def _require_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))  # tuples are lists there
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        differences = ", ".join(
            f"{printable(name.replace('_', ' '), 40)} {printable(repr(found.get(name)), 80)} "
            f"instead of {printable(repr(wanted.get(name)), 80)}"
            for name in names[:4]
        )
        raise UserError(
            f"{printable(path)} was made with {differences}: "
            "choose another folder with --out, or start again with --fresh"
        )
