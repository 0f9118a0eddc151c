"""What a job leaves when it ends: one line for each image as JSON and Parquet, and tar shards for training.

All of them are made anew from the records of the requests, in the order of the rows, so they are the same bytes
however the images came to be there.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from ..conditions import CONDITIONS
from ..errors import CnppError
from ..files import replacing
from ..install import cannot_import
from ..messages import one_line, printable
from ..schema import to_json
from .outputs import Outputs, RequestOfRecord
from .planning import JobPlan, PlannedRow

RESULTS = "results.jsonl"
PARQUET = "results.parquet"
SHARDS = "shards"
_ROWS_AT_ONCE = 1000
_LONGEST_TIMING = 1 << 16  # bytes of a line: a batch has 16 requests at most

ResultLine = dict[str, Any]


def write_results(plan: JobPlan, outputs: Outputs, *, parquet: bool = False, shard_size: int | None = None) -> None:
    """Writes `results.jsonl`, with `parquet` also `results.parquet`, and tar files of `shard_size` images each.

    Raises:
        CnppError: a file cannot be written, or pyarrow is not installed.
    """
    try:
        with replacing(outputs.folder / RESULTS) as file:
            for line, _ in result_lines(plan, outputs):
                file.write(to_json(line, None).encode())
        if parquet:
            with replacing(outputs.folder / PARQUET) as file:
                _write_parquet((line for line, _ in result_lines(plan, outputs)), file)
        if shard_size is not None:
            _write_shards(plan, outputs, shard_size)
    except OSError as e:
        raise CnppError(
            f"cannot write into {printable(outputs.folder)} ({e.strerror or one_line(e)}): mend that and run again"
        ) from None


def result_lines(plan: JobPlan, outputs: Outputs) -> Iterator[tuple[ResultLine, RequestOfRecord | None]]:
    """The line of each image with the record of its request, in the order of the rows.

    A row that is wrong or failed has one line with its error; a row whose request an earlier one has, its own lines
    with the earlier one's images.
    """
    for row in plan.rows():
        record = outputs.read(row.key) if row.key and not row.error else None
        if record is None:
            yield _line(row, row.error or "it was not drawn"), None
            continue
        for index in range(len(record.images)):
            yield _line(row, "", record, index), record


def _line(row: PlannedRow, error: str, record: RequestOfRecord | None = None, index: int = 0) -> ResultLine:
    image = None if record is None else record.images[index]
    return {
        "line": row.line,
        "file_of_rows": row.file,
        "id": row.id or None,
        "request": row.key or None,
        "index": None if image is None else index,
        "file": image and image.file,
        "pixels_sha256": image and image.pixels_sha256,
        "prompt": record and record.prompt,
        "seed": image and image.seed,
        "scores": image.scores if image else {},
        "tries": image and image.tries,
        "passed": image and image.passed,
        "controls": {} if record is None else {c.condition: c.file for c in record.controls},
        "notes": [] if record is None else record.notes,
        "duplicate_of": row.duplicate_of,
        "error": error or None,
    }


def require_parquet() -> None:
    """Finds out whether Parquet can be written here, before the work whose results it gets.

    Raises:
        CnppError: pyarrow is not installed, with the command that brings it.
    """
    try:
        import_module("pyarrow.parquet")
    except ImportError as e:
        raise CnppError(cannot_import("--parquet", e, "pyarrow")) from None


def _write_parquet(lines: Iterator[ResultLine], file: IO[bytes]) -> None:
    # By name: who has no pyarrow checks the types of this module too.
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    text, number = pyarrow.string(), pyarrow.int64()
    by_condition = pyarrow.struct([(name, pyarrow.float64()) for name in CONDITIONS])
    files = pyarrow.struct([(name, text) for name in CONDITIONS])
    schema = pyarrow.schema(
        {
            "line": number,
            "file_of_rows": text,
            "id": text,
            "request": text,
            "index": number,
            "file": text,
            "pixels_sha256": text,
            "prompt": text,
            "seed": pyarrow.uint64(),
            "scores": by_condition,
            "tries": number,
            "passed": pyarrow.bool_(),
            "controls": files,
            "notes": pyarrow.list_(text),
            "duplicate_of": number,
            "error": text,
        }
    )
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        held: list[ResultLine] = []
        for line in lines:
            held.append(line)
            if len(held) == _ROWS_AT_ONCE:
                writer.write_table(pyarrow.Table.from_pylist(held, schema))
                held.clear()
        writer.write_table(pyarrow.Table.from_pylist(held, schema))


def _write_shards(plan: JobPlan, outputs: Outputs, size: int) -> None:
    """Tar files as `webdataset` reads them: of each image its file, its control images and a JSON.

    Images that a filter did not let through and duplicates are left out.
    """
    folder = outputs.folder / SHARDS
    folder.mkdir(exist_ok=True)
    samples = (
        (line, record)
        for line, record in result_lines(plan, outputs)
        if record is not None and line["passed"] and line["duplicate_of"] is None
    )
    written: set[str] = set()
    sample = next(samples, None)
    while sample is not None:
        name = f"shard-{len(written):06d}.tar"
        with replacing(folder / name) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(size):
                if sample is None:
                    break
                _add_sample(tar, outputs.folder, *sample)
                sample = next(samples, None)
        written.add(name)
    for path in folder.glob("shard-*.tar"):  # of a job that had more images
        if path.name not in written:
            path.unlink()


def _add_sample(tar: tarfile.TarFile, folder: Path, line: ResultLine, record: RequestOfRecord) -> None:
    name = f"{line['request']}-{line['index']}"
    image = folder / line["file"]
    _add(tar, f"{name}{image.suffix}", image.read_bytes())
    conditions: list[str] = []
    for control in record.controls:
        number = conditions.count(control.condition)  # two controls of one condition have names of their own
        conditions.append(control.condition)
        _add(tar, f"{name}.{control.condition}{number or ''}.png", (folder / control.file).read_bytes())
    kept = ("id", "request", "index", "pixels_sha256", "prompt", "seed", "scores", "tries")
    content = {**{key: line[key] for key in kept}, "conditions": conditions}
    _add(tar, f"{name}.json", to_json(content, None).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner, time and mode are the same for everybody
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@contextmanager
def timings(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends lines of JSON to a file: how long batches took, the one thing that differs from run to run.

    A last line that a killed process left without its end is removed first.
    """
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _LONGEST_TIMING))
        file.truncate(start + file.read().rfind(b"\n") + 1)

        def append(line: dict[str, Any]) -> None:
            file.write(to_json(line, None).encode())
            file.flush()

        yield append
