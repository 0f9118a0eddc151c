"""All rows of a job on the disk: which requests there are, each once, and in which batches they run.

A database of SQLite holds them, so that memory does not grow with the rows. It lies in the job's folder, belongs to
one process and goes with it: a job that goes on reads its rows again and looks at what exists.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schema import decode, to_json
from .reading import Line
from .rows import Job

_SCHEMA = """
CREATE TABLE rows (
    number INTEGER PRIMARY KEY, line INTEGER, file TEXT, id TEXT, key TEXT, first INTEGER, error TEXT);
CREATE TABLE jobs (
    key TEXT PRIMARY KEY, first INTEGER, grouped INTEGER, images INTEGER, content BLOB, batch INTEGER,
    done INTEGER DEFAULT 0, error TEXT DEFAULT '') WITHOUT ROWID;
CREATE TABLE groups (name TEXT PRIMARY KEY, number INTEGER);
"""


@dataclass(frozen=True)
class PlannedRow:
    """A row as it was read.

    Attributes:
        line, file: where it stands.
        id: what the row calls itself, or empty.
        key: of its request; empty where the row is wrong.
        duplicate_of: the line of the first row with this request; None where it is this one.
        error: what is wrong with the row, or why its request could not be drawn.
    """

    line: int
    file: str
    id: str
    key: str
    duplicate_of: int | None
    error: str


@dataclass(frozen=True)
class Counts:
    """How many there are.

    Attributes:
        rows: of the file, wrong ones included.
        wrong: rows that cannot be drawn.
        duplicates: rows whose request an earlier row has.
        requests: different ones.
        done: of these, those whose files are there.
        images: of all requests.
        images_done: of the requests that are done.
        batches: of all requests.
        groups: loop shapes: what cannot run together.
    """

    rows: int
    wrong: int
    duplicates: int
    requests: int
    done: int
    images: int
    images_done: int
    batches: int
    groups: int


class JobPlan:
    """The rows and requests of a job.

    Args:
        folder: for the database; an empty one.
        batch_size: images of a batch at most; a request with more is a batch of its own.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self._batch_size = batch_size
        # Nobody else opens it and nobody needs it after a crash: no lock, no journal, no waiting for the disk.
        self._base = sqlite3.connect(f"{(folder / 'plan.sqlite').absolute().as_uri()}?nolock=1", uri=True)
        self._base.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8192; {_SCHEMA}")
        self._rows = 0

    def add(self, line: Line, found: Job | str) -> None:
        """Adds a row: its job, or what is wrong with it."""
        self._rows += 1
        given = line.value.get("id", "") if line.value else ""
        name = str(given).encode("utf-8", "replace").decode() if isinstance(given, str | int) else ""
        values: tuple[Any, ...]
        if isinstance(found, str):
            values = (self._rows, line.number, line.file, name, "", None, found)
        else:
            first = self._add_job(found)
            values = (self._rows, line.number, line.file, name, found.key, first, "")
        self._base.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _add_job(self, job: Job) -> int:
        """The number of the first row that has this job."""
        found = self._base.execute("SELECT first FROM jobs WHERE key = ?", (job.key,)).fetchone()
        if found:
            return int(found[0])
        self._base.execute("INSERT OR IGNORE INTO groups SELECT ?, count(*) FROM groups", (job.group,))
        self._base.execute(
            "INSERT INTO jobs (key, first, grouped, images, content) "
            "VALUES (?, ?, (SELECT number FROM groups WHERE name = ?), ?, ?)",
            (job.key, self._rows, job.group, job.images, to_json(job, None)),
        )
        return self._rows

    def arrange(self) -> None:
        """Puts the requests into batches: group by group, each in the order of the rows.

        So what runs together follows from the rows alone, and rows that are appended later change at most the last
        batch of each group.
        """
        self._base.executescript("CREATE INDEX order_of_jobs ON jobs (grouped, first)")
        number, held, before = -1, 0, None
        for key, group, images in self._all("SELECT key, grouped, images FROM jobs ORDER BY grouped, first"):
            if group != before or held + images > self._batch_size:
                number, held, before = number + 1, 0, group
            held += images
            self._base.execute("UPDATE jobs SET batch = ? WHERE key = ?", (number, key))
        self._base.executescript("CREATE INDEX batch_of_jobs ON jobs (batch, first)")

    def mark_done(self, keys: Iterable[str]) -> None:
        """Notes that the files of these requests are there."""
        self._base.executemany("UPDATE jobs SET done = 1, error = '' WHERE key = ?", ((key,) for key in keys))

    def mark_failed(self, key: str, error: str) -> None:
        """Notes why a request could not be drawn."""
        self._base.execute("UPDATE jobs SET error = ? WHERE key = ?", (error, key))

    def requests(self) -> Iterator[str]:
        """The keys of all requests."""
        for (key,) in self._all("SELECT key FROM jobs ORDER BY batch, first"):
            yield key

    def pending(self) -> Iterator[list[Job]]:
        """The batches of which something is missing, whole, in their order."""
        last = self._base.execute("SELECT max(batch) FROM jobs").fetchone()[0]
        for number in range(-1 if last is None else last + 1):
            found = self._base.execute(
                "SELECT content, done FROM jobs WHERE batch = ? ORDER BY first", (number,)
            ).fetchall()
            if not all(done for _, done in found):
                yield [decode(content, Job) for content, _ in found]

    def rows(self) -> Iterator[PlannedRow]:
        """Every row, in the order of the file."""
        query = (
            "SELECT r.line, r.file, r.id, r.key, r.number, r.first, r.error, coalesce(j.error, ''), f.line "
            "FROM rows r LEFT JOIN jobs j ON j.key = r.key LEFT JOIN rows f ON f.number = r.first ORDER BY r.number"
        )
        for line, file, name, key, number, first, wrong, failed, first_line in self._all(query):
            duplicate_of = first_line if key and first != number else None
            yield PlannedRow(line, file, name, key, duplicate_of, wrong or failed)

    def counts(self) -> Counts:
        """How many there are of everything."""
        rows, wrong, keyed = self._base.execute(
            "SELECT count(*), total(key = ''), total(key != '') FROM rows"
        ).fetchone()
        jobs, done, images, images_done, last = self._base.execute(
            "SELECT count(*), total(done), total(images), total(images * done), max(batch) FROM jobs"
        ).fetchone()
        (groups,) = self._base.execute("SELECT count(*) FROM groups").fetchone()
        return Counts(
            rows=rows,
            wrong=int(wrong),
            duplicates=int(keyed) - jobs,
            requests=jobs,
            done=int(done),
            images=int(images),
            images_done=int(images_done),
            batches=0 if last is None else last + 1,
            groups=groups,
        )

    def close(self) -> None:
        """Closes the database."""
        self._base.close()

    def _all(self, query: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a query; the table may be changed meanwhile, so they are read in parts by a cursor of its own."""
        cursor = self._base.cursor()
        cursor.execute(query)
        while rows := cursor.fetchmany(1000):
            yield from rows
