"""Figures for Prometheus: queues, batches, seconds by stage, scores, device memory."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .workers import OnBatch

if TYPE_CHECKING:
    from .models import Models, ServedModel
    from .tasks import Outcome, Task

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SCORES = (0.2, 0.4, 0.6, 0.8, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self._requests = Counter("cnpp_trt_requests", "Requests by route and status.", ["route", "status"], registry=r)
        self._latency = Histogram(
            "cnpp_trt_request_seconds", "From the first byte to the last.", ["route"], buckets=_SECONDS, registry=r
        )
        self._rejected = Counter("cnpp_trt_rejected", "Requests that were not accepted.", ["reason"], registry=r)
        self._batches = Histogram(
            "cnpp_trt_batch_images", "Images drawn together.", ["model"], buckets=range(1, 17), registry=r
        )
        self._waited = Histogram("cnpp_trt_queue_seconds", "In the queue.", ["model"], buckets=_SECONDS, registry=r)
        self._stages = Histogram(
            "cnpp_trt_stage_seconds", "Of a batch, by stage.", ["model", "stage"], buckets=_SECONDS, registry=r
        )
        self._images = Counter("cnpp_trt_images", "Images drawn.", ["model"], registry=r)
        self._scores = Histogram(
            "cnpp_trt_consistency",
            "Scores of the images whose clients asked for them.",
            ["model", "condition", "metric"],
            buckets=_SCORES,
            registry=r,
        )
        self._depth = Gauge("cnpp_trt_queue_depth", "Requests that wait.", ["model"], registry=r)
        self._running = Gauge("cnpp_trt_running", "Requests that are being drawn.", ["model"], registry=r)
        self._ready = Gauge("cnpp_trt_ready", "Whether the warm-up is over.", ["model"], registry=r)
        self._memory = Gauge("cnpp_trt_device_memory_bytes", "Peak by part.", ["model", "device", "part"], registry=r)

    def watch(self, models: "Models") -> None:
        """Gauges read these models when they are asked for."""
        self._models = models
        for model in models.all:
            self._depth.labels(model.id).set_function(partial(_waiting, model))
            self._running.labels(model.id).set_function(partial(_running, model))
            self._ready.labels(model.id).set_function(partial(_ready, model))

    def batch_of(self, model: str) -> OnBatch:
        """What a worker of this model tells of its batches."""

        def tell(done: Sequence[tuple["Task", "Outcome"]], seconds: float) -> None:
            if not done:
                return
            self._batches.labels(model).observe(done[0][1].batch)
            for stage, spent in done[0][1].result.timings.items():
                self._stages.labels(model, stage).observe(spent)
            for _, outcome in done:
                self._waited.labels(model).observe(outcome.waited)
                self._images.labels(model).inc(len(outcome.result.images))
                for control in outcome.scores:
                    for score in control.scores:
                        self._scores.labels(model, control.condition, score.metric).observe(score.value)

        return tell

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was not accepted."""
        self._rejected.labels(reason).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        for model in self._models.all:
            self._read_memory(model)
        return generate_latest(self._registry)

    def _read_memory(self, model: "ServedModel") -> None:
        for i, pipeline in enumerate(model.pipelines):
            for part, nbytes in pipeline.backend.memory().items():
                self._memory.labels(model.id, str(i), part).set(nbytes)


def _waiting(model: "ServedModel") -> float:
    return len(model.queue)


def _running(model: "ServedModel") -> float:
    return sum(len(worker.running) for worker in model.workers)


def _ready(model: "ServedModel") -> float:
    return float(model.ready)
