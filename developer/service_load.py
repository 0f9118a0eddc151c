"""What `cnpp-trt serve` takes and gives under load, beside the bare pipeline and servers that draw one by one.

    python -m cnpp_trt.developer.service_load [--seconds 120] [--clients 64] [--rounds 4] [--out load.json]

All draw the same requests of the embedded miniature, in turn, in one run: the pipeline in this process, the server, and
two of `one_by_one.py`, of which one draws with diffusers. First alone and eight at a time; then many clients call the
server for a while, of whom some leave in the middle of a picture and some send what is no request. Each picture is
compared with the pipeline's. Prints tables in Markdown. Processor time is that of the side's own process: on a machine
that does other work too, it tells more than seconds do.
"""

import asyncio
import base64
import http.client
import io
import json
import multiprocessing
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
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, TypeAlias

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
SEEDS = 2
TOGETHER = 8
REPEATED = 4
Span: TypeAlias = tuple[float, float]
"""When a request began and ended, of `time.perf_counter()`."""
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
        apart: seconds of rejections that a client in a process of its own got.
        refused: seconds of each rejection, as the server's own log has them.
        statuses: of all answers.
        wrong: pictures that differ from the pipeline's by more than 1 of 255.
        left: clients that went away in the middle.
        memory: MiB that the server held, over time.
    """

    drawn: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
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
    rounds: int = 4,
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
        print_comparison(figures)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            rejections = apart.submit(rejected_apart, children[0].url, cases[0].body, seconds)
            load = asyncio.run(_load(children[0], cases, clients, seconds))
            load.apart = rejections.result()
        load.refused = list(children[0].rejections)
        [(began, end)] = _served(children[0].url, cases[:1], 1)
        metrics = httpx.get(f"{children[0].url}/metrics", trust_env=False).text
        ended = children[0].stop()
    print_load(load, clients, seconds)
    images, batches = (_metric(metrics, f"cnpp_trt_batch_images_{part}") for part in ("sum", "count"))
    print(f"The server's batches had {images / batches:.1f} images on average, those of the comparison included.")
    print(f"After the load a request took {end - began:.3f} s; SIGTERM ended the server with status {ended}.")
    if out is not None:
        out.write_text(json.dumps({"figures": figures, "load": vars(load)}, indent=1) + "\n", "utf-8")
    if load.wrong:
        raise CnppError(f"{load.wrong} pictures were wrong")


def compare(pipeline: Pipeline, children: list[Child], cases: list[Case], rounds: int) -> dict[str, Any]:
    """Of each side in turn: seconds of one client, images per second of eight, and processor seconds of an image.

    The rate counts from the first eight images on: until then clients that begin at one moment are not yet together.
    """
    sides: dict[str, tuple[Callable[[list[Case], int], list[Span]], Callable[[], float]]] = {
        "bare pipeline": (partial(_bare, pipeline), time.process_time),
        **{child.name: (partial(_served, child.url), child.cpu) for child in children},
    }
    alone: dict[str, list[list[float]]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, dict[int, list[float]]] = {name: {1: [], TOGETHER: []} for name in sides}
    for _ in range(rounds):
        for together, asked in ((1, cases), (TOGETHER, cases * REPEATED)):
            for name, (run, cpu) in sides.items():
                before = cpu()
                spans = run(asked, together)
                used[name][together].append((cpu() - before) / len(spans))
                if together == 1:
                    alone[name].append([end - begin for begin, end in spans])
                else:
                    ends = sorted(end for _, end in spans)
                    rates[name].append((len(ends) - TOGETHER) / (ends[-1] - ends[TOGETHER - 1]))
    return {"alone": alone, "rates": rates, "cpu": used}


def _bare(pipeline: Pipeline, cases: list[Case], together: int) -> list[Span]:
    """Every case, so many in a batch."""
    spans = []
    for first in range(0, len(cases), together):
        began = time.perf_counter()
        pipeline.batch([case.request for case in cases[first : first + together]])
        spans += [(began, time.perf_counter())] * together
    return spans


def _served(url: str, cases: list[Case], together: int) -> list[Span]:
    """Every case, from so many clients at a time."""
    return asyncio.run(_timed(url, cases, together))


async def _timed(url: str, cases: list[Case], together: int) -> list[Span]:
    left: list[Case] = list(cases)
    spans: list[Span] = []
    answers: list[tuple[httpx.Response, Case]] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits) as client:

        async def work() -> None:
            while left:
                case, began = left.pop(), time.perf_counter()
                answer = await client.post("/v1/images/generations", json=case.body)
                spans.append((began, time.perf_counter()))
                answers.append((answer, case))

        await asyncio.gather(*(work() for _ in range(together)))
    for answer, case in answers:
        if not same_picture(answer, case):
            raise CnppError(f"{url} draws something else: {answer.status_code} {answer.text[:200]}")
    return spans


async def _load(child: Child, cases: list[Case], clients: int, seconds: float) -> Load:
    load, until = Load(), time.monotonic() + seconds
    pictures: list[tuple[httpx.Response, Case]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=child.url, timeout=600, trust_env=False, limits=limits) as client:

        async def watch() -> None:
            while time.monotonic() < until:
                load.memory.append(child.memory())
                await asyncio.sleep(2)

        work = (_client(client, cases, load, pictures, until, np.random.default_rng(i)) for i in range(clients))
        await asyncio.gather(watch(), *work)
    # Afterwards: reading an image would keep the other clients of this process from seeing their answers.
    load.wrong = sum(not same_picture(answer, case) for answer, case in pictures)
    return load


async def _client(
    client: httpx.AsyncClient,
    cases: list[Case],
    load: Load,
    pictures: list[tuple[httpx.Response, Case]],
    until: float,
    random: np.random.Generator,
) -> None:
    """One client: of its requests a tenth is left in the middle, a twentieth is malformed.

    Answers with a picture go to `pictures`, with what was asked for.
    """
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
            pictures.append((answer, case))
        elif answer.status_code == 429:
            load.rejected.append(spent)
            await asyncio.sleep(float(random.uniform(0.5, 1.5)))


def rejected_apart(url: str, body: dict[str, Any], seconds: float) -> list[float]:
    """Seconds of the rejections of one client, ten times a second: its process answers to no other client."""
    address, content = httpx.URL(url), json.dumps({**body, "timeout": 0.2})
    connection = http.client.HTTPConnection(address.host, address.port)
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        connection.request("POST", "/v1/images/generations", content, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status == 429:  # else there was a place in the queue, and the deadline ended it
            found.append(time.perf_counter() - began)
        time.sleep(0.1)
    return found


def same_picture(answer: httpx.Response, case: Case) -> bool:
    """Whether an answer has the pipeline's picture: a batch may differ from a single one by 1 of 255."""
    if answer.status_code != 200:
        return False
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    image = np.asarray(Image.open(io.BytesIO(data)))
    return bool(np.abs(image.astype(int) - case.image).max() <= 1)


