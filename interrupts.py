"""Ctrl-C and SIGTERM: a command unwinds and removes what is half-made; what takes longer than seconds is ended.

Python runs its handlers between its own instructions, so native code that computes for a minute (a TensorRT builder,
the export of a graph) would let the user wait for as long. A thread learns of each signal at once, through the file
descriptor that the C-level handler writes to (`signal.set_wakeup_fd`). It ends the process where unwinding takes
longer than `GRACE`, or where a second signal comes. Only standard modules that are quick to import are used: an
interrupt during the import of everything else is answered too.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

GRACE = 3.5
"""Seconds that unwinding may take."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_REMOVE = f"{__package__}.files"


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first SIGINT or SIGTERM."""


class Watch:
    """From `begin` to `close`, SIGINT and SIGTERM are handled as this module says.

    A signal that was ignored when the process started, as `nohup` and a shell's background jobs have it, stays ignored.
    Made in a thread other than the main one, where Python has no signals, it does nothing.

    Attributes:
        signum: the first signal that came; None before it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._said = False
        self._alone = threading.Lock()
        self._ours = threading.current_thread() is threading.main_thread()
        if not self._ours:
            return
        # Blocked until `begin`: an exception in here would have nobody to report it.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WORDS) if hasattr(signal, "pthread_sigmask") else None
        self._told, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        for kind in _WORDS:
            if signal.getsignal(kind) is not signal.SIG_IGN:
                signal.signal(kind, self._stop)

    def begin(self) -> None:
        """From now on a signal raises `Stopped`."""
        if self._ours and self._mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def close(self) -> None:
        """From now on signals change nothing: the work is done, and the process about to end."""
        if not self._ours:
            return
        for kind in _WORDS:
            if signal.getsignal(kind) == self._stop:
                signal.signal(kind, _nothing)
        signal.set_wakeup_fd(-1)
        self._tell.close()

    def ended(self) -> int:
        """Says what happened, now that everything has been removed. Returns: the exit status."""
        assert self.signum is not None
        self._say(f"{_WORDS[signal.Signals(self.signum)]}\n")
        return 128 + self.signum

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:  # a second one must not break off the removal of what is half-made
            self.signum = signum
            # What is broken off may complain: finalizers, callbacks of imports, threads.
            sys.unraisablehook = threading.excepthook = _say_nothing
            raise Stopped

    def _watch(self) -> None:
        first = self._next()
        if first is None:
            return
        self._told.settimeout(GRACE)
        with suppress(TimeoutError):
            self._next()
        self._end(first)

    def _next(self) -> int | None:
        """The next of our signals; None when the other end is closed."""
        while True:
            got = self._told.recv(1)
            if not got:
                self._told.close()
                return None
            if got[0] in _WORDS:
                return got[0]

    def _end(self, signum: int) -> NoReturn:
        # Not imported here: the main thread may be importing, and holds the lock.
        remove = getattr(sys.modules.get(_REMOVE), "remove_unfinished", None)
        with suppress(Exception):
            if remove is not None:
                remove()
        cursor = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        self._say(f"{cursor}{_WORDS[signal.Signals(signum)]}: stopped at once\n")
        os._exit(128 + signum)

    def _say(self, text: str) -> None:
        """Once. To the file descriptor: another thread may hold the stream's lock."""
        with self._alone, suppress(OSError):
            if not self._said:
                os.write(2, text.encode())
            self._said = True


@contextmanager
def handled_by(handler: Callable[[int], None]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM call `handler` and nothing else: a server finishes what it has accepted.

    A signal that was ignored stays so. In a thread other than the main one it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = [kind for kind in _WORDS if signal.getsignal(kind) is not signal.SIG_IGN]
    before = {kind: signal.getsignal(kind) for kind in kinds}
    descriptor = signal.set_wakeup_fd(-1)
    for kind in kinds:
        signal.signal(kind, lambda signum, frame: handler(signum))
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
        signal.set_wakeup_fd(descriptor)


def _say_nothing(complaint: object) -> None:
    pass


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass
