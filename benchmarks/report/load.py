"""Results from disk, checked down to their last key, so that no table meets a hole."""

import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from ...errors import UserError
from .. import records
from ..result import Result, default_path, read_result

RECORDS: dict[str, type] = {
    "bench": records.Bench,
    "waterfall": records.Waterfall,
    "parity": records.Parity,
    "consistency": records.Consistency,
    "plans": records.Plans,
    "export": records.Export,
    "whole": records.Whole,
}
_MEASURE = "measure with `cnpp-trt bench`, `cnpp-trt parity` or `cnpp-trt consistency`"


@dataclass(frozen=True)
class Loaded:
    """A result with the name of its file, without the suffix."""

    name: str
    result: Result


def load_results(paths: Iterable[Path] = ()) -> list[Loaded]:
    """The results at these files and in these folders, in their order; by default those of the last runs.

    Raises: UserError where there is none, or one cannot be used.
    """
    given = list(paths)
    files = [file for path in given for file in (_results_in(path) if path.is_dir() else [path])]
    if not given and not (files := _results_in(default_path("bench", "any").parent)):
        raise UserError(f"no results yet: {_MEASURE}")
    if not files:
        raise UserError(f"no results in {', '.join(map(str, given))}: {_MEASURE}")
    return [load(file) for file in dict.fromkeys(files)]


def _results_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def load(path: Path) -> Loaded:
    """Raises: UserError, one line with file and key, where the file is no whole result."""
    result = read_result(path)
    try:
        for name in ("title", "command", "created"):
            _check(getattr(result, name), str, name)
        _check(result.environment, Mapping, "environment")
        _check(result.data, RECORDS[result.kind], "data")
        _check_sense(result)
    except _Unfit as e:
        raise UserError(f"{path}: {e}: measure again with this version") from None
    return Loaded(path.stem, result)


class _Unfit(Exception):
    """What is wrong with a value, and where it is."""


def _check_sense(result: Result) -> None:
    """What types cannot say and every table relies on."""
    data = result.data
    if result.kind == "bench":
        if not data["contenders"] or not any(c["case"]["base"] for c in data["cases"]):
            raise _Unfit("data.cases and data.contenders lack the base case or the baseline")
        names = {c["name"] for c in data["contenders"]}
        for i, case in enumerate(data["cases"]):
            if unknown := case["runs"].keys() - names:
                raise _Unfit(f"data.cases[{i}].runs has {', '.join(sorted(unknown))}, not among data.contenders")
    for where, summary in _summaries(data, "data"):
        if summary["median"] <= 0 or not summary["samples"] or min(summary["samples"]) <= 0:
            raise _Unfit(f"{where} holds a time that is not above 0")


def _summaries(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every `Summary` of seconds, but those of stages, which may take no time at all."""
    if isinstance(value, Mapping):
        if "samples" in value:
            yield where, value
        for key, inner in value.items():
            if key != "stages":
                yield from _summaries(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _summaries(inner, f"{where}[{i}]")


def _check(value: Any, expected: Any, where: str) -> None:
    """Raises _Unfit where a value read from JSON is not of a record's type."""
    origin, arguments = get_origin(expected), get_args(expected)
    if is_typeddict(expected):
        _check_record(value, expected, where)
    elif origin is NotRequired:
        _check(value, arguments[0], where)
    elif origin is Literal:
        if value not in arguments:
            raise _Unfit(f"{where} is {str(value)[:40]!r}, not one of {', '.join(map(repr, arguments))}")
    elif origin in (types.UnionType, Union):
        if value is not None or type(None) not in arguments:
            _check(value, next(a for a in arguments if a is not type(None)), where)
    elif origin is list:
        _check_class(value, list, where)
        for i, item in enumerate(value):
            _check(item, arguments[0], f"{where}[{i}]")
    elif origin is dict:
        _check_class(value, dict, where)
        for key, item in value.items():
            _check(item, arguments[1], f"{where}.{key}")
    else:
        _check_class(value, expected, where)


def _check_record(value: Any, expected: Any, where: str) -> None:
    _check_class(value, dict, where)
    for key, inner in get_type_hints(expected, include_extras=True).items():
        if key in value:
            _check(value[key], inner, f"{where}.{key}")
        elif get_origin(inner) is not NotRequired:
            raise _Unfit(f"{where} lacks {key!r}")


def _check_class(value: Any, expected: type, where: str) -> None:
    fits = isinstance(value, expected)
    if expected in (int, float):
        fits = isinstance(value, (int, float) if expected is float else int) and not isinstance(value, bool)
    if not fits:
        raise _Unfit(f"{where} is a {type(value).__name__}, not a {expected.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Unfit(f"{where} is not a finite number")
