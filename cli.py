"""The process of `cnpp-trt`: whatever happens in it ends in one line on stderr and the exit status that fits.

Results go to stdout, everything else to stderr. Nothing heavy is imported before the signals are watched.
"""

import errno
import io
import os
import sys
from typing import NoReturn, TextIO

from .interrupts import Watch

# What of an operating system's errors a user can mend: a path, a permission, a disk, a limit.
_MENDABLE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG,
    errno.ENFILE, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ETXTBSY,
}  # fmt: skip


def main() -> NoReturn:
    """Exit status: 0, 1 for a failure, 2 for what the user can mend, 130 and 143 when interrupted or terminated."""
    watch = Watch()
    try:
        watch.begin()
        status = _run(sys.argv[1:], watch)
    except KeyboardInterrupt:  # before anything began, or while an error was reported
        status = 1
    if watch.signum is not None:
        _remove_unfinished()
        status = watch.ended()
        _drop_unwritable_stdout()
        # At once: what libraries do when a process ends may take seconds, in which a second signal would kill it.
        os._exit(status)
    watch.close()
    _drop_unwritable_stdout()
    sys.exit(status)


def _run(arguments: list[str], watch: Watch) -> int:
    """Everything between the signals: parses, runs, reports.

    Returns:
        The exit status.
    """
    closed = _open_standard_streams()
    debug = _take_debug(arguments)
    try:
        status = _call(arguments, closed)
        sys.stdout.flush()
    except BaseException as error:
        if watch.signum is not None:
            return 1
        if debug:
            import traceback

            traceback.print_exc()
        return _report(error, arguments)
    return status


def _call(arguments: list[str], closed: bool) -> int:
    """Parses and runs; every failure is an exception.

    Returns:
        The exit status.
    """
    from .errors import UserError
    from .telemetry import keep_caches_at_home

    if closed and "--json" in arguments:
        raise UserError("stdout is closed, and --json has nowhere else to go: leave one of them out")
    if any("\0" in argument for argument in arguments):
        raise UserError("an argument holds a NUL character, which no text or path can: leave it out")
    keep_caches_at_home()
    from .commands.app import app
    from .commands.logs import logs_on_stderr

    # Not standalone: Typer would frame a usage error in a box of several lines.
    with logs_on_stderr():
        status = app(arguments, prog_name="cnpp-trt", standalone_mode=False)
    return status if isinstance(status, int) else 0


def _report(error: BaseException, arguments: list[str]) -> int:
    """Prints in one line what went wrong.

    Returns:
        The exit status.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):  # as in `| head`: who reads has what they wanted
        return 1
    from .commands.options import echo

    line, status = _line_of(error, arguments)
    if line:
        echo(f"error: {line}")
    return status


def _line_of(error: BaseException, arguments: list[str]) -> tuple[str, int]:
    """What to say of an exception, and the exit status."""
    from .errors import CnppError, UserError
    from .install import cannot_import
    from .messages import one_line, printable

    if isinstance(error, CnppError):
        from .commands.option_names import in_options

        return in_options(str(error)), 2 if isinstance(error, UserError) else 1
    if (usage := _usage(error)) is not None:
        text = printable(usage, 400).rstrip(".")
        return (f"{text}: see `cnpp-trt --help`" if text else ""), 2  # without text the help was printed instead
    if isinstance(error, ImportError):
        command = next((word for word in arguments if not word.startswith("-")), "")
        return cannot_import(f"cnpp-trt {printable(command, 40)}".strip(), error), 1
    if isinstance(error, MemoryError):
        return "not enough memory: choose a smaller --size or fewer images, or close other programs", 1
    if isinstance(error, RecursionError):
        return "something is nested too deeply: look at the file that was read last, or run with --debug", 1
    if isinstance(error, UnicodeError):
        return f"an argument or a file holds text that cannot be used ({one_line(error)})", 2
    if isinstance(error, OSError):
        reason = error.strerror or one_line(error)
        where = "".join(f"{printable(name)}: " for name in (error.filename, error.filename2) if name is not None)
        return f"{where}{reason}", 2 if error.errno in _MENDABLE else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return f"{type(error).__name__}: {one_line(error)}: run with --debug to see where, and report it", 1


def _usage(error: BaseException) -> str | None:
    """Typer's message of an argument that it does not take; None where `error` is something else."""
    if "typer" not in sys.modules:
        return None
    import typer

    # Typer's base of "no such option", "missing option" and the like; it has no public name.
    base = typer.BadParameter.__base__
    if base is None or not isinstance(error, base):
        return None
    message: str = error.format_message()  # type: ignore[attr-defined]
    return message


def _take_debug(arguments: list[str]) -> bool:
    """Whether `--debug` stands among the options; it is removed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    found = len(kept) < end
    arguments[:end] = kept
    return found


def _open_standard_streams() -> bool:
    """Makes every stream one that can be written, whatever characters come.

    Returns:
        Whether stdout was closed.
    """
    # Else the first file that is opened gets the number, and what a native library prints goes into it.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    closed = sys.stdout is None
    if closed:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return closed


def _nowhere() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def _drop_unwritable_stdout() -> None:
    """Python writes what is left in the buffer when it ends, and would complain of what was said already."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, 1)
        os.close(number)


def _remove_unfinished() -> None:
    if f"{__package__}.files" in sys.modules:
        from .files import remove_unfinished

        remove_unfinished()


if __name__ == "__main__":
    main()
