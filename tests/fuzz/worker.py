"""One kind of fuzzed input, tried here: `python -m fuzz.worker KIND SEED COUNT SANDBOX BUNDLE CHECKPOINT`."""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import cnpp_trt
from cnpp_trt.errors import CnppError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import HypothesisException

from .kind import Place
from .kinds import KINDS

# Processor seconds for one input, as others may keep the machine busy; and bytes beyond those mapped at the start.
LIMIT = 20.0
MEMORY = 6 << 30
LONGEST = 1_000
_PACKAGE = str(Path(cnpp_trt.__file__).parent)


class TooSlow(BaseException):
    """An input took longer than `LIMIT`."""


def main() -> None:
    name, seed, count, *folders = sys.argv[1:]
    sandbox, bundle, checkpoint = map(Path, folders)
    kind = KINDS[name](Place(sandbox / "folder", bundle, checkpoint))
    found: dict[str, Any] = {"inputs": 0, "refused": 0, "accepted": 0, "failures": []}
    said = (sandbox / "said").open("w+b")

    def fail(what: str, message: str, example: Any) -> None:
        found["failures"].append({"what": what, "message": message[:2_000], "example": kind.show(example)})

    @settings(
        max_examples=int(count), database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list[Any](HealthCheck), print_blob=False,
    )  # fmt: skip
    @seeded(int(seed))
    @given(kind.inputs)
    def attempt(example: Any) -> None:
        if found["inputs"] >= int(count):
            return
        (sandbox / "example").write_text(kind.show(example), "utf-8", "backslashreplace")
        found["inputs"] += 1
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            kind.attempt(example)
        except CnppError as e:
            found["refused"] += 1
            if wrong := _wrong_line(str(e)):
                fail(wrong, str(e), example)
        except HypothesisException:
            raise
        except TooSlow:
            fail("hang", f"no end after {LIMIT:g} s", example)
        except BaseException as e:
            fail(f"{type(e).__name__} at {_place(e)}", str(e), example)
        else:
            found["accepted"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if control := _control_characters(said):
            fail("raw control characters on a stream", control, example)

    signal.signal(signal.SIGPROF, _too_slow)
    _limit_memory()
    sys.stdout.flush()
    streams = os.dup(1), os.dup(2)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    try:
        attempt()
    finally:
        sys.stdout.flush()
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
    (sandbox / "outcome.json").write_text(json.dumps(found))


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlow


def _wrong_line(message: str) -> str:
    """What is wrong with a message that a terminal is to show; empty where nothing is."""
    if not message:
        return "an empty message"
    if "\n" in message:
        return "a message of several lines"
    if not message.isprintable():
        return "raw control characters in a message"
    return f"a message of over {LONGEST} characters" if len(message) > LONGEST else ""


def _control_characters(said: Any) -> str:
    sys.stdout.flush()
    said.seek(0)
    text = said.read().decode("utf-8", "replace")
    said.seek(0)
    said.truncate()
    found = {c for c in text if not c.isprintable() and c not in "\n\t"}
    return repr(text[:500]) if found else ""


def _place(error: BaseException) -> str:
    """The last frame of the product that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith((_PACKAGE, "/")) and "/cnpp_trt/" in f.filename]
    last = own[-1] if own else frames[-1]
    return f"{last.filename.rpartition('/cnpp_trt/')[2]}:{last.lineno}"


def _limit_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
