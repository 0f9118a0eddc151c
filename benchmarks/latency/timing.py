"""How fast: contenders run the same requests in turn, each in its own process; and each once from a cold start."""

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, CnppError
from ...runtime.output.metadata import image_from_base64, image_to_base64
from ...runtime.settings.request import ResolvedRequest
from ..environment import gpu_memory, gpu_memory_used, memory_bytes
from ..image_metrics import max_difference, psnr
from ..records import Case, Cold, CompetitorResult, Timed, TimedCase
from ..statistics import Summary, paired_ratio, summarize
from .competitors import BY_NAME, CompetitorSpec, WorkerConfig
from .worker import request_to_json

logger = logging.getLogger(__name__)

# The index-th request of a case: every round has one of its own, so that no contender takes it from a cache.
Requests = Callable[[Case, int], ResolvedRequest]

# Bytes of the host's memory and of the device's.
Pair = tuple[int, int]

# Weights, activations and what the warm-up leaves: processes that together need more are not held at once.
_MEMORY_SHARE = 0.85
MIN_ROUNDS = 3
_COLD_SECONDS = 30.0
# Up to here `cases` samples as few-step models are sampled.
FEW_STEPS = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class TimingPlan:
    """The cases of a benchmark and how long each is measured.

    Attributes:
        rounds: of the base case; the other cases get a quarter of it, at least 3.
        seconds: after which a case has no further round, once it has 3.
        cold_rounds: processes started anew for each contender.
    """

    cases: tuple[Case, ...]
    rounds: int = 20
    seconds: float = 60.0
    cold_rounds: int = 3


class Process:
    """A contender's process.

    Raises:
        BackendError: the process answers with an error, to its start or a question.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.name = config.name
        command = [sys.executable, "-m", "cnpp_trt.benchmarks.latency.worker", config.name]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        given = asdict(config)
        given["bundles"] = {size: str(folder) for size, folder in config.bundles.items()}
        try:
            self.ask(given)
        except BackendError:
            self.close()
            raise

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Sends an order and waits for its answer.

        Raises:
            BackendError: the process failed or ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            last = [" ".join(line.split()) for line in self._said if line.strip()][-1:]
            raise BackendError(": ".join([f"its process died (exit status {status})", *last]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BackendError(answer["error"])
        return answer

    def peak_bytes(self) -> int:
        """Of host memory, so far."""
        peak: int = self.ask({"do": "peak_bytes"})["peak_bytes"]
        return peak

    def close(self) -> None:
        """Ends the process. It has nothing to save, and while it imports PyTorch it would not notice for seconds."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._said.close()


@dataclass(frozen=True)
class Timings:
    """What was measured: who took part, every case, and the cold starts by competitor."""

    contenders: list[CompetitorResult]
    cases: list[TimedCase]
    cold: dict[str, Cold]


