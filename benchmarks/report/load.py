"""Results from disk, of which every table can be made."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...messages import printable, some
from ..result import BenchmarkResult, default_path, read_result

_MEASURE = "measure with `cnpp-trt bench`, `cnpp-trt parity` or `cnpp-trt consistency`"


@dataclass(frozen=True)
class Loaded:
    """A result with the name of its file, without the suffix."""

    name: str
    result: BenchmarkResult


def load_results(paths: Iterable[Path] = ()) -> list[Loaded]:
    """The results at these files and in these folders, in their order; by default those of the last runs.

    Raises:
        UserError: there is none, or one cannot be used.
    """
    given = list(paths)
    files = [file for path in given for file in (_results_in(path) if path.is_dir() else [path])]
    if not given and not (files := _results_in(default_path("bench", "any").parent)):
        raise UserError(f"no results yet: {_MEASURE}")
    if not files:
        raise UserError(f"no results in {printable(', '.join(map(str, given)))}: {_MEASURE}")
    return [load(file) for file in dict.fromkeys(files)]


def _results_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def load(path: Path) -> Loaded:
    """Reads a result.

    Raises:
        UserError: the file is no whole result; the message names file and key.
    """
    result = read_result(path)
    try:
        _check_sense(result)
    except _Unfit as e:
        raise UserError(f"{printable(path)}: {e}: measure again with this version") from None
    return Loaded(printable(path.stem), result)


class _Unfit(Exception):
    """What is wrong with a value, and where it is."""


def _check_sense(result: BenchmarkResult) -> None:
    """What types cannot say and every table relies on."""
    data = result.data
    if result.kind == "bench":
        if not data["contenders"] or not any(c["case"]["base"] for c in data["cases"]):
            raise _Unfit("data.cases and data.contenders lack the base case or the baseline")
        names = {c["name"] for c in data["contenders"]}
        for i, case in enumerate(data["cases"]):
            if unknown := case["runs"].keys() - names:
                raise _Unfit(f"data.cases[{i}].runs has {some(unknown)}, not among data.contenders")
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
