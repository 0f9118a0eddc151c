"""Rows of a job: JSON lines, CSV, Parquet and folders of Hugging Face `datasets`, one row at a time.

A row that cannot be read is an error with its number, and the rows after it are read all the same. Only as much of a
file is in memory as one row or one group of rows takes.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CnppError, UserError
from ..install import cannot_import
from ..messages import one_line, printable
from ..schema import SchemaError, decode

MAX_LINE = 64 << 20
"""Bytes of one row: an embedded image of a request is far below."""
_ROWS_AT_ONCE = 64  # of Parquet and Arrow: rows may hold images
_TEXTS = ("prompt", "negative_prompt", "scheduler", "id", "condition", "image", "init_image", "file_name")
"""Columns of a CSV whose cells are text as they stand; the others are read as JSON."""
FORMATS = ".jsonl, .ndjson, .csv, .tsv, .parquet, or a folder of Hugging Face datasets"


@dataclass(frozen=True)
class Line:
    """A row as it was read.

    Attributes:
        number: of its line, or of its row where the format has no lines; counted from 1.
        file: the name of its file.
        folder: that relative paths in it begin from.
        value: its fields; None where `error` says why there are none.
    """

    number: int
    file: str
    folder: Path
    value: dict[str, Any] | None
    error: str = ""


def read_lines(jobs: Path) -> Iterator[Line]:
    """Every row of a job, in order.

    Args:
        jobs: a file whose ending says its format, or a folder: what `datasets` wrote with `save_to_disk`, one with
            Parquet files, or one of images with `metadata.jsonl` or `metadata.csv`.

    Raises:
        UserError: there is no such file, or it is of no format that is read here.
        CnppError: a Parquet file, and pyarrow is not installed.
    """
    if jobs.is_dir():
        yield from _folder(jobs)
        return
    kinds = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    read = kinds.get(jobs.suffix.lower())
    if not jobs.is_file():
        raise UserError(f"there is no file {printable(jobs)}: give a job's rows ({FORMATS})")
    if read is None:
        raise UserError(f"cannot tell the format of {printable(jobs)} by its ending: give {FORMATS}")
    try:
        yield from read(jobs)
    except OSError as e:
        raise UserError(f"cannot read {printable(jobs)}: {e.strerror or one_line(e)}") from None


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines with their ends; None for one that is too long, of which nothing is kept."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) <= MAX_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield None


def _json_lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        for number, line in enumerate(_bounded_lines(file), 1):
            if line is None:
                yield Line(number, path.name, path.parent, None, _too_long())
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                value = decode(line, dict[str, Any])
            except SchemaError as e:
                yield Line(number, path.name, path.parent, None, f"it is no JSON object: {e}")
                continue
            yield Line(number, path.name, path.parent, value)


def _csv(path: Path) -> Iterator[Line]:
    before = csv.field_size_limit(MAX_LINE)  # of the whole process
    try:
        with path.open("rb") as file:
            yield from _csv_rows(path, file)
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[Line]:
    # A line that is too long is one that no row can hold: an unbalanced quotation mark would take the rest with it.
    texts = ("\0" if line is None else line.decode("utf-8", "surrogateescape") for line in _bounded_lines(file))
    reader = csv.reader(texts, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield Line(start, path.name, path.parent, None, f"it is no row of a CSV: {one_line(e)}")
            start = reader.line_num + 1
            continue
        number, start = start, reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = [cell.strip().removeprefix("\ufeff") for cell in cells]
            if len(set(header)) != len(header) or "" in header:
                raise UserError(f"{printable(path)}: the first line must have a name for each column, each once")
            continue
        value, error = _csv_value(header, cells)
        yield Line(number, path.name, path.parent, value, error)


def _csv_value(header: list[str], cells: list[str]) -> tuple[dict[str, Any] | None, str]:
    """(the fields of a row, "") or (None, what is wrong with it); an empty cell is a field that is left out."""
    if len(cells) != len(header):
        return None, f"it has {len(cells)} cells, and the first line {len(header)}"
    value: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell):
            return None, f"{printable(name, 40)} is not UTF-8: save the file as UTF-8"
        if "\0" in cell:
            return None, "it holds a NUL character, or is too long"
        if name in _TEXTS:
            if cell or name == "prompt":
                value[name] = cell
        elif cell.strip():
            word = cell.strip()
            try:
                value[name] = json.loads(word.lower() if word in ("True", "False", "TRUE", "FALSE") else word)
            except (ValueError, RecursionError):
                return None, f"{printable(name, 40)} is neither a number, true, false nor JSON: {printable(word, 40)}"
    return value, ""


def _parquet(path: Path) -> Iterator[Line]:
    pyarrow_parquet = _import("pyarrow.parquet")
    try:
        with pyarrow_parquet.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches(batch_size=_ROWS_AT_ONCE))
    except UserError:
        raise
    except (ValueError, OSError) as e:  # ArrowInvalid is a ValueError
        raise UserError(f"cannot read {printable(path)} as Parquet: {one_line(e)}") from None


def _arrow(path: Path) -> Iterator[Line]:
    """A file that `datasets` wrote: Arrow's stream format."""
    pyarrow = _import("pyarrow")
    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from _batches(path, (part for batch in stream for part in _parts(batch)))
    except (ValueError, OSError) as e:
        raise UserError(f"cannot read {printable(path)} as Arrow: {one_line(e)}") from None


def _parts(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        yield batch.slice(start, _ROWS_AT_ONCE)


def _batches(path: Path, batches: Iterator[Any]) -> Iterator[Line]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Line(number, path.name, path.parent, _present(value))


def _present(value: Any) -> Any:
    """Without the keys that are null: a table has every column in every row."""
    if isinstance(value, dict):
        return {name: _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _folder(folder: Path) -> Iterator[Line]:
    if (folder / "dataset_dict.json").is_file():
        names = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(f"{printable(folder)} holds several splits: give one of them ({printable(', '.join(names))})")
    if (folder / "state.json").is_file():
        for path in sorted(folder.glob("*.arrow")):
            yield from _arrow(path)
        return
    for name, read in (("metadata.jsonl", _json_lines), ("metadata.csv", _csv)):
        if (folder / name).is_file():
            for line in read(folder / name):
                yield _named(line)
            return
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"{printable(folder)} holds no rows that are read here: give {FORMATS}")
    for path in files:
        yield from _parquet(path)


def _named(line: Line) -> Line:
    """With `image` for `file_name`, as folders of images call it."""
    if line.value is None or "file_name" not in line.value or "image" in line.value:
        return line
    value = {"image" if name == "file_name" else name: inner for name, inner in line.value.items()}
    return Line(line.number, line.file, line.folder, value)


def _too_long() -> str:
    return f"it has more than {MAX_LINE:,} bytes: give images as files"


def _import(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as e:
        raise CnppError(cannot_import("Parquet", e, "pyarrow")) from None
