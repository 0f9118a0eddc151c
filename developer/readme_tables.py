"""The documents' tables, from committed results: what stands between two markers is written by `make tables`.

<!-- results: TABLE FILE.json -->
<!-- results: TABLE FILE.json: COLUMN; COLUMN | ROW; ROW -->
<!-- /results -->

Columns are named by their headings, and the first one is always there; rows by what stands in it. Without names all of
them are there.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ..benchmarks.report import tables
from ..benchmarks.report.load import load
from ..benchmarks.report.write import write_whole
from ..errors import UserError
from ..messages import printable
from ..schema import read_bounded

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_OPEN = re.compile(
    r"<!-- *results: *(?P<table>[\w-]+) +(?P<file>[\w.-]+\.json)(: *(?P<columns>[^|]+?))?( *\| *(?P<rows>.+?))? *-->"
)
_ANY = re.compile(r"<!-- */?results\b.*-->")
_CLOSE = "<!-- /results -->"


def write_readme(path: Path, results: Path = RESULTS) -> bool:
    """Fills the tables of a file from results.

    Returns:
        Whether the file changed.

    Raises:
        UserError: the file, a marker, a result or a table cannot be used.
    """
    try:
        text = read_bounded(path).decode("utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {printable(path)}: {printable(e)}") from None
    try:
        filled = fill(text, results)
    except UserError as e:
        raise UserError(f"{printable(path)}: {e}") from None
    if filled != text:
        write_whole(path, filled.encode())
    return filled != text


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with each marked table made anew from its result in the folder `results`.

    Raises:
        UserError: with the line of a marker that is not whole, or names a file or table that there is not.
    """
    return "".join(_filled(text, results))


def _filled(text: str, results: Path) -> Iterator[str]:
    opened = 0  # the line of the marker whose table is being replaced; 0 outside of one
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        marker = line.strip()
        if not _ANY.fullmatch(marker):
            if not opened:
                yield line
        elif opened:
            if marker != _CLOSE:
                raise UserError(f"line {number}: expected {_CLOSE} for the table of line {opened}")
            opened = 0
            yield line
        else:
            yield line
            yield _table(marker, number, results)
            opened = number
    if opened:
        raise UserError(f"line {opened}: no {_CLOSE} follows")


def _table(marker: str, number: int, results: Path) -> str:
    found = _OPEN.fullmatch(marker)
    if found is None:
        raise UserError(f"line {number}: {printable(marker)} is not <!-- results: TABLE FILE.json: COLUMNS -->")
    try:
        table = tables.make(found["table"], load(results / found["file"]).result)
        if found["columns"]:
            table = table.only(_names(found["columns"]))
        if found["rows"]:
            table = table.only_rows(_names(found["rows"]))
        return table.markdown() + "\n"
    except UserError as e:
        raise UserError(f"line {number}: {e}") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";")]


def main() -> None:
    """Rewrites the tables of each file that is named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m cnpp_trt.developer.readme_tables", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        try:
            print(f"{file}: {'rewritten' if write_readme(file) else 'unchanged'}")
        except UserError as e:
            parser.error(str(e))


if __name__ == "__main__":
    main()
