"""What `cnpp-trt serve` takes and gives under load, beside the bare pipeline and servers that draw one by one.

    python -m cnpp_trt.developer.service_load [--seconds 120] [--clients 64] [--rounds 3] [--out load.json]

All draw the same requests of the embedded miniature, in turn, in one run: the pipeline in this process, the server, and
two of `one_by_one.py`, of which one draws with diffusers. First alone and eight at a time; then many clients call the
server for a while, of whom some leave in the middle of a picture and some send what is no request. Each picture is
compared with the pipeline's. Prints tables in Markdown. Processor time is that of the side's own process: on a machine
that does other work too, it tells more than seconds do.
"""

import asyncio
import base64
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import httpx
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from ..bundles.bundle import Bundle
from ..errors import CnppError
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import Control, Request

PROMPTS = ("a house in spring", "oaks by a road", "a white barn at dusk", "a field in winter")
SEEDS = 4
TOGETHER = 8
_MALFORMED: tuple[dict[str, Any], ...] = (
    {"content": b"{", "headers": {"content-type": "application/json"}},
    {"json": {"prompt": "x", "frobnicate": 1}},
    {"json": {"prompt": "x", "num_inference_steps": 0}},
    {"json": {"prompt": "x", "condition": "seg", "control_image": "AAAA"}},
)


@dataclass(frozen=True)
class Case:
    """A request, as the interface and as the pipeline take it, and its image uint8 [H,W,3]."""

    body: dict[str, Any]
    request: Request
    image: NDArray[np.uint8]


@dataclass
class Load:
    """What the clients saw.

    Attributes:
        drawn, rejected, malformed: seconds of each answered picture, rejection (429) and malformed request.
        refused: seconds of each rejection, as the server's own log has them.
        statuses: of all answers.
        wrong: pictures that differ from the pipeline's by more than 1 of 255.
        left: clients that went away in the middle.
        memory: MiB that the server held, over time.
    """

    drawn: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    malformed: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    left: int = 0
    memory: list[float] = field(default_factory=list)


def make_cases(pipeline: Pipeline, steps: int) -> list[Case]:
    """The requests that every side draws, with the bare pipeline's images."""
    path = pipeline.bundle.file(pipeline.bundle.manifest.conditions["seg"].get("image", ""))
    text, cases = base64.b64encode(path.read_bytes()).decode(), []
    for prompt in PROMPTS:
        for seed in range(SEEDS):
            request = Request(prompt, controls=Control("seg", path), seed=seed, num_inference_steps=steps)
            body = {"prompt": prompt, "condition": "seg", "control_image": text, "seed": seed}
            cases.append(Case({**body, "num_inference_steps": steps}, request, pipeline(request).images[0]))
    return cases


