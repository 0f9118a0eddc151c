"""How the commands' options are typed."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cnpp_trt.commands.app import app
from cnpp_trt.commands.logs import logs_on_stderr
from cnpp_trt.commands.options import read_bytes
from cnpp_trt.errors import UserError

PANELS = (
    "Model", "Prompt", "Control", "Sampling", "Network", "Scheduling", "Search", "Graphs", "Limits", "Runtime",
    "Measurement",
    "Output",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 * 2**30), ("6G", 6 * 2**30), ("6000MB", 6_000_000_000), (" 1.5 gib", 3 * 2**29), ("512k", 2**19)],
)
def test_sizes_in_bytes(text, nbytes):
    assert read_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "6", "GiB", "-1G", "6 apples", "1e3G", "6GiBs", "٦G", "nan G"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(UserError, match="as a size in bytes: give it as 6GiB or 6000MB"):
        read_bytes(text)


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands])
def test_every_option_is_in_a_panel_and_examples_follow(name, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = command(name, "--help").out
    panels = re.split(r"^╭─ (\w+) ─.*$", text, flags=re.MULTILINE)
    options = dict(zip(panels[1::2], panels[2::2], strict=True))
    assert re.findall(r"--[\w-]+", options["Options"]) == ["--help"]
    assert options.keys() <= {"Arguments", "Options", *PANELS}
    assert f" cnpp-trt {name}" in options["Output"].partition("Example")[2]


def test_completion_is_light():
    """Every press of the tab key starts the command anew."""
    script = Path(sys.executable).with_name("cnpp-trt")
    line = "cnpp-trt build --fl"
    completion = {"_CNPP_TRT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "2"}
    env = {**os.environ, **completion, "PYTHONPROFILEIMPORTTIME": "1"}
    ended = subprocess.run([script], capture_output=True, text=True, env=env, timeout=60)
    assert ended.stdout.split() == ["--flavor"]
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "cnpp_trt.commands.build" in imported
    assert not imported & {
        "numpy",
        "PIL",
        "cv2",
        "onnx",
        "onnxruntime",
        "torch",
        "rich",
        "jinja2",
        "fastapi",
        "pyarrow",
    }


def test_the_log_goes_to_stderr_while_a_command_runs(capsys):
    package, logger = logging.getLogger("cnpp_trt"), logging.getLogger("cnpp_trt.export.exporter")
    before = (package.level, package.handlers[:], package.propagate)
    with logs_on_stderr():
        logger.info("unet: 1 s, 50% of \x1b[31mall")
        logger.warning("two keys match no layer")
        logger.debug("nothing of this")
        logging.getLogger("transformers").warning("not this package's")
    logger.info("nor this")
    assert capsys.readouterr() == ("", "unet: 1 s, 50% of \\x1b[31mall\nwarning: two keys match no layer\n")
    assert (package.level, package.handlers, package.propagate) == before
