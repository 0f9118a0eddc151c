"""The backend `openvino`: the bundle's ONNX graphs in OpenVINO on the CPU, on NumPy arrays that are shared with it."""

import shlex
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from ...bundles.bundle import Bundle, GraphSpec
from ...errors import BackendError, BundleError
from ...install import cannot_import
from ...telemetry import import_openvino
from .host_memory import OF_A_STEP, HostMemory, large_weights, unloaded_in_the_loop, view
from .interface import Buffer, Launch
from .mapped_pages import dropping_pages

PRECISIONS = ("f32", "bf16")

# Nearly all of a request's time. The other graphs stay float32 in every precision: the sampler's state is float32 by
# design (`update`), extractors score images, and text encoder and hints run once, for all steps to inherit their error.
# `vae_decoder_fp32` is there to be exact.
_BF16_GRAPHS = ("unet", "vae_decoder")

_Sizes = tuple[tuple[int, ...], ...]


class OpenVino(HostMemory):
    """A bundle's graphs in OpenVINO on the CPU.

    Memory: what is compiled has weights of its own, and those of the bundle's files leave the process's memory as soon
    as they were read. What is no part of a step gives back what it computed with: SD 1.5's decoder takes more than a
    step. Text encoder, image encoder and extractors of a large model are unloaded as soon as the loop begins, and
    compiled again when they are next needed.

    Args:
        threads: of OpenVINO; None leaves it to use every physical core, as it does for latency.
        precision: `f32` is exact, `bf16` computes the large networks in bfloat16.

    Raises:
        BackendError: OpenVINO is not installed, or does not have this precision on this CPU.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, precision: str = "f32") -> None:
        if precision not in PRECISIONS:
            raise BackendError(f"openvino has no precision {precision!r}: choose f32 or bf16")
        try:
            openvino = import_openvino()
        except ImportError as e:
            raise BackendError(cannot_import("the backend openvino", e)) from None
        self._ov = openvino
        self._core = openvino.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendError("this CPU has no bfloat16: take openvino's precision f32")
        # The mark of near-exactness: it goes into the images' metadata.
        self.name = "openvino" if precision == "f32" else f"openvino-{precision}"
        self._bundle = bundle
        self._precision = precision
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._graphs: dict[str, _Graph] = {}

    def load(self, graph: str) -> "_Graph":
        if graph not in self._graphs:
            # Graphs refer to this object weakly: in a cycle, a dropped pipeline's would stay until collected.
            self._graphs[graph] = _Graph(weakref.proxy(self), graph, self._bundle.graph(graph))
        return self._graphs[graph]

    def unload_idle(self) -> None:
        """What the loop does not need goes, where it is large."""
        for graph in self._graphs.values():
            if graph.occasional:
                graph.unload()

    def read(self, graph: str) -> Any:
        """The graph as OpenVINO's model, with its weights mapped from the bundle's file.

        Raises:
            BundleError: OpenVINO cannot read it.
        """
        path = self._bundle.graph_file(graph)
        try:
            return self._core.read_model(path)
        except Exception as e:  # OpenVINO's exceptions share no base class
            raise BundleError(
                f"OpenVINO cannot load {path} ({_line(e)[:200]}): "
                f"check the bundle with `cnpp-trt verify {shlex.quote(str(self._bundle.folder))}`"
            ) from e

    def precision_of(self, graph: str) -> str:
        """What the graph is computed in: `f32` or `bf16`."""
        return self._precision if graph in _BF16_GRAPHS or graph.startswith("controlnet_") else "f32"

    def compile(self, graph: str, model: Any) -> list[Any]:
        """Requests that together do what the model does, in their order; only the last one writes its outputs."""
        if self.precision_of(graph) == "f32":
            return [self._request(model, "f32")]
        head, tail, cuts = self._cut(model)
        if not cuts:
            return [self._request(model, self._precision)]
        first, second = self._request(head, "f32"), self._request(tail, self._precision)
        for i, name in enumerate(cuts):
            second.set_tensor(name, first.get_output_tensor(i))
        return [first, second]

    def _request(self, model: Any, precision: str) -> Any:
        # Said in f32 too: the CPU plugin takes bfloat16 of its own accord where there is hardware for it.
        options = {**self._options, "INFERENCE_PRECISION_HINT": precision}
        return self._core.compile_model(model, "CPU", options).create_infer_request()

    def weights_read_once(self, graph: str, model: Any) -> AbstractContextManager[None]:
        """For as long as a model is compiled: what is compiled has its own weights, and keeps the file's mapped."""
        if not large_weights(self._bundle, graph):
            return nullcontext()
        return dropping_pages([node.data for node in model.get_ops() if node.get_type_name() == "Constant"])

    def _cut(self, model: Any) -> tuple[Any, Any, list[str]]:
        """The model in two: up to the sines and cosines of the timestep, and from there on; and what joins them.

        OpenVINO would round their arguments to bfloat16, timestep 951 to 952, and each wave of the embedding to a phase
        of its own: on the miniature that doubles the ControlNet's error. Python has no way to keep single nodes in f32.
        """
        head, tail, cuts = model.clone(), model.clone(), []
        for wave in _waves(tail):
            entry = self._ov.opset13.parameter(wave.output(0).get_shape(), wave.output(0).get_element_type())
            cuts.append(f"precise_{wave.get_friendly_name()}")
            entry.output(0).set_names({cuts[-1]})
            wave.output(0).replace(entry.output(0))
            tail.add_parameters([entry])
        return self._ov.Model([w.output(0) for w in _waves(head)], head.get_parameters(), "head"), tail, cuts


