"""`--ray`: the same bytes on any number of workers, whoever dies."""

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import Pipeline
from cnpp_trt.batch.cluster import RayTeam, Worker
from cnpp_trt.batch.drawing import DrawingSettings
from cnpp_trt.batch.outputs import Outputs
from cnpp_trt.batch.rows import Job, RowReader
from cnpp_trt.errors import CnppError
from cnpp_trt.runtime.nodes import BundleOnNodes
from hints import hint


def test_without_ray_it_says_what_to_install(
    batch: Any, written: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = batch(written(mixed), "--ray", "local")
    assert outcome.status == 1
    [line] = outcome.err.splitlines()
    assert re.search(hint("ray"), line)


class EndsAtPoison(Worker):
    """Ends its process at a prompt."""

    def draw(self, jobs: list[Job], outputs: Outputs, settings: DrawingSettings) -> Any:
        if any(job.settings["prompt"] == "poison" for job in jobs):
            os._exit(1)
        return super().draw(jobs, outputs, settings)


class Poisoned(RayTeam):
    worker = EndsAtPoison


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("ray")
    yield module
    module.shutdown()


def workers_of(name: str) -> list[int]:
    """Processes of Ray that are actors of the driver that was started with this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes().split(b"\0")[0]
            environment = (path / "environ").read_bytes()
            if command.startswith(b"ray::Worker") and f"CNPP_TEST={name}\0".encode() in environment:
                found.append(int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestOnACluster:
    def test_the_same_bytes_on_two_workers(
        self, ray: Any, batch: Any, written: Any, mixed: Any, here: Path, tree: Any
    ) -> None:
        content = (here / "seg.png").read_bytes()
        image = {"bytes": base64.b64encode(content).decode()}
        embedded = {**mixed[0], "controls": [{"condition": "seg", "image": image}]}
        jobs = written([*mixed, {**embedded, "seed": 77}, mixed[0], "{"])
        assert batch(jobs, "--shards", 5, out="whole").status == 1
        outcome = batch(jobs, "--shards", 5, "--ray", "local", "--workers", 2)
        assert outcome.status == 1, outcome.err
        assert tree(here / "out") == tree(here / "whole")
        assert outcome.err.count("warning: ") == 1

    def test_workers_and_driver_are_killed(
        self, ray: Any, batch: Any, written: Any, mixed: Any, here: Path, tree: Any, lcm: Pipeline
    ) -> None:
        """Workers while it goes on, the driver in between, and another number of workers each time."""
        jobs = written([{**row, "seed": seed} for seed in range(12) for row in mixed])
        assert batch(jobs, out="whole").status == 0
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        line = [*line_of(jobs, here / "out", lcm), "--ray", "local"]
        env = {**os.environ, "CNPP_TEST": name}
        chosen = random.Random(1)
        killed = 0
        for workers, end_driver in ((2, True), (1, True), (2, False)):
            process = subprocess.Popen(
                [*line, "--workers", str(workers)],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True, start_new_session=True,
            )  # fmt: skip
            reached = count(here / "out") + 12
            until = time.monotonic() + 200
            while process.poll() is None and time.monotonic() < until:
                time.sleep(chosen.uniform(0.2, 0.6))
                if count(here / "out") >= reached and killed < 4:
                    alive = workers_of(name)
                    if alive:
                        os.kill(chosen.choice(alive), signal.SIGKILL)
                        killed += 1
                        reached += 12
                        if end_driver:
                            time.sleep(0.2)
                            process.kill()
            _, err = process.communicate(timeout=300)
            if not end_driver:
                assert process.returncode == 0, err
        assert killed >= 3
        assert tree(here / "out") == tree(here / "whole")

    def test_a_row_that_kills_workers_is_found(self, ray: Any, lcm: Pipeline, here: Path, mixed: Any) -> None:
        """The worker ends itself at this prompt, as one does that wants too much memory."""
        reader = RowReader(lcm.bundle, lambda _: here)
        rows = [{**mixed[0], "seed": i, "prompt": "poison" if i == 2 else "a house"} for i in range(5)]
        jobs = [reader.read(row, here) for row in rows]
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
        team = Poisoned("local", 2, BundleOnNodes.of(lcm.bundle, None), lcm_options())
        try:
            team.open()
            found = list(team.draw([jobs[:4], jobs[4:]], Outputs(here / "out"), DrawingSettings(batch_size=4)))
        finally:
            team.close()
        errors = {outcome.key: outcome.error for outcomes, _ in found for outcome in outcomes}
        assert len(errors) == 5
        for job, row in zip(jobs, rows, strict=True):
            assert ("workers that drew it died" in errors[job.key]) == (row["prompt"] == "poison")
        assert len(list((here / "out" / "images").rglob("*.png"))) == 4

    def test_a_cluster_that_is_not_there(self, ray: Any, batch: Any, written: Any, mixed: Any) -> None:
        outcome = batch(written(mixed), "--ray", "127.0.0.1:1")
        assert outcome.status == 1
        assert "cannot reach a Ray cluster at 127.0.0.1:1" in outcome.err.splitlines()[-1]

    def test_another_bundle_on_a_worker(self, ray: Any, lcm: Pipeline) -> None:
        team = RayTeam("local", 1, BundleOnNodes(str(lcm.bundle.folder), "0" * 64), lcm_options())
        with pytest.raises(CnppError, match="another bundle on a worker"):
            team.open()
        team.close()

    def test_the_bundle_is_fetched(
        self, ray: Any, batch: Any, written: Any, mixed: Any, here: Path, tree: Any, lcm: Pipeline
    ) -> None:
        """By the driver and the workers of this machine together once, from an address."""
        home = here / "home"
        line = [sys.executable, "-m", "cnpp_trt", "batch", str(written(mixed)), "--out", str(here / "out")]
        line += ["--bundle", f"file://{lcm.bundle.folder}", "--backend", "onnxruntime-cpu", "--threads", "1"]
        env = {**os.environ, "CNPP_TRT_HOME": str(home)}
        ended = subprocess.run(
            [*line, "--ray", "local", "--workers", "2"], capture_output=True, text=True, timeout=300, env=env
        )
        assert ended.returncode == 0, ended.stderr
        assert [path.name for path in (home / "fetched").iterdir()] == [lcm.bundle.digest[:32]]
        assert batch(here / "jobs.jsonl", out="whole").status == 0
        assert tree(here / "out") == tree(here / "whole")

    def test_nodes_come_and_go(
        self, ray: Any, batch: Any, written: Any, mixed: Any, here: Path, tree: Any, lcm: Pipeline
    ) -> None:
        """Two nodes of one CPU: one is removed while it draws, and another one is added."""
        jobs = written([{**row, "seed": seed} for seed in range(12) for row in mixed])
        assert batch(jobs, out="whole").status == 0
        pytest.importorskip("ray.cluster_utils")
        room: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
        cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=room)
        try:
            second = cluster.add_node(**room)
            process = subprocess.Popen(
                [*line_of(jobs, here / "out", lcm), "--ray", cluster.address, "--workers", "2", "--json"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            until = time.monotonic() + 120
            while count(here / "out") < 12 and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)
            cluster.add_node(**room)
            out, err = process.communicate(timeout=300)
        finally:
            cluster.shutdown()
        assert process.returncode == 0, err
        assert json.loads(out)["failed"] == 0
        assert tree(here / "out") == tree(here / "whole")


def line_of(jobs: Path, out: Path, lcm: Pipeline) -> list[str]:
    options = ["--bundle", str(lcm.bundle.folder), "--backend", "onnxruntime-cpu", "--threads", "1"]
    return [sys.executable, "-m", "cnpp_trt", "batch", str(jobs), "--out", str(out), *options]


def count(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder / "records"))


def lcm_options() -> Any:
    from cnpp_trt import RuntimeOptions

    return RuntimeOptions("onnxruntime-cpu", threads=1)
