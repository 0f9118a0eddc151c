"""Every command that a message or a document tells the reader to type is one that can be typed."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from cnpp_trt import install
from cnpp_trt.commands.app import app
from cnpp_trt.commands.options import (
    read_bytes,
    read_conditions,
    read_counts,
    read_pairs,
    read_precision,
    read_size,
    require_choice,
)
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.scheduler_names import read_scheduler
from cnpp_trt.runtime.settings.options import BACKENDS
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "batch",
    "benchmarks",
    "bundles",
    "commands",
    "demo",
    "engines",
    "export",
    "quantization",
    "runtime",
    "service",
)
SOURCES = [
    *sorted(ROOT.glob("*.py")),
    *(file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))),
]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# What stands for each expression of a message, where it stands in a command: a path needs the quotes that it gets.
VALUES = {
    "folder": "/my bundles/it's",
    "bundle.folder": "/my bundles/it's",
    "onnx": "/my bundles/unet.onnx",
    "made_with.model": "my model",
    "made_with.precision": "fp16",
    "m.model": "my model",
    "deployed.precision": "fp16",
    "precision": "int8",
    "backend": "onnxruntime-cpu",
    "size[0]": "512",
    "size[1]": "768",
    "flavor.name": "tensorrt-rtx",
    "name.removesuffix('-bf16')": "onnxruntime-cpu",
    "_export(folder)": "`cnpp-trt export --cond seg --out /a`",
    "_build(self._bundle)": "cnpp-trt build --bundle /a --cond seg",
    "_build(bundle)": "cnpp-trt build --bundle /a --cond seg",
    "capability": "89",
    "conditions": " --cond seg --cond depth",
    "model": "'my model'",
}
COMMAND = re.compile(r"`((?:cnpp-trt|make|pip|python)(?![\w\[-])[^`]*)`")


def _value(expression: ast.expr) -> str:
    """What an f-string's placeholder becomes; the placeholder itself where no command needs it."""
    source = ast.unparse(expression)
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "printable":
        return _value(expression.args[0])
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "shlex.quote":
        inner = expression.args[0]
        return shlex.quote(_value(inner.args[0] if isinstance(inner, ast.Call) and inner.args else inner))
    return VALUES.get(source.replace("self._bundle.", "bundle."), f"{{{source}}}")


def _piece(part: ast.expr) -> str:
    return _value(part.value) if isinstance(part, ast.FormattedValue) else str(ast.literal_eval(part))


def _texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module but its docstrings, whole, with values in place of its placeholders."""
    skipped = {
        id(child) for node in ast.walk(tree) for child in (node.values if isinstance(node, ast.JoinedStr) else [])
    } | {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(map(_piece, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _of_messages() -> list[tuple[str, str, bool]]:
    """(where, command, whether it is whole) of every message: `… again` repeats what the reader typed before."""
    found = []
    for file in SOURCES:
        for text in _texts(ast.parse(file.read_text("utf-8"))):
            where = file.relative_to(ROOT).as_posix()
            for match in COMMAND.finditer(text):
                found.append((where, match[1], not text[match.end() :].startswith(" again")))
            # A command without quotation marks around it.
            if text.startswith("cnpp-trt ") and re.search(r" --[a-z-]+ \S", text):
                found.append((where, text, False))
            found += [(where, line, True) for line in text.splitlines()[1:] if line.startswith("cnpp-trt ")]
    return found


def _of_documents() -> list[tuple[str, str, bool]]:
    """As `_of_messages`: lines of code blocks are whole, what stands in prose may be a command's name alone."""
    found = []
    for file in DOCUMENTS:
        text = file.read_text("utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            lines = (re.sub(r"\s#\s.*", "", line) for line in block.replace("\\\n", "").splitlines())
            whole = [part.strip().removesuffix(" &") for line in lines for part in line.split("&&")]
            found += [(file.name, line, True) for line in whole if re.match(r"(cnpp-trt|make|pip|python) ", line)]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        found += [(file.name, match[1].replace("\n", " "), False) for match in COMMAND.finditer(prose)]
    return found


def _parse(words: list[str], whole: bool) -> None:
    """Parses as the command does, and reads the values that the command itself reads. Calls nothing."""
    group: Any = typer.main.get_command(app)
    words = [word for word in words if word != "--help"]  # ends the parsing
    context = group.make_context("cnpp-trt", list(words), resilient_parsing=False) if words else None
    while context is not None and hasattr(group, "commands"):
        rest = context._protected_args + context.args
        name, *rest = rest
        assert name in group.commands, f"there is no command {name!r}"
        group = group.commands[name]
        if not rest and (hasattr(group, "commands") or not whole):
            return
        context = group.make_context(name, rest, parent=context, resilient_parsing=False)
    if context is None:
        return
    given: dict[str, Any] = context.params

    def each(name: str) -> list[Any]:
        value = given.get(name)
        return list(value) if isinstance(value, list | tuple) else [value]

    read_conditions([c for c in each("cond") if c])
    for size in each("size"):
        read_size(size)
    read_precision(given.get("precision"))
    for backend in each("backend"):
        require_choice("backend", backend or "auto", BACKENDS)
    require_choice("flavor", given.get("flavor", "auto"), ("auto", "tensorrt", "tensorrt-rtx"))
    if given.get("scheduler"):
        read_scheduler(given["scheduler"])
    for name in ("images", "prompt_chunks"):
        if isinstance(given.get(name), str):
            read_counts(given[name])
    for name, option in (("controlnet", "--controlnet"), ("extractor", "--extractor")):
        read_pairs(given.get(name) or [], option)
    if given.get("vram_budget"):
        read_bytes(given["vram_budget"])


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M))