def time_competitors(
    configs: Sequence[tuple[CompetitorSpec, WorkerConfig | str]], plan: TimingPlan, requests: Requests
) -> Timings:
    """Runs the contest.

    Args:
        configs: each contender with what opens it, or the reason why it cannot take part. The first that works is the
            baseline.
        plan: the cases and how long each is measured.
        requests: makes the index-th request of a case.

    Raises:
        CnppError: no contender works.
    """
    reasons = {spec.name: config for spec, config in configs if isinstance(config, str)}
    specs = {spec.name: spec for spec, _ in configs}
    able = {spec.name: config for spec, config in configs if isinstance(config, WorkerConfig)}
    base = next(case for case in plan.cases if case["base"])
    cold: dict[str, Cold] = {}
    for name, config in able.items():
        logger.info(f"{name}: cold starts")
        try:
            cold[name] = _cold(config, request_to_json(requests(base, 0)), plan.cold_rounds)
        except BackendError as e:
            reasons[name] = str(e)
            logger.info(f"{name}: {e}")
    names = [name for name in able if name in cold]
    if not names:
        raise CnppError("no contender works here: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))

    cases: list[TimedCase] = [TimedCase(case=case, runs={}) for case in plan.cases]
    peaks = {name: (cold[name]["host_bytes"], cold[name]["device_bytes"] or 0) for name in names}
    for group in groups(names, peaks, (memory_bytes(), gpu_memory())):
        with _processes([able[name] for name in group]) as processes:
            for timed in cases:
                taking_part = [p for p in processes if timed["case"]["base"] or specs[p.name].everywhere]
                if len(taking_part) > 1 or len(names) == 1:
                    found = _time_case(taking_part, timed["case"], plan, requests)
                    # The baseline is measured again beside every group; its figures are those of the first.
                    timed["runs"] |= {name: run for name, run in found.items() if name not in timed["runs"]}
    order = sorted(specs, key=lambda name: name not in cold)
    listed = [
        CompetitorResult(
            name=name,
            title=specs[name].title,
            precision=specs[name].precision,
            available=name in cold,
            reason=reasons.get(name, ""),
        )
        for name in order
    ]
    return Timings(listed, cases, cold)


def groups(names: Sequence[str], peaks: Mapping[str, Pair], memory: Pair) -> list[list[str]]:
    """Who is measured together: the first, the baseline, in every group, and as many others as memory holds.

    Args:
        names: of the contenders.
        peaks: the most bytes of host and of device memory that each held in its cold starts.
        memory: bytes of the host and of the device.
    """
    baseline, *others = names
    found: list[list[str]] = [[baseline]]
    for name in others:
        held = [sum(peaks[n][i] for n in (*found[-1], name)) for i in range(2)]
        if len(found[-1]) > 1 and any(h > _MEMORY_SHARE * m for h, m in zip(held, memory, strict=True)):
            found.append([baseline])
        found[-1].append(name)
    return found


def _cold(config: WorkerConfig, request: dict[str, Any], rounds: int) -> Cold:
    """Processes started anew; one that takes long, as one that compiles does, is started once."""
    seconds: list[float] = []
    host, device = 0, None
    while len(seconds) < rounds and sum(seconds) < _COLD_SECONDS:
        before = gpu_memory_used()
        start = time.perf_counter()
        process = Process(config)
        try:
            process.ask({"do": "generate", "request": request})
            seconds.append(time.perf_counter() - start)
            if before is not None and (used := gpu_memory_used()) is not None:
                device = max(device or 0, used - before)
            host = max(host, process.peak_bytes())
        finally:
            process.close()
    return Cold(seconds=summarize(seconds), host_bytes=host, device_bytes=device)


@contextmanager
def _processes(configs: Iterable[WorkerConfig]) -> Iterator[list[Process]]:
    processes: list[Process] = []
    try:
        for config in configs:
            processes.append(Process(config))
        yield processes
    finally:
        for process in processes:
            process.close()


def _time_case(processes: Sequence[Process], case: Case, plan: TimingPlan, requests: Requests) -> dict[str, Timed]:
    """Rounds in which each contender runs the round's request, after a warm-up whose pictures are compared."""
    logger.info(f"{describe(case)}: {', '.join(p.name for p in processes)}")
    baseline = processes[0].name
    pictures: dict[str, NDArray[np.uint8]] = {}
    for process in processes:
        try:
            warm = request_to_json(requests(case, 0))
            picture = process.ask({"do": "picture", "request": warm})["image"]
            if BY_NAME[process.name].device == "gpu":  # what ran once is recorded before it runs again
                process.ask({"do": "generate", "request": request_to_json(requests(case, 1))})
        except BackendError as e:  # too little memory for so many images, or no plan for them
            logger.info(f"{process.name} leaves this case out: {e}")
            continue
        pictures[process.name] = image_from_base64(picture)
    processes = [process for process in processes if process.name in pictures]
    if not processes:
        return {}

    def generate(process: Process, k: int) -> float:
        seconds: float = process.ask({"do": "generate", "request": request_to_json(requests(case, k + 2))})["seconds"]
        return seconds

    rounds = plan.rounds if case["base"] else max(MIN_ROUNDS, plan.rounds // 4)
    whole = _rounds(processes, rounds, plan.seconds, generate)
    stages: dict[str, list[dict[str, float]]] = {process.name: [] for process in processes}
    if case["base"]:
        seen = len(whole[processes[0].name]) + 2

        def by_stage(process: Process, k: int) -> dict[str, float]:
            return _stages(process, requests(case, k + seen))

        stages = _rounds(processes, max(MIN_ROUNDS, rounds // 2), plan.seconds, by_stage)
    found = {}
    for name, seconds in whole.items():
        timed = Timed(whole=summarize(seconds), stages=_summaries(stages[name]))
        if name != baseline and baseline in whole:
            timed["ratio"] = paired_ratio(whole[baseline], seconds)
            timed["max_difference"] = max_difference(pictures[baseline], pictures[name])
            timed["psnr"] = psnr(pictures[baseline], pictures[name])
        found[name] = timed
    return found


def _rounds(
    processes: Sequence[Process], rounds: int, seconds: float, work: Callable[[Process, int], _T]
) -> dict[str, list[_T]]:
    """`work` of every process in turn, `rounds` times, or until `seconds` have gone."""
    found: dict[str, list[_T]] = {process.name: [] for process in processes}
    start = time.perf_counter()
    for k in range(rounds):
        if k >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for process in processes:
            found[process.name].append(work(process, k))
    return found


def _stages(process: Process, request: ResolvedRequest) -> dict[str, float]:
    stages: dict[str, float] = process.ask({"do": "stages", "request": request_to_json(request)})["stages"]
    (control,) = request.controls
    order = {"do": "extract", "condition": control.condition, "image": image_to_base64(control.pixels)}
    seconds = process.ask(order)["seconds"]
    return stages if seconds is None else {**stages, "extraction": seconds}


def _summaries(rounds: Sequence[dict[str, float]]) -> dict[str, Summary]:
    names = dict.fromkeys(stage for found in rounds for stage in found)
    # What was computed for an earlier request, as time embeddings of the same schedule, takes no time.
    return {stage: summarize([found.get(stage, 0.0) for found in rounds]) for stage in names}


def cases(
    sizes: Sequence[tuple[int, int]],
    images: Sequence[int],
    steps: Sequence[int],
    request: ResolvedRequest,
    few_step: bool = True,
) -> tuple[Case, ...]:
    """The base case, and around it one case for every other size, number of images and number of steps.

    The base has the first of each.

    Args:
        sizes: (width, height) of images.
        images: how many a request has.
        steps: of the sampler.
        request: whose scheduler and guidance scale they have.
        few_step: up to `FEW_STEPS` steps are sampled as few-step models are, with LCM and without guidance.
    """

    def case(size: tuple[int, int], n: int, step_count: int, base: bool = False) -> Case:
        few = few_step and step_count <= FEW_STEPS
        return Case(
            width=size[0],
            height=size[1],
            images=n,
            steps=step_count,
            scheduler="lcm" if few else request.scheduler,
            guidance_scale=1.0 if few else request.guidance_scale,
            base=base,
        )

    return (
        case(sizes[0], images[0], steps[0], base=True),
        *(case(sizes[0], n, steps[0]) for n in images[1:]),
        *(case(sizes[0], images[0], n) for n in steps[1:]),
        # Sizes last: a process holds the weights of one size at a time.
        *(case(size, images[0], steps[0]) for size in sizes[1:]),
    )


def sampling(case: Case) -> dict[str, Any]:
    """The fields of `ResolvedRequest` that a case sets."""
    return {
        "num_inference_steps": case["steps"],
        "num_images_per_prompt": case["images"],
        "scheduler": case["scheduler"],
        "guidance_scale": case["guidance_scale"],
    }


def describe(case: Case) -> str:
    """A case in a few words, as in `512x512, 20 steps, guidance 7.5, 1 image`."""
    guided = f"guidance {case['guidance_scale']:g}" if case["guidance_scale"] > 1 else "no guidance"
    images = f"{case['images']} image{'s' if case['images'] > 1 else ''}"
    return f"{case['width']}x{case['height']}, {images}, {case['steps']} steps of {case['scheduler']}, {guided}"
