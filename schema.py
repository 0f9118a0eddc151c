"""Records from files, checked: closed sets of keys, types, ranges and lengths, as msgspec models.

A model of a file is a subclass of `Record` with annotated fields; ranges are `Annotated[int, Meta(ge=…, le=…)]`. A file
is read once, bounded, and is a record afterwards or a one-line UserError.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Meta

from .errors import UserError
from .messages import one_line, printable

MAX_JSON_BYTES = 64 << 20

T = TypeVar("T")


class Record(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON object with these keys and no others."""


class FrozenRecord(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A `Record` that never changes: a key of a dictionary, or part of what is."""


class SchemaError(ValueError):
    """What of a record is wrong, and where, in one line: `… at $.files`."""


def decode(content: bytes | str, kind: type[T]) -> T:
    """A record from its JSON (RFC 8259: no NaN, no Infinity).

    Raises:
        SchemaError: the message says what is wrong and what to do.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError, UnicodeError) as e:
        raise SchemaError(one_line(e)) from None


def convert(value: Any, kind: type[T]) -> T:
    """A record from what is JSON already: dicts, lists, strings, numbers.

    Raises:
        SchemaError: the message says what is wrong and what to do.
    """
    try:
        return msgspec.convert(value, kind)
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as e:
        raise SchemaError(one_line(e)) from None


def builtins(record: Any) -> Any:
    """A record as dicts, lists, strings and numbers, its keys in their order."""
    return msgspec.to_builtins(record)


def convert_closed(value: Any, kind: type[T]) -> T:
    """`convert` for what is made of TypedDicts and dataclasses, of which msgspec drops the keys that they do not have.

    Raises:
        SchemaError: also for an unknown key.
    """
    record = convert(value, kind)
    _require_known(value, builtins(record), "$")
    return record


def _require_known(given: Any, known: Any, where: str) -> None:
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in known:
                raise SchemaError(f"Object contains unknown field `{printable(key, 40)}` - at `{where}`")
            _require_known(value, known[key], f"{where}.{printable(key, 40)}")
    elif isinstance(given, list | tuple):
        for i, (value, of_known) in enumerate(zip(given, known, strict=True)):
            _require_known(value, of_known, f"{where}[{i}]")


def to_json(record: Any, indent: int | None = 1) -> str:
    """The JSON of a record, keys in their order.

    Raises:
        ValueError: for a number that JSON has not.
    """
    return json.dumps(builtins(record), indent=indent, allow_nan=False) + "\n"


def read_bounded(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read (FileNotFoundError too).
        SchemaError: it is no such file.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as f:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SchemaError("it is not a regular file")
        if status.st_size > limit:
            raise SchemaError(f"it has {status.st_size:,} bytes, more than {limit:,}")
        return f.read(limit)


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object of a file of another program's, whose keys are open: a model's `config.json`.

    Numbers may be NaN or infinite, as Python writes them.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(read_bounded(path, limit))
    except (OSError, ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else one_line(e)
        raise UserError(f"cannot read {printable(path)}: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)} holds no JSON object")
    return content


def finite(value: Any) -> bool:
    """Whether every number in a JSON-able value is finite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


__all__ = [
    "FrozenRecord",
    "Meta",
    "Record",
    "SchemaError",
    "builtins",
    "convert",
    "convert_closed",
    "decode",
    "finite",
    "read_bounded",
    "read_object",
    "to_json",
]
