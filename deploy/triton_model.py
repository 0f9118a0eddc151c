"""The Python model of a Triton model repository, around `Pipeline.batch`. Triton imports it; nothing else does."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CnppError, UserError
from ..messages import one_line
from ..runtime.control.extraction import can_extract
from ..runtime.isolation import isolated
from ..runtime.pipeline import Pipeline
from ..runtime.result import Result
from ..runtime.settings.options import RuntimeOptions
from ..runtime.settings.request import Request
from .triton_tensors import INPUTS, Row, read_rows

BUNDLE = "bundle"
"""The folder of the bundle in that of a version."""


class TritonPythonModel:
    """Draws what Triton's scheduler hands over, together where it can run together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle of this version on the device of this instance.

        Args:
            args: Triton's: the model's folder, version and configuration, and the instance's kind and device.
        """
        self._server: Any = import_module("triton_python_backend_utils")  # of Triton's own process
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        options = RuntimeOptions(
            given["backend"],
            device=int(args["model_instance_device_id"]) if on_gpu else 0,
            threads=int(given["threads"]) if given.get("threads") else None,
            plans=given.get("plans") or None,
        )
        self._most = max(1, int(config["max_batch_size"]))
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._pipeline = Pipeline.open(folder, options)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request, in their order. One that fails costs the others nothing."""
        read = [self._read(request) for request in requests]
        rows = [row for found in read if isinstance(found, list) for row in found]
        drawn = iter(isolated(rows, self._draw))
        responses = []
        for request, found in zip(requests, read, strict=True):
            if isinstance(found, list):
                responses.append(self._answer(request, found, [next(drawn) for _ in found]))
            else:
                responses.append(self._refused(found))
        return responses

    def finalize(self) -> None:
        """Frees the pipeline."""
        self._pipeline.close()

    def _read(self, request: Any) -> list[Row] | CnppError:
        arrays = {}
        for tensor in INPUTS:
            found = self._server.get_input_tensor_by_name(request, tensor.name)
            if found is not None:
                arrays[tensor.name] = found.as_numpy()
        try:
            return read_rows(arrays)
        except CnppError as e:
            return e

    def _draw(self, rows: Sequence[Row]) -> list[Result]:
        return self._pipeline.batch([self._prepared(row) for row in rows], max_images=self._most)

    def _prepared(self, row: Row) -> Request:
        """The request, with the conditions of its photos."""
        if not any(row.photos):
            return row.request
        controls = [
            replace(control, image=self._pipeline.extract(control.condition, control.pixels)) if photo else control
            for control, photo in zip(row.controls, row.photos, strict=True)
        ]
        return replace(row.request, controls=controls)

    def _answer(self, request: Any, rows: list[Row], results: list[Result | CnppError]) -> Any:
        done = []
        for result in results:
            if isinstance(result, CnppError):
                return self._refused(result)
            done.append(result)
        arrays: dict[str, NDArray[Any]] = {
            "image": np.concatenate([result.images for result in done]),
            "seed": np.array([[result.seed] for result in done], np.uint64),
            "notes": np.array([["\n".join(result.notes).encode()] for result in done], np.object_),
        }
        asked = request.requested_output_names()
        if "score" in asked:
            try:
                arrays["score"] = np.array([self._scores(result) for result in done], np.float32)
            except CnppError as e:
                return self._refused(e)
        tensors = [self._server.Tensor(name, array) for name, array in arrays.items() if name in asked]
        return self._server.InferenceResponse(output_tensors=tensors)

    def _scores(self, result: Result) -> list[float]:
        pipeline = self._pipeline
        return [
            pipeline.score(control.condition, given, result.images[0]).value
            if can_extract(pipeline.bundle, control.condition)
            else float("nan")
            for control, given in zip(result.request.controls, result.control_images, strict=True)
        ]

    def _refused(self, error: CnppError) -> Any:
        code = self._server.TritonError.INVALID_ARG if isinstance(error, UserError) else None
        text = one_line(error, 1000)
        shown = self._server.TritonError(text) if code is None else self._server.TritonError(text, code)
        return self._server.InferenceResponse(error=shown)