class Child:
    """A server in a process of its own, on a free port."""

    def __init__(self, name: str, line: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.url = ""
        for text in self.process.stderr:
            if " at http://" in text:
                self.url = text.partition(" at ")[2].split()[0]
                break
        if not self.url:
            raise CnppError(f"{name} did not start")
        self.rejections: list[float] = []
        threading.Thread(target=self._read, args=[self.process.stderr], daemon=True).start()
        while httpx.get(f"{self.url}/readyz", trust_env=False).status_code != 200:
            time.sleep(0.1)

    def _read(self, log: IO[str]) -> None:
        """The access log, which has the server's own time of each request."""
        for line in log:
            if '"status": 429' in line:
                self.rejections.append(json.loads(line)["seconds"])

    def cpu(self) -> float:
        """Processor seconds that the process has used, in all of its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def stop(self) -> int:
        """Ends it as a service manager does. Returns: its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(60)


def main(
    seconds: float = 120.0,
    clients: int = 64,
    rounds: int = 3,
    steps: int = 20,
    queue: int = 40,
    threads: int = 2,
    diffusers: Annotated[bool, typer.Option(help="Compare with diffusers too, which needs PyTorch.")] = True,
    out: Annotated[Path | None, typer.Option(help="A file for everything that was measured.")] = None,
) -> None:
    """Measures and prints."""
    bundle = Bundle.find("miniature").folder
    program, common = [sys.executable, "-m", "cnpp_trt"], ["--threads", str(threads)]
    ours = ["serve", "--bundle", str(bundle), "--port", "0", "--max-batch", str(TOGETHER), "--queue", str(queue)]
    other = [f"{program[-1]}.developer.one_by_one", str(bundle), *common]
    lines = {"cnpp-trt serve": [*program, *ours, *common], "one by one": [*program[:2], *other]}
    if diffusers:
        lines["one by one, diffusers"] = [*program[:2], *other, "--engine", "diffusers"]
    with Pipeline.open(bundle, threads=threads, warm=True) as pipeline, ExitStack() as stack:
        cases = make_cases(pipeline, steps)
        children = [stack.enter_context(Child(name, line)) for name, line in lines.items()]
        figures = compare(pipeline, children, cases, rounds)
        load = asyncio.run(_load(children[0], cases, clients, seconds))
        load.refused = list(children[0].rejections)
        served = asyncio.run(_timed(children[0].url, cases[:1], 1))
        metrics = httpx.get(f"{children[0].url}/metrics", trust_env=False).text
        ended = children[0].stop()
    print_tables(figures, load, clients, seconds)
    print(f"\nAfter the load a request took {served[0]:.3f} s; SIGTERM ended the server with status {ended}.")
    sums = [
        float(re.findall(rf"^cnpp_trt_batch_images_{part}{{.*}} (\S+)$", metrics, re.M)[0]) for part in ("sum", "count")
    ]
    print(f"Its batches had {sums[0] / sums[1]:.1f} images on average.")
    if out is not None:
        out.write_text(json.dumps({"figures": figures, "load": vars(load)}, indent=1) + "\n", "utf-8")
    if load.wrong:
        raise CnppError(f"{load.wrong} pictures were wrong")


def compare(pipeline: Pipeline, children: list[Child], cases: list[Case], rounds: int) -> dict[str, Any]:
    """Of each side in turn: seconds of one client, images per second of eight, and processor seconds of an image."""
    requests = [case.request for case in cases]
    sides: dict[str, tuple[Callable[[int], list[float]], Callable[[], float]]] = {
        "bare pipeline": (lambda n: _bare(pipeline, requests, n), time.process_time),
        **{child.name: (lambda n, c=child: asyncio.run(_timed(c.url, cases, n)), child.cpu) for child in children},  # type: ignore[misc]
    }
    alone: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, dict[int, list[float]]] = {name: {1: [], TOGETHER: []} for name in sides}
    for _ in range(rounds):
        for together in (1, TOGETHER):
            for name, (run, cpu) in sides.items():
                began, before = time.perf_counter(), cpu()
                spent = run(together)
                seconds = time.perf_counter() - began
                used[name][together].append((cpu() - before) / len(spent))
                if together == 1:
                    alone[name].append(statistics.median(spent))
                else:
                    rates[name].append(len(spent) / seconds)
    return {"alone": alone, "rates": rates, "cpu": used}


def _bare(pipeline: Pipeline, requests: list[Request], together: int) -> list[float]:
    spent = []
    for first in range(0, len(requests), together):
        began = time.perf_counter()
        pipeline.batch(requests[first : first + together])
        spent += [time.perf_counter() - began] * together
    return spent


async def _timed(url: str, cases: list[Case], together: int) -> list[float]:
    """Every case, from so many clients at a time."""
    left, spent = list(cases), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits) as client:

        async def work() -> None:
            while left:
                case, began = left.pop(), time.perf_counter()
                answer = await client.post("/v1/images/generations", json=case.body)
                spent.append(time.perf_counter() - began)
                if not await asyncio.to_thread(same_picture, answer, case):
                    raise CnppError(f"{url} draws something else: {answer.status_code} {answer.text[:200]}")

        await asyncio.gather(*(work() for _ in range(together)))
    return spent


async def _load(child: Child, cases: list[Case], clients: int, seconds: float) -> Load:
    load, until = Load(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=child.url, timeout=600, trust_env=False, limits=limits) as client:

        async def watch() -> None:
            while time.monotonic() < until:
                load.memory.append(child.memory())
                await asyncio.sleep(2)

        work = (_client(client, cases, load, until, np.random.default_rng(i)) for i in range(clients))
        await asyncio.gather(watch(), *work)
    return load


