"""`cnpp-trt demo` and `serve --demo` as commands."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("arguments", [("demo",), ("serve", "--demo")])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[demo]'")
    monkeypatch.delitem(sys.modules, "cnpp_trt.demo.routes", raising=False)
    monkeypatch.setitem(sys.modules, "websockets", None)
    line = refused(*arguments)
    assert f"cnpp-trt {' '.join(arguments)} needs websockets" in line
    assert "[demo]" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", 0, "--device", 0), "--device names one twice"),
        (("--backend", "openvino", "--backend", "openvino"), "--backend names one twice"),
        (("--backend", "openvin"), "openvin"),
        (("--token-file", "missing.txt"), "cannot read --token-file"),
        (("--bundle", "missing"), "missing"),
    ],
)
def test_what_cannot_be_served(refused: Callable[..., str], arguments: tuple[Any, ...], words: str) -> None:
    pytest.importorskip("websockets", reason="websockets is not installed: pip install 'cnpp-trt[demo]'")
    assert words in refused("demo", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("demo", "--model", "miniature-lcm"), ("serve", "--demo")])
def test_it_serves_the_page_and_ends_while_one_is_open(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
    command = [sys.executable, "-m", "cnpp_trt", *arguments, "--port", "0"]
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if line.startswith("serving "))
            address = line.partition(" at http://")[2].split()[0]
            with client.connect(f"ws://{address}/demo/ws", max_size=None) as socket:
                assert b'"hello"' in socket.recv(timeout=60)
                began = time.monotonic()
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
                assert time.monotonic() - began < 20
        finally:
            server.kill()


@pytest.mark.slow
def test_each_backend_draws_every_model_under_a_name_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[demo]'")
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'cnpp-trt[openvino]'")
    import numpy as np
    from cnpp_trt.bundles.embedded import assemble
    from cnpp_trt.runtime.settings.options import RuntimeOptions
    from cnpp_trt.service.service import Service

    assemble("miniature", tmp_path / "miniature")
    options = [RuntimeOptions(backend, threads=1) for backend in ("onnxruntime-cpu", "openvino")]
    service = Service.open([tmp_path / "miniature"], options)
    assert [model.id for model in service.models.all] == ["miniature-onnxruntime-cpu", "miniature-openvino"]
    assert service.models.find("miniature").id == "miniature-onnxruntime-cpu"
    first, second = (model.pipelines[0]("a house", seed=1).images for model in service.models.all)
    assert np.abs(first.astype(int) - second).max() <= 2
