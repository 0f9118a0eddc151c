"""One contender of `cnpp-trt bench` in its own process: requests come in on stdin, measurements go out on stdout.

    python -m cnpp_trt.benchmarks.latency.worker NAME < lines

Every line is a JSON object. The first names what to open, each of the others what to do: `generate`, `picture`,
`stages`, `extract` or `peak_bytes`. Each is answered by one line, `{"error": …}` where it failed. The process ends at
once, also while it generates, when stdin ends: the parent process is gone then, however it was stopped.
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import CnppError
from ...runtime.output.metadata import image_from_base64, image_to_base64
from ...runtime.settings.request import Control, ResolvedRequest
from .competitors import Competitor, WorkerConfig


def main() -> None:
    """Answers orders, a line of JSON each, until stdin ends."""
    if sys.platform == "linux":
        # Killed when the parent ends: native code that holds Python's lock for seconds keeps stdin's end unseen.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    # Ctrl-C in a terminal reaches every process in it: the one that asks decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Native libraries print to stdout as they please: only this process's own answers may be there.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            reply = work()
        except CnppError as e:
            reply = {"error": str(e)}
        except Exception as e:  # whatever PyTorch, a compiler or a backend raise: the benchmark lists it
            reply = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
        print(json.dumps(reply), file=answers, flush=True)
        return "error" not in reply

    competitor: list[Competitor] = []
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), name="stdin", daemon=True).start()

    def opened() -> dict[str, Any]:
        given = json.loads(lines.get())
        bundles = {size: Path(folder) for size, folder in given["bundles"].items()}
        competitor.append(WorkerConfig(**{**given, "bundles": bundles}).open())
        return {}

    if not answer(opened):
        os._exit(1)  # not through Python's own end, which would wait for the thread that reads
    while True:
        line = lines.get()
        answer(lambda line=line: _perform(competitor[0], json.loads(line)))  # type: ignore[misc]


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Hands on the lines of stdin, and ends the process with them."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def request_to_json(request: ResolvedRequest) -> dict[str, Any]:
    """A request with one control at its defaults."""
    (control,) = request.controls
    fields = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "seed")
    return {
        **{name: getattr(request, name) for name in (*fields, "num_images_per_prompt")},
        "condition": control.condition,
        "image": image_to_base64(control.pixels),
    }


def peak_bytes() -> int:
    """The most host memory that this process has held. Linux's `ru_maxrss` would count the one that started it too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _request(fields: dict[str, Any]) -> ResolvedRequest:
    control = Control(fields.pop("condition"), image_from_base64(fields.pop("image")))
    return ResolvedRequest(controls=(control,), **fields)


def _perform(competitor: Competitor, order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "peak_bytes":
        return {"peak_bytes": peak_bytes()}
    if order["do"] == "extract":
        return {"seconds": competitor.extract(order["condition"], image_from_base64(order["image"]))}
    request = _request(order["request"])
    if order["do"] == "stages":
        return {"stages": competitor.stages(request)}
    start = time.perf_counter()
    images = competitor.generate(request)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **({"image": image_to_base64(images[0])} if order["do"] == "picture" else {})}


if __name__ == "__main__":
    main()
