"""A batch job of many rows that draws nothing, for the memory of the process that leads it.

    python -m cnpp_trt.developer.batch_dry ROWS [--model miniature-lcm]

Everything but the pictures is real: rows are read and checked, arranged, handed out batch by batch, records and results
are written and read. Prints rows, seconds and the peak of the process's memory in MiB.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from ..batch.drawing import DrawingSettings, Outcome
from ..batch.job import JobSettings, run_job
from ..batch.outputs import ImageOfRecord, Outputs, RequestOfRecord
from ..batch.rows import Job
from ..bundles.bundle import Bundle, find_bundle


class DryTeam:
    """Writes a record and an empty picture for each request."""

    def open(self) -> str:
        """Returns the name of a backend."""
        return "onnxruntime-cpu"

    def draw(
        self, batches: Iterable[list[Job]], outputs: Outputs, settings: DrawingSettings
    ) -> Iterator[tuple[list[Outcome], float]]:
        """Yields the outcomes of each batch."""
        for jobs in batches:
            for job in jobs:
                file = outputs.image(job.key, 0)
                outputs.write(file, b"x")
                image = ImageOfRecord(
                    file=file,
                    size=1,
                    pixels_sha256="0" * 64,
                    seed=job.settings["seed"],
                    scores={"seg": 50.0},
                    tries=1,
                    passed=True,
                )
                prompt = job.settings["prompt"]
                outputs.write_record(RequestOfRecord(key=job.key, prompt=prompt, images=[image], controls=[], notes=[]))
            yield [Outcome(job.key, "", 1, (("seg", 50.0),), new=True) for job in jobs], 0.0

    def close(self) -> None:
        """Does nothing."""


def _main(rows: int, model: str = "miniature-lcm") -> None:
    os.fsync = lambda fd: None  # the disk is not what is measured
    bundle = Bundle.open(find_bundle(model, "fp32", None, ("fp32",)))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-dry-") as folder:
        jobs = Path(folder) / "rows.jsonl"
        with jobs.open("w", encoding="utf-8") as file:
            for i in range(rows):
                file.write(json.dumps({"prompt": f"a house and trees, number {i}", "seed": i}) + "\n")
        summary = run_job(JobSettings(jobs, Path(folder) / "out", bundle, 1), DryTeam())
        seconds = time.perf_counter() - start
    assert summary.counts.done == rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{rows:,} rows, {seconds:.1f} s, {peak / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(_main)
