"""The documents: links lead somewhere, commands run, quoted messages are the code's, README is short."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cnpp_trt
import pytest
from cnpp_trt import errors

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Needs a hub, a GPU, PyTorch or minutes; tests/commands/test_advice.py parses make and pip all the same.
NOT_RUN = ("make ", "source ", "pip install", "python3 -m venv ")


def anchors(page: Path) -> set[str]:
    """As GitHub and Python-Markdown make them of headings."""
    text = FENCE.sub("", page.read_text("utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name} links to {link}"
        assert target.is_relative_to(ROOT)
        if name.startswith("docs/"):  # the site has no other files
            assert target.is_relative_to(ROOT / "docs"), f"{name} links out of the site to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}"


def test_pages_are_in_the_site() -> None:
    """And the site has no page that is not there."""
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    [table] = re.findall(r"^<!-- results: .*?^<!-- /results -->$", text, re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^\|", table, re.MULTILINE)) <= 2 + 6


def test_public_names_are_in_the_reference() -> None:
    text = (ROOT / "docs/reference.md").read_text("utf-8")
    built = set(re.findall(r"^::: cnpp_trt\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert "errors" in built
    assert set(dir(cnpp_trt)) <= built | listed | set(vars(errors))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_tables_are_narrow(name: str) -> None:
    for line in FENCE.sub("", (ROOT / name).read_text("utf-8")).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) - 1 <= 6, line


def strings() -> str:
    """All source, with literals that go on over lines put together."""
    sources = [path.read_text("utf-8") for path in ROOT.glob("*.py")]
    for package in ("bundles", "commands", "engines", "export", "runtime", "benchmarks"):
        sources += [path.read_text("utf-8") for path in (ROOT / package).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", "docs/models.md"])
def test_messages_are_those_of_the_code(name: str) -> None:
    """What stands between `…` and what is named in capitals is in a message, word for word."""
    text, source = (ROOT / name).read_text("utf-8"), re.sub(r"\{[^{}]*\}", "\0", strings())
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    quoted = [message for message in quoted if "…" in message or message.count(" ") >= 3]
    assert len(quoted) >= 8
    for message in quoted:
        for part in re.split(r"…|'\w+'|\bN\b|\b[A-Z]{4,}\b|\d+(?:\.\d+)?|owner/name|hub\(401\)", message):
            words = part.strip(" :;,.()")
            if len(words) >= 6:
                assert words in source, f"no message says {words!r} ({message})"


def commands(name: str) -> Iterator[list[str]]:
    """The lines of each block of a page that can run here, in their order."""
    for block in SHELL.findall((ROOT / name).read_text("utf-8").replace("\\\n", "")):
        lines = [re.sub(r"\s+#.*$", "", line) for line in block.splitlines() if not re.match(r"\s*(#|$)", line)]
        yield [line for line in lines if not line.startswith(NOT_RUN)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_commands_run_as_they_stand(name: str, tmp_path: Path) -> None:
    """One after the other in an empty folder, with nothing exported before, as after `make run`."""
    lines = [line for block in commands(name) for line in block]
    assert len(lines) >= 4
    env: dict[str, Any] = {**os.environ, "CNPP_TRT_HOME": str(tmp_path / "home")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    (tmp_path / "here").mkdir()
    for line in lines:
        ended = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        # What a page shows is what its model can: a prompt that fits its control image.
        assert "(weak)" not in ended.stdout + ended.stderr, f"{line}\n{ended.stdout}\n{ended.stderr}"
    images = list((tmp_path / "here" / "cnpp-trt-runs").glob("*/image-*.png"))
    assert len(images) >= sum(line.startswith("cnpp-trt run") for line in lines)
