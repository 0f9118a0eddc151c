"""The files beside the code agree with each other: workflows, Makefile, versions, and paths that the texts name."""

import importlib.util
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import cnpp_trt
import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# A target and everything that its line and its recipe say.
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
PINS = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))


def load(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def test_there_are_workflows_and_forms() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "gpu", "lint", "package", "tests"]
    assert [path.stem for path in FORMS] == ["bug_report", "config", "feature_request"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_of_the_makefile(path: Path) -> None:
    if path.stem == "docs" and not (ROOT / "mkdocs.yml").is_file():
        pytest.skip("this checkout has no mkdocs.yml")
    commands = [step["run"] for step in steps_of(path) if "run" in step]
    assert commands
    for command in commands:
        words = command.split()
        assert words[0] == "make" and len(words) >= 2, f"{command!r} is no call of make"
        assert set(words[1:]) <= TARGETS, command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_ends(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert 0 < job["timeout-minutes"] <= 360
    for step in steps_of(path):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_only_a_person_starts_what_runs_on_a_machine_of_ones_own() -> None:
    for path in WORKFLOWS:
        workflow = load(path)
        on = workflow[True]  # YAML 1.1 reads the key `on` as a truth value
        if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
            assert list(on) == ["workflow_dispatch"]


def test_python_versions_are_those_of_the_classifiers() -> None:
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    tests = load(ROOT / ".github" / "workflows" / "tests.yml")
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python-version"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_questions(path: Path) -> None:
    form = load(path)
    if path.stem != "config":
        assert {"name", "description", "body"} <= set(form)
        questions = [item for item in form["body"] if item["type"] != "markdown"]
        assert len({item["id"] for item in questions}) == len(questions)
        assert any(item.get("validations", {}).get("required") for item in questions)


def test_the_bug_report_asks_for_what_doctor_prints() -> None:
    [doctor] = [item for item in load(FORMS[0])["body"] if item.get("id") == "doctor"]
    assert doctor["attributes"]["label"] == "cnpp-trt doctor --json"
    assert doctor["validations"]["required"] is True


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == cnpp_trt.__version__
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    [paper] = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Li", "Yang", "Kuang", "Wu", "Wang", "Xiao", "Chen",
    ]  # fmt: skip
    assert any(identifier["value"] == "arXiv:2404.07987" for identifier in paper["identifiers"])


def test_hooks_are_of_the_versions_that_lint_runs() -> None:
    hooks = load(ROOT / ".pre-commit-config.yaml")["repos"]
    needed = {
        package for repo in hooks for hook in repo["hooks"] for package in hook.get("additional_dependencies", [])
    }
    assert needed == {f"ruff=={PINS['ruff']}"}
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in hooks if repo["repo"] != "local"}
    assert revisions["codespell"] == f"v{PINS['codespell']}"


def test_large_files_are_let_in_by_name_alone() -> None:
    hooks = [hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    [large] = [hook for hook in hooks if hook["id"] == "check-added-large-files"]
    limit = int(large["args"][0].removeprefix("--maxkb=")) * 1024
    allowed = re.compile(large["exclude"])
    for path in (ROOT / "miniature" / "model").rglob("*"):
        if path.is_file() and path.stat().st_size > limit:
            assert allowed.search(path.relative_to(ROOT).as_posix())
    assert not allowed.search("docs/film.safetensors")


def test_every_extra_is_pinned() -> None:
    pinned = {name.lower().replace("_", "-") for name in PINS}
    for extra in ("lint", "types", "package", "service", "test"):
        for requirement in PROJECT["optional-dependencies"][extra]:
            name = re.split(r"[<>=\[; ]", requirement)[0].lower().replace("_", "-")
            assert name in pinned, f"{requirement} of [{extra}] is not in constraints.txt"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_paths_that_a_text_names_are_there(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    quoted = re.findall(r"`([^`\n]+)`", text)
    paths = [word for word in quoted if re.fullmatch(r"\.?[\w.-]+(/[\w.\[\]-]+)*/?", word) and _is_path(word)]
    paths += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert len(paths) >= 5
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_targets_and_extras_that_a_text_names_are_there(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(
        r"\bmake ([a-z][a-z-]+)\b", "\n".join(re.findall(r"`[^`\n]+`|^make .*$", text, re.MULTILINE))
    ):
        assert target in TARGETS, target


def _is_path(word: str) -> bool:
    return "/" in word or word.endswith((".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff")) or word == "Makefile"


@pytest.mark.slow
def test_sdist_and_wheel_hold_what_they_should(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    line = [sys.executable, str(ROOT / "developer" / "distributions.py"), str(tmp_path)]
    checked = subprocess.run(line, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    # The check is one: a wheel without a file, and with one too many, is named.
    [wheel] = tmp_path.glob("*.whl")
    with_less = _changed(wheel, "cnpp_trt/runtime/loop.py", "cnpp_trt/tests/conftest.py")
    wheel.write_bytes(with_less)
    checked = subprocess.run(line, capture_output=True, text=True)
    assert checked.returncode == 1
    assert f"{wheel.name} lacks runtime/loop.py" in checked.stderr
    assert f"{wheel.name} has tests/conftest.py, which does not belong there" in checked.stderr


def _changed(wheel: Path, gone: str, added: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(buffer, "w") as after:
        for name in before.namelist():
            if name != gone:
                after.writestr(name, before.read(name))
        after.writestr(added, "")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://github.com/owner/cnpp-trt.git", "https://github.com/owner/cnpp-trt"),
        ("git@github.com:owner/cnpp-trt.git", "https://github.com/owner/cnpp-trt"),
        ("https://token@example.org/owner/cnpp.trt", "https://example.org/owner/cnpp.trt"),
        ("/home/user/cnpp-trt", None),
        ("", None),
    ],
)
def test_links_of_the_package_lead_to_its_repository(tmp_path: Path, origin: str, address: str | None) -> None:
    """A package's page on an index has no files beside it, so relative links would be dead there."""
    specification = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert specification is not None and specification.loader is not None
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    if origin:
        subprocess.run(["git", "-C", tmp_path, "config", "remote.origin.url", origin], check=True)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    metadata: dict[str, Any] = {}
    hooks.Links(str(tmp_path), {}).update(metadata)
    text = metadata["readme"]["text"]
    relative = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    if address is None:
        assert "urls" not in metadata and relative
    else:
        assert metadata["urls"]["Source"] == address
        assert not relative
        assert f"]({address}/blob/main/docs/quickstart.md)" in text
        assert f"]({address}/raw/main/docs/sheet.png)" in text
