"""The `cnpp-trt` command: parses, calls one function, prints. Results on stdout, everything else on stderr."""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .bundle import Bundle
from .commands import build, engines, measure, run
from .commands.options import Json, say
from .errors import CnppError, UserError

app = typer.Typer(
    help="ControlNet++ as ONNX graphs and TensorRT engines, and a runtime without PyTorch.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Typer's base of "no such option", "missing option" and the like; it has no public name.
_UsageError: Any = typer.BadParameter.__base__


_INTERRUPTED = 130


def main() -> NoReturn:
    """Exit status: 0, 1 for a failure, 2 for what the user can mend, 130 and 143 when interrupted or terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        # Not standalone: Typer would frame a usage error in a box of several lines.
        status = app(standalone_mode=False) or 0
    except _UsageError as e:
        if not e.format_message():  # the help was printed instead
            sys.exit(2)
        say(f"error: {' '.join(e.format_message().split()).rstrip('.')}: see `cnpp-trt --help`")
        sys.exit(2)
    except CnppError as e:
        if debug:
            raise
        say(f"error: {e}")
        sys.exit(2 if isinstance(e, UserError) else 1)
    if status == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
        say("interrupted: nothing half-made is left")
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks; may stand anywhere.")] = False,
) -> None:
    if version:
        print(f"cnpp-trt {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


for commands in (build, engines, run, measure):
    commands.register(app)


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")], as_json: Json = False) -> None:
    """Read every byte of a bundle and compare it with the manifest's digests."""
    opened = Bundle.open(bundle)
    size = opened.verify()
    if as_json:
        print(json.dumps({"bundle": str(bundle), "bytes": size, "digest": opened.digest}))
    else:
        print(
            f"{bundle} is whole: {len(opened.manifest.files)} files, {size / 2**20:.1f} MiB, "
            f"digest {opened.digest[:16]}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, providers, GPU, folders; what works here and what to install. Made to be pasted into an issue."""
    from .doctor import describe, examine

    found = examine()
    print(json.dumps(found) if as_json else describe(found))


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that every `finally` runs and nothing half-made is left.
    say("terminated: nothing half-made is left")
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