async def _client(
    client: httpx.AsyncClient, cases: list[Case], load: Load, until: float, random: np.random.Generator
) -> None:
    """One client: of its requests a tenth is left in the middle, a twentieth is malformed."""
    while time.monotonic() < until:
        kind, case, began = random.random(), cases[random.integers(len(cases))], time.perf_counter()
        if kind < 0.05:
            broken = _MALFORMED[random.integers(len(_MALFORMED))]
            answer = await client.post("/v1/images/generations", **broken)
            load.malformed.append(time.perf_counter() - began)
            load.statuses[f"malformed: {answer.status_code}"] += 1
            await asyncio.sleep(0.2)
            continue
        asked = asyncio.ensure_future(client.post("/v1/images/generations", json=case.body))
        if kind < 0.15:
            await asyncio.wait([asked], timeout=float(random.uniform(0.05, 3)))
            if not asked.done():
                asked.cancel()
                load.left += 1
                continue
        try:
            answer = await asked
        except httpx.HTTPError as e:
            load.statuses[type(e).__name__] += 1
            continue
        spent = time.perf_counter() - began
        load.statuses[str(answer.status_code)] += 1
        if answer.status_code == 200:
            load.drawn.append(spent)
            load.wrong += not await asyncio.to_thread(same_picture, answer, case)
        elif answer.status_code == 429:
            load.rejected.append(spent)
            await asyncio.sleep(float(random.uniform(0.5, 1.5)))


def same_picture(answer: httpx.Response, case: Case) -> bool:
    """Whether an answer has the pipeline's picture: a batch may differ from a single one by 1 of 255."""
    if answer.status_code != 200:
        return False
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    image = np.asarray(Image.open(io.BytesIO(data)))
    return bool(np.abs(image.astype(int) - case.image).max() <= 1)


def print_tables(figures: dict[str, Any], load: Load, clients: int, seconds: float) -> None:
    """Markdown."""
    print(
        "| | one client | added | processor time | eight clients: images/s | of the bare pipeline's | processor time |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    alone, rates, used = figures["alone"], figures["rates"], figures["cpu"]
    bare = "bare pipeline"
    for name, spent in alone.items():
        added = statistics.median(own - other for own, other in zip(spent, alone[bare], strict=True))
        share = statistics.median(own / other for own, other in zip(rates[name], rates[bare], strict=True))
        cpu = {n: statistics.median(values) for n, values in used[name].items()}
        row = f"| {name} | {statistics.median(spent):.3f} s ({1000 * added:+.0f} ms) | {cpu[1]:.3f} s "
        print(f"{row}| {statistics.median(rates[name]):.2f} | {share:.0%} | {cpu[TOGETHER]:.3f} s |")
    print(f"\n{clients} clients for {seconds:g} s:\n")
    print("| | count | median | p99 |\n|---|---:|---:|---:|")
    rows = {
        "pictures": load.drawn,
        "rejections (429)": load.rejected,
        "the same, in the server": load.refused,
        "malformed requests": load.malformed,
    }
    for name, spent in rows.items():
        if spent:
            print(f"| {name} | {len(spent)} | {statistics.median(spent):.3f} s | {_p99(spent):.3f} s |")
    print(f"\n{load.wrong} wrong pictures; {load.left} clients left in the middle; answers by status: ", end="")
    print(", ".join(f"{status} {count}" for status, count in sorted(load.statuses.items())), end=". ")
    third = max(1, len(load.memory) // 3)
    parts = load.memory[third : 2 * third] or load.memory, load.memory[-third:]
    middle, last = map(statistics.median, parts)
    print(f"Memory of the server: {middle:.0f} MiB in the second third, {last:.0f} MiB in the last.")
    rate = len(load.drawn) / seconds
    print(f"{rate:.2f} images/s were delivered; {os.cpu_count()} CPU cores, which the clients use too.")


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


if __name__ == "__main__":
    typer.run(main)
