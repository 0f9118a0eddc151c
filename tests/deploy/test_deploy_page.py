"""The commands of docs/deploy.md that need no cluster, as they stand, in an empty folder."""

from pathlib import Path

import cnpp_trt
import pytest
from page_commands import commands_of, run_commands

PAGE = Path(cnpp_trt.__file__).parent / "docs" / "deploy.md"


@pytest.mark.slow
def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    lines = commands_of(PAGE)
    assert len(lines) >= 5
    here = run_commands(lines, tmp_path)
    assert len(list((here / "fetched" / "images").rglob("*.png"))) == 1
    assert (here / "models" / "mini" / "config.pbtxt").is_file()