def _waves(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]


class _Graph:
    """A graph compiled once for each set of sizes, and its launches.

    Compiled for any size it would be one copy of the weights instead of one for each, but take 1.5 times as long on the
    miniature (1.02 to 1.06 times on SD 1.5, whose UNet's copy is 3.5 GiB in f32). The launches of one size share a
    request, and each sets all its tensors before it runs: what an earlier one was bound to may be gone. Sizes that no
    launch is bound to any more are forgotten, but for the last two: an extraction binds anew for every image.

    The model itself goes as soon as it is compiled, and is read again for other sizes.
    """

    def __init__(self, backend: OpenVino, name: str, spec: GraphSpec) -> None:
        self._backend = backend
        self._name = name
        self._inputs = [tensor.name for tensor in spec.inputs]
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._model: Any = backend.read(name)  # at once: what is wrong with the file is known before anything runs
        self._compiled: WeakValueDictionary[_Sizes, _Compiled] = WeakValueDictionary()
        self._recent: deque[_Compiled] = deque(maxlen=2)
        self.occasional = unloaded_in_the_loop(backend._bundle, name)

    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        sizes = tuple(buffers[name].shape for name in self._inputs)
        compiled = self._compile(sizes)
        tensors = {
            name: self._backend._ov.Tensor(view(buffers[name]), shared_memory=True)
            for name in (*self._inputs, *self._outputs)
        }
        # The launch of a step keeps what is compiled for as long as it lives.
        take = partial(self._compile, sizes) if self.occasional else lambda: compiled
        return _Launch(self._backend, self._name, take, tensors, tuple(buffers.values()))

    def unload(self) -> None:
        self._recent.clear()

    def _compile(self, sizes: _Sizes) -> "_Compiled":
        compiled = self._compiled.get(sizes)
        if compiled is None:
            model, self._model = self._model or self._backend.read(self._name), None
            try:
                model.reshape({name: list(shape) for name, shape in zip(self._inputs, sizes, strict=True)})
                with self._backend.weights_read_once(self._name, model):
                    compiled = _Compiled(self._backend.compile(self._name, model))
            except Exception as e:
                raise BackendError(f"OpenVINO cannot compile {self._name}: {_line(e)[:300]}") from e
            self._compiled[sizes] = compiled
            self._recent.append(compiled)
        return compiled


class _Compiled:
    """A graph for one set of sizes: its own copy of the weights, and the requests that run it, one after the other."""

    def __init__(self, requests: list[Any]) -> None:
        self.requests = requests


class _Launch:
    """A graph with its buffers.

    Args:
        take: gives what is compiled, which is compiled again if it was unloaded.
    """

    def __init__(
        self,
        backend: OpenVino,
        name: str,
        take: Callable[[], _Compiled],
        tensors: dict[str, Any],
        buffers: tuple[Buffer, ...],
    ) -> None:
        self._backend = backend
        self._name = name
        self._take = take
        self._tensors = tensors
        self._of_a_step = name.startswith(OF_A_STEP)
        self._buffers = buffers  # held so that no address dies before the launch

    def __call__(self) -> None:
        if self._of_a_step:
            self._backend.unload_idle()
        *heads, request = self._take().requests
        try:
            for head in heads:  # what it computes depends on nothing but the timestep
                head.set_tensor("timestep", self._tensors["timestep"])
                head.infer()
            for name, tensor in self._tensors.items():
                request.set_tensor(name, tensor)
            request.infer()
            if not self._of_a_step:
                request.get_compiled_model().release_memory()
        except Exception as e:
            raise BackendError(f"OpenVINO failed in {self._name}: {_line(e)[:300]}") from e


def _line(e: Exception) -> str:
    return " ".join(str(e).split())
