"""A table as text, whichever page it is for: Markdown and HTML are two writings of the same cells."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...errors import UserError
from ...messages import printable

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """`number` stands to the right, `text` and `code` to the left; a `note` is a sentence, and may wrap."""

    header: str
    kind: Literal["number", "text", "code", "note"] = "number"


@dataclass(frozen=True)
class Table:
    """Rows under columns, before they are written as HTML or Markdown.

    Attributes:
        rows: a cell for each column; `ABSENT` or empty where there is nothing to say.
        title: on a page; the README has its own words.
        total: whether the last row sums up the others.
    """

    block: ClassVar[str] = "table"
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    total: bool = False

    def only(self, headers: Sequence[str]) -> "Table":
        """The first column and those with these headings, in this order.

        Raises:
            UserError: there is no such column.
        """
        places = {column.header: i for i, column in enumerate(self.columns)}
        for header in headers:
            if header not in places:
                shown = "; ".join(places)
                raise UserError(f"no column {printable(repr(header), 80)}: there are {printable(shown, 400)}")
        return self._at([0, *(places[header] for header in headers)])

    def only_rows(self, titles: Sequence[str]) -> "Table":
        """The rows with these first cells, in this order.

        Raises:
            UserError: there is no such row.
        """
        found = {row[0]: row for row in self.rows}
        for title in titles:
            if title not in found:
                shown = "; ".join(found)
                raise UserError(f"no row {printable(repr(title), 80)}: there are {printable(shown, 400)}")
        return replace(self, rows=tuple(found[title] for title in titles))

    def _at(self, places: Sequence[int]) -> "Table":
        """The columns at these indices."""
        return replace(
            self,
            columns=tuple(self.columns[i] for i in places),
            rows=tuple(tuple(row[i] for i in places) for row in self.rows),
        )

    def markdown(self) -> str:
        """The table in Markdown."""
        rows = [[_markdown_cell(cell, c) for cell, c in zip(row, self.columns, strict=True)] for row in self.rows]
        if self.total:
            rows[-1] = [f"**{escape(cell)}**" if cell else "" for cell in self.rows[-1]]
        headers = [escape(c.header) for c in self.columns]
        rules = ["---:" if c.kind == "number" else "---" for c in self.columns]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rules, *rows))


def make_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], title: str = "", total: bool = False) -> Table:
    """Without the columns in which no row says anything."""
    table = Table(tuple(columns), tuple(tuple(row) for row in rows), title, total)
    return table._at([i for i in range(len(columns)) if not i or any(row[i] not in ("", ABSENT) for row in table.rows)])


def escape(text: str) -> str:
    """Plain text that Markdown takes for nothing else: no HTML, links, emphasis, code or further cells."""
    plain = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", plain)


def code(text: str) -> str:
    """As code, for a table's cell or a line."""
    plain = _line(text.replace("`", "'"))
    return f"`{plain.replace('|', chr(92) + '|')}`" if plain else ""


def _line(text: str) -> str:
    """The whole text, on one line, printable: names of models and conditions come from other people's files."""
    return printable(text, 12 * len(text) + 1)


def _markdown_cell(cell: str, column: Column) -> str:
    return code(cell) if column.kind == "code" and cell != ABSENT else escape(cell)
