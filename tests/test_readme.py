"""The documents' generated tables are what the committed results give; what cannot be filled is refused."""

from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.benchmarks.records import EndToEnd, StageRow
from cnpp_trt.benchmarks.result import BenchmarkResult, read_result
from cnpp_trt.developer.readme_tables import RESULTS, fill, write_readme
from cnpp_trt.errors import UserError

ROOT = Path(__file__).parent.parent
README = """# A readme

Prose with `<!-- results: stages a.json -->` in a line is left alone.

<!-- results: stages a.json -->
what stood here before
<!-- /results -->

More prose.

<!-- results: environment a.json -->
<!-- /results -->
"""
FILLED = """# A readme

Prose with `<!-- results: stages a.json -->` in a line is left alone.

<!-- results: stages a.json -->
| command | seconds | peak memory |
| --- | ---: | ---: |
| export, fp32 | 131 | 7.20 GiB |
<!-- /results -->

More prose.

<!-- results: environment a.json -->
| environment |  |
| --- | --- |
| cpu | A processor |
| torch | 2.13.0 |
| measured | 2026-03-01T12:00:00+00:00 |
| again | cnpp-trt export |
<!-- /results -->
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    stage = StageRow(stage="export, fp32", seconds=131.2, peak_bytes=int(7.2 * 2**30))
    data = EndToEnd(model="full-size", width=512, height=512, steps=2, stages=[stage], pictures=[])
    environment: dict[str, Any] = {"cpu": "A processor", "versions": {"torch": "2.13.0"}}
    BenchmarkResult("end_to_end", "full-size", "cnpp-trt export", data, environment, "2026-03-01T12:00:00+00:00").write(
        tmp_path / "results" / "a.json"
    )
    return tmp_path / "results"


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/precision.md"])
def test_the_tables_are_what_the_results_give(name: str) -> None:
    """When it fails: `make tables`."""
    text = (ROOT / name).read_text("utf-8")
    assert fill(text) == text
    assert "<!-- results: " in text


def test_rows_are_chosen_by_their_first_cells(results: Path) -> None:
    text = "<!-- results: stages a.json: peak memory | export, fp32 -->\n<!-- /results -->\n"
    assert fill(text, results).splitlines()[1:-1] == [
        "| command | peak memory |",
        "| --- | ---: |",
        "| export, fp32 | 7.20 GiB |",
    ]
    assert (
        fill("<!-- results: stages a.json | export, fp32 -->\n<!-- /results -->\n", results).count("| export, fp32 |")
        == 1
    )
    with pytest.raises(UserError, match=r"line 1: no row 'import': there are export, fp32"):
        fill("<!-- results: stages a.json | import -->\n<!-- /results -->\n", results)


def test_columns_are_chosen_by_their_headings(results: Path) -> None:
    text = "<!-- results: stages a.json: peak memory -->\n<!-- /results -->\n"
    assert fill(text, results).splitlines()[1:-1] == [
        "| command | peak memory |",
        "| --- | ---: |",
        "| export, fp32 | 7.20 GiB |",
    ]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_can_be_read(path: Path) -> None:
    from cnpp_trt.benchmarks.report.load import load
    from cnpp_trt.benchmarks.report.tables import markdown_of

    assert "| --- " in markdown_of(load(path).result)
    assert str(Path.home()) not in path.read_text("utf-8") or str(Path.home()) == "/"
    assert read_result(path).environment["commit"]


def test_tables_are_written_anew(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README, "utf-8")
    assert write_readme(readme, results)
    assert readme.read_text("utf-8") == FILLED
    assert not write_readme(readme, results)
    assert fill(FILLED, results) == FILLED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n<!-- results: stages gone.json -->\n<!-- /results -->\n", "line 2: there is no"),
        ("<!-- results: speeed a.json -->\n<!-- /results -->\n", "line 1: no table 'speeed' of the end_to_end result"),
        ("<!-- results: speed a.json -->\n<!-- /results -->\n", "there are stages, pictures, environment"),
        ("<!-- results: stages a.json -->\n", "line 1: no <!-- /results --> follows"),
        ("<!-- results: stages a.json -->\n<!-- results: stages a.json -->\n<!-- /results -->\n",
         "line 2: expected <!-- /results --> for the table of line 1"),
        ("<!-- /results -->\n", "line 1: <!-- /results --> is not <!-- results: TABLE FILE.json: COLUMNS -->"),
        ("<!-- results: stages -->\n", "<!-- results: stages --> is not <!-- results: TABLE FILE.json: COLUMNS -->"),
        ("<!-- results: stages ../a.json -->\n", "is not <!-- results: TABLE FILE.json: COLUMNS -->"),
        ("<!-- results: stages a.json: second -->\n", "no column 'second': there are command; seconds; peak memory"),
    ],
)  # fmt: skip
def test_markers_that_cannot_be_filled(text: str, expected: str, results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, "utf-8")
    with pytest.raises(UserError) as refused:
        write_readme(readme, results)
    said = str(refused.value)
    assert said.startswith(f"{readme}: line ") and expected in said
    assert readme.read_text("utf-8") == text


def test_readme_that_cannot_be_read(results: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe")
    for name in ("none.md", "bytes.md"):
        with pytest.raises(UserError, match=r"^cannot read "):
            write_readme(tmp_path / name, results)
