"""What other processes do with a plan store; run by tests/engines/test_store.py.

Arguments: the function, the key's fields, the store's folder, and a file in which each build leaves a line.
"""

import ast
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cnpp_trt.engines import store as module
from cnpp_trt.engines.fusion import FusionReport
from cnpp_trt.engines.plan import BuildResult, PlanKey
from cnpp_trt.engines.store import PlanStore
from cnpp_trt.errors import UserError

key = PlanKey(**ast.literal_eval(sys.argv[2]))
store, log = PlanStore(Path(sys.argv[3])), Path(sys.argv[4])
patched: Any = module
logging.basicConfig(stream=sys.stdout, level=logging.INFO)


def tell(line: str) -> None:
    print(line, flush=True)


def build(wait: float = 0.0) -> BuildResult:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    tell("building")
    time.sleep(wait)
    return BuildResult(os.urandom(4096), FusionReport(1, 0, 0, 0, 0, 0, 0, ()), wait, 1, 1, None, 1)


def build_slowly() -> None:
    store.get_or_build(key, "m", lambda: build(60))


def write_slowly() -> None:
    patched.os.fsync = lambda fd: (tell("writing"), time.sleep(60))
    store.get_or_build(key, "m", build)


def rename_slowly() -> None:
    path: Any = Path
    path.rename = lambda *arguments: (tell("renaming"), time.sleep(60))
    store.get_or_build(key, "m", build)


def queue_for_one_plan() -> None:
    tell("ready")
    sys.stdin.readline()
    plan, new = store.get_or_build(key, "m", lambda: build(0.7))
    assert plan.read() and not plan.integrity_error()
    tell(f"{new} {plan.sha256}")


def build_beyond_a_limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited() -> BuildResult:
        built = build()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        return built

    try:
        store.get_or_build(key, "m", limited)
    except UserError as e:
        tell(f"refused: {e}")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
