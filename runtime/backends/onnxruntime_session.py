"""A graph in ONNX Runtime, bound by address: what its CPU and CUDA backends share."""

import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...bundles.bundle import Bundle
from ...errors import BackendError, BundleError
from ...install import install_command
from .interface import Buffer

OLDEST = "1.30"
"""As in pyproject.toml: graphs in fp32 are opset 23, whose Attention older versions do not have."""


class Session:
    """A graph of a bundle.

    Args:
        ort: the module onnxruntime.
        device: `cpu` or `cuda`: where the buffers are that it will be bound to.
        providers: of ONNX Runtime, as `InferenceSession` takes them.
        run_options: of every run.
        device_id: the index of the GPU.
        active: a context manager that every run is within: a GPU backend makes its CUDA context current there.
        rewrite: changes the ONNX file's bytes before they are loaded, or gives them back as they are.

    Raises:
        BundleError: ONNX Runtime cannot load the graph.
        BackendError: it is too old for the graph's operators.
    """

    def __init__(
        self,
        ort: Any,
        bundle: Bundle,
        graph: str,
        device: str,
        providers: list[Any],
        options: Any,
        run_options: Any = None,
        device_id: int = 0,
        active: Callable[[], AbstractContextManager[None]] = nullcontext,
        rewrite: Callable[[bytes], bytes] | None = None,
    ) -> None:
        path: Path = bundle.graph_file(graph)
        try:
            source: str | bytes = str(path)
            if rewrite is not None:
                content = path.read_bytes()
                rewritten = rewrite(content)
                if rewritten is not content:
                    source = rewritten
                    # Where the weights are that the bytes name.
                    options.add_session_config_entry(
                        "session.model_external_initializers_file_folder_path", str(path.parent)
                    )
            self.session = ort.InferenceSession(source, options, providers=providers)
        except Exception as e:  # ONNX Runtime's exceptions share no base class
            if re.search(r"official support for domain \S+ is till opset", str(e)):
                raise BackendError(
                    f"onnxruntime {ort.__version__} is too old for {path}: version {OLDEST} or newer is needed; "
                    f"{install_command('gpu' if device == 'cuda' else 'cpu')}"
                ) from e
            raise BundleError(
                f"ONNX Runtime cannot load {path} ({' '.join(str(e).split())[:200]}): "
                f"check the bundle with `cnpp-trt verify {shlex.quote(str(bundle.folder))}`"
            ) from e
        self._name = graph
        self._device = device
        self._device_id = device_id
        self._run_options = run_options
        self._active = active
        self._inputs = [tensor.name for tensor in self.session.get_inputs()]
        self._outputs = [tensor.name for tensor in self.session.get_outputs()]

    def bind(self, buffers: Mapping[str, Buffer]) -> "_Launch":
        binding = self.session.io_binding()
        for name in self._inputs:
            b = buffers[name]
            binding.bind_input(name, self._device, self._device_id, b.dtype.type, list(b.shape), b.address)
        for name in self._outputs:
            b = buffers[name]
            binding.bind_output(name, self._device, self._device_id, b.dtype.type, list(b.shape), b.address)
        return _Launch(self._name, self.session, binding, self._run_options, tuple(buffers.values()), self._active)


class _Launch:
    def __init__(
        self,
        name: str,
        session: Any,
        binding: Any,
        run_options: Any,
        buffers: tuple[Buffer, ...],
        active: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._name = name
        self._session = session
        self._binding = binding
        self._run_options = run_options
        self._active = active
        self._buffers = buffers  # held so that no address dies before the launch

    def __call__(self) -> None:
        with self._active():
            self._run()

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as e:
            raise BackendError(f"ONNX Runtime failed in {self._name}: {' '.join(str(e).split())[:300]}") from e
