"""The commands of docs/scale.md, as they stand, in an empty folder."""

from pathlib import Path

import pytest
from page_commands import commands_of, run_commands

PAGE = Path(__file__).parent.parent.parent / "docs" / "scale.md"
NEEDED = {"--ray": "ray", "--parquet": "pyarrow"}


@pytest.mark.slow
def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    lines = commands_of(PAGE)
    assert len(lines) >= 8
    here = run_commands(lines, tmp_path, NEEDED)
    assert len(list((here / "pictures" / "images").rglob("*.png"))) == 4