def print_comparison(figures: dict[str, Any]) -> None:
    """Markdown; in brackets what a side takes more than the bare pipeline, and its share of that one's images."""
    print("| | one client: median (added) | p99 | processor time | eight: images/s (share) | processor time |")
    print("|---|---:|---:|---:|---:|---:|")
    alone, rates, used, bare = figures["alone"], figures["rates"], figures["cpu"], "bare pipeline"
    medians = {name: [statistics.median(spent) for spent in rounds] for name, rounds in alone.items()}
    for name, rounds in alone.items():
        added = statistics.median(own - other for own, other in zip(medians[name], medians[bare], strict=True))
        share = statistics.median(own / other for own, other in zip(rates[name], rates[bare], strict=True))
        cpu = {n: statistics.median(values) for n, values in used[name].items()}
        spent = [seconds for each in rounds for seconds in each]
        row = f"| {name} | {statistics.median(spent):.3f} s ({1000 * added:+.0f} ms) | {_p99(spent):.3f} s "
        row += f"| {cpu[1]:.3f} s | {statistics.median(rates[name]):.2f} ({share:.0%}) "
        print(f"{row}| {cpu[TOGETHER]:.3f} s |", flush=True)


def print_load(load: Load, clients: int, seconds: float) -> None:
    """Markdown."""
    print(f"\n{clients} clients for {seconds:g} s:\n")
    print("| | count | median | p99 |\n|---|---:|---:|---:|")
    rows = {
        "pictures": load.drawn,
        "rejections (429)": load.rejected,
        "the same, of a client in a process of its own": load.apart,
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


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


if __name__ == "__main__":
    typer.run(main)