@pytest.mark.slow
@pytest.mark.parametrize(("where", "line", "whole"), [*_of_messages(), *_of_documents()])
def test_a_command_that_is_advised_can_be_typed(where: str, line: str, whole: bool) -> None:
    line = line.replace("list|inspect|capability|prune", "list")  # a table of a changelog
    program, *words = shlex.split(line)
    if program == "cnpp-trt":
        assert not re.search(r"[{}]", line), f"a value for VALUES: {line}"
        assert "…" not in line or '"…"' in line, "a real value in place of an ellipsis"
        if words:
            _parse(words, whole)
    elif program == "make":
        assert {word for word in words if "=" not in word} <= _targets()
    elif program == "python" and words[0] == "-m":
        module = words[1].removeprefix("cnpp_trt").lstrip(".").replace(".", "/")
        assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file()
    elif program == "pip":
        assert words[0] == "install"
        words[1] = re.sub(r"^\.(?=\[|$)", "cnpp-trt", words[1])  # a checkout
        assert Requirement(words[1]).extras <= set(install.EXTRAS.values())
    else:
        raise AssertionError(f"what is {program}?")


def test_the_collection_finds_what_there_is() -> None:
    messages, documents = _of_messages(), _of_documents()
    assert ("bundles/bundle.py", "cnpp-trt export --cond seg --out '/my bundles/it'\"'\"'s'", True) in messages
    assert {"bundles/bundle.py", "cli.py", "runtime/repeat.py", "runtime/finiteness.py", "commands/run.py"} <= {
        m[0] for m in messages
    }
    assert ("tensorrt.md", "cnpp-trt engines list", True) in documents
    refusals = (UserError, AssertionError, typer.BadParameter.__mro__[2])  # Typer's base has no public name
    for wrong in (["export"], ["build", "--bundle", "/x"], ["run", "--frob"], ["run", "--cond", "segg"], ["engine"]):
        with pytest.raises(refusals):
            _parse(wrong, True)


# ------------------------------------------------------------------------------------------------------------ pip

# The examples of PEP 610, and a local wheel as pip records it.
RECORDS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "a package index": (None, "cnpp-trt[cpu]"),
    "a folder": ({"url": "file:///home/user/my%20project", "dir_info": {}}, "/home/user/my project[cpu]"),
    "a wheel": ({"url": "file:///tmp/cnpp_trt-0.1.0-py3-none-any.whl", "archive_info": {}},
                "/tmp/cnpp_trt-0.1.0-py3-none-any.whl[cpu]"),
    "an archive": ({"url": "https://github.com/pypa/pip/archive/1.3.1.zip", "archive_info": {"hash": "sha256=2dc6"}},
                   "cnpp-trt[cpu] @ https://github.com/pypa/pip/archive/1.3.1.zip"),
    "git": ({"url": "https://github.com/pypa/pip.git",
             "vcs_info": {"vcs": "git", "commit_id": "7921be1537eac1e97bc40179a57f0"}},
            "cnpp-trt[cpu] @ git+https://github.com/pypa/pip.git@7921be1537eac1e97bc40179a57f0"),
    "a folder of an archive": ({"url": "https://example.org/a.zip", "archive_info": {}, "subdirectory": "sub"},
                               "cnpp-trt[cpu] @ https://example.org/a.zip#subdirectory=sub"),
}  # fmt: skip
CODE = "from cnpp_trt.install import install_command; print(install_command('cpu'))"


@pytest.mark.parametrize(("record", "expected"), RECORDS.values(), ids=RECORDS)
def test_the_hint_of_an_installed_copy(record: dict[str, Any] | None, expected: str, tmp_path: Path) -> None:
    """A package folder without its pyproject.toml, and the metadata that an installer leaves beside it."""
    package, metadata = tmp_path / "cnpp_trt", tmp_path / "cnpp_trt-0.1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    for file in ROOT.glob("*.py"):
        (package / file.name).symlink_to(file) if file.name != "install.py" else (package / file.name).write_bytes(
            file.read_bytes()
        )
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cnpp-trt\nVersion: 0.1.0\n")
    if record is not None:
        (metadata / "direct_url.json").write_text(json.dumps(record))
    ended = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    assert shlex.split(ended.stdout.strip().strip("`")) == [sys.executable, "-m", "pip", "install", expected]
    if not expected.startswith("/"):
        assert Requirement(expected).extras == {"cpu"}


def test_the_hint_of_a_checkout() -> None:
    """pip itself takes what the hint names: a project whose pyproject.toml has the extra."""
    import tomllib

    words = shlex.split(install.install_command("export", "cpu").strip("`"))
    assert words[:5] == [sys.executable, "-m", "pip", "install", "--editable"]
    folder, _, extras = words[5].rpartition("[")
    with (Path(folder) / "pyproject.toml").open("rb") as f:
        known = tomllib.load(f)["project"]["optional-dependencies"]
    assert set(extras.rstrip("]").split(",")) == {"export", "cpu"} <= set(known)
    assert set(install.EXTRAS.values()) <= set(known)
