"""Command lines of random commands, options and values: in this process, and as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import typer
from cnpp_trt import cli
from cnpp_trt.commands.app import app
from cnpp_trt.errors import CnppError
from hypothesis import strategies as st

from .kind import Kind, Place

# Nothing here exists or is a real model: what would take minutes is refused at the latest where that is found.
_HARMLESS = (
    "", " ", "x", "0", "-1", "1", "2", "1.5", "nan", "inf", "-inf", "1e999", "2" * 5_000, str(2**40),
    "１", "512", "64x64", "64x", "0x0", "99999x8", "seg", "all", "Seg", "canny", "depht", "fp32", "fp16",
    "FP16", "fp8", "auto", "cuda", "openvino", "onnxruntime-cpu", "tensorrt", "unipc",
    "DPM++ 2M Karras", "ddim", "1-4", "1-999999999", "4,", "6GiB", "6", "1/2", "2/1", "a=b", "seg=",
    "=x", "seg=/nowhere", "owner/nothing", "owner/模型", "nothing:1", "nothing:nan", "../../up", "/",
    "/dev/zero", "/dev/full", "/proc/self/mem", "~nosuchuser", "~nosuchuser/x", "*", "[a-z]*", "a\nb",
    "\x1b]0;owned\x07", "\u202e", "模型", "🙂" * 100, "x" * 5_000, "x/" * 3_000, "-", "--",
    "'; touch owned; '", "$(touch owned)", "\udcff",
)  # fmt: skip
# What these commands would do with a real model takes minutes, or does not end.
_SLOW = ("export", "build", "bench", "parity", "consistency", "serve", "demo", "first-contact")
_LIMIT = 60


def _commands() -> dict[tuple[str, ...], list[click.Parameter]]:
    """Every command of the real app with its parameters."""
    found: dict[tuple[str, ...], list[click.Parameter]] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*words, name))
        if not getattr(command, "commands", {}):
            found[words] = list(command.params)

    walk(typer.main.get_command(app), ())
    return found


def _lines(place: Place) -> st.SearchStrategy[list[str]]:
    """Arguments: a command, some of its options with values of any kind, now and then one too many."""
    commands = _commands()
    files = [
        str(place.bundle),
        str(place.bundle / "manifest.json"),
        str(place.folder),
        str(place.checkpoint / "model_index.json"),
    ]
    value = st.one_of(
        st.sampled_from(_HARMLESS), st.sampled_from(_HARMLESS), st.sampled_from(files), st.text(max_size=20)
    )

    @st.composite
    def line(draw: st.DrawFn) -> list[str]:
        words = draw(st.sampled_from(sorted(commands)))
        arguments = list(words)
        if words[0] in _SLOW:
            # An option that is given twice counts once: a model that is nowhere comes last, below.
            given = {"--model": "nowhere/at-all", "--bundle": "/nowhere/at/all"}
        elif words == ("run",):
            given = {"--bundle": draw(st.sampled_from([str(place.bundle)] * 3 + ["", "nowhere", "/"])), "--steps": "1"}
        else:
            given = {}
        names = [p for p in commands[words] if draw(st.integers(0, 3)) == 0]
        for parameter in names:
            if isinstance(parameter, click.Option) or getattr(parameter, "opts", [""])[0].startswith("-"):
                name = draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts]))
                arguments.append(name)
                if not getattr(parameter, "is_flag", False):
                    arguments.append(draw(value))
            else:
                arguments.append(draw(value))
        if draw(st.integers(0, 9)) == 0:
            arguments.insert(
                draw(st.integers(0, len(arguments))), draw(st.sampled_from(["--nothing", "--debug", "-x", *_HARMLESS]))
            )
        known = {name for p in commands[words] for name in p.opts}
        for name, text in given.items():
            if name in known and (words[0] in _SLOW or name not in arguments):
                arguments += [name, text]
        return [argument.replace("\0", "") for argument in arguments]

    return line()


class Wrong(Exception):
    """What a command did that it must not do."""


def _judge(arguments: list[str], status: int, out: str, err: str) -> None:
    """Raises: CnppError where the command refused its arguments as it should, Wrong where something is wrong."""
    text = out + err
    if "Traceback (most recent call last)" in text and "--debug" not in arguments:
        raise Wrong("a traceback: " + text[-600:])
    if control := {c for c in text if not c.isprintable() and c not in "\n\t"}:
        raise Wrong(f"raw control characters {control!r}: {text[:600]!r}")
    if status not in (0, 1, 2):
        raise Wrong(f"exit status {status}: {text[-600:]!r}")
    if status and "--debug" not in arguments:
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        helped = "Usage:" in text
        missed = status == 1 and "missed: " in err
        if len(errors) != 1 and not helped and not missed:
            raise Wrong(f"exit status {status} and {len(errors)} lines of error: {text[-600:]!r}")
        if errors and len(errors[0]) > 1_000:
            raise Wrong(f"an error of {len(errors[0])} characters: {errors[0][:300]!r}")
        raise CnppError((errors or ["refused"])[0])


def arguments(place: Place) -> Kind:
    """In this process, through `cli.main` itself."""
    said = place.folder / "said"

    def attempt(line: list[str]) -> None:
        before = os.dup(1), os.dup(2)
        argv, environment = list(sys.argv), dict(os.environ)
        import signal

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with said.open("w+b") as file, said.with_suffix(".out").open("w+b") as out:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(out.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.argv = ["cnpp-trt", *line]
            status: Any = 0
            try:
                cli.main()
            except SystemExit as e:
                status = e.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(before[0], 1)
                os.dup2(before[1], 2)
                os.close(before[0])
                os.close(before[1])
                sys.argv = argv
                os.environ.clear()
                os.environ.update(environment)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        streams = [said.with_suffix(".out").read_bytes(), said.read_bytes()]
        out_text, err_text = (stream.decode("utf-8", "replace") for stream in streams)
        _judge(line, status or 0, out_text, err_text)

    return Kind(_lines(place), attempt)


def command(place: Place) -> Kind:
    """The installed `cnpp-trt`, a process for each, whose standard output is now and then full or closed."""
    script = Path(sys.executable).parent / "cnpp-trt"
    outputs = st.sampled_from(["pipe"] * 8 + ["full", "closed"])

    def attempt(example: tuple[list[str], str]) -> None:
        line, output = example
        with Path("/dev/full").open("wb") as full, (place.folder / "closed").open("wb") as closed:
            words: list[str] = [str(script), *line]
            if output == "closed":
                words = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *words]
            streams: dict[str, Any] = {"pipe": subprocess.PIPE, "full": full, "closed": closed}
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=streams[output],
                stderr=subprocess.PIPE,
            )
            try:
                out, err = process.communicate(timeout=_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise Wrong(f"a hang: no end after {_LIMIT} s") from None
        _judge(line, process.returncode, (out or b"").decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    return Kind(st.tuples(_lines(place), outputs), attempt)
