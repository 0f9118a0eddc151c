"""Every Python example of the documents runs, as it stands, in a folder with the files it names."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{name}-{i}")
    for name in ("README.md", "docs/quickstart.md", "docs/python.md")
    for i, code in enumerate(BLOCK.findall((ROOT / name).read_text("utf-8")))
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs(
    code: str, miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    m = miniature.pipeline.bundle.manifest
    shutil.copytree(miniature.bundle, home / "bundles" / f"miniature-{m.precision}-{m.width}x{m.height}")
    here.mkdir()
    shutil.copy(miniature.bundle / m.conditions["seg"]["image"], here / "map.png")
    Image.new("RGB", (200, 160), (90, 140, 60)).save(here / "photo.png")
    monkeypatch.setenv("CNPP_TRT_HOME", str(home))
    monkeypatch.chdir(here)
    names: dict[str, Any] = {}
    exec(compile(code, "example", "exec"), names)
    made = next(value for name, value in names.items() if name == "pipeline")
    assert repr(made).startswith("<Pipeline: miniature")
    if "on_progress" in code:
        assert capsys.readouterr().out.endswith("stopped; the pipeline can go on with other requests\n")
    if ".save(" in code:
        assert sorted(path.name for path in Path("out").iterdir()) == ["image-0.png", "sheet.png"]
