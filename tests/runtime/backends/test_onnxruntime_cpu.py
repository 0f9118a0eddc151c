"""The backend `onnxruntime-cpu`: what it does to save memory changes nothing in what it draws."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.runtime.backends import host_memory


def test_graphs_are_unloaded_while_the_loop_runs_and_loaded_again(
    model, sessions: list[str], monkeypatch: pytest.MonkeyPatch, control_image: Any
) -> None:
    request = Request("a house", controls=Control("seg", control_image(*model.size)), num_inference_steps=2, seed=3)
    expected = model.pipeline(request).images
    monkeypatch.setattr(host_memory, "LARGE", 0)
    pipeline = Pipeline.open(model.bundle, "onnxruntime-cpu")
    del sessions[:]
    assert np.array_equal(pipeline(request).images, expected)
    once = Counter(sessions)
    pipeline(request)  # its prompt and its condition are known
    assert Counter(sessions) == once
    pipeline(Request("a tree", controls=request.controls, num_inference_steps=2, seed=3))
    again = Counter(sessions) - once
    assert again == {"text_encoder": 1, "text_kv": 1, "text_kv_seg": 1}


def test_sessions_of_several_pipelines_share_an_arena(model, control_image: Any) -> None:
    request = Request("a house", controls=Control("seg", control_image(*model.size)), num_inference_steps=2, seed=3)
    first, second = (Pipeline.open(model.bundle, "onnxruntime-cpu", threads=1) for _ in range(2))
    assert np.array_equal(first(request).images, second(request).images)
    first.close()
    assert np.array_equal(second(request).images, second(request).images)
