"""Tensors to requests, without a server."""

from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Request
from cnpp_trt.deploy.triton_tensors import INPUTS, read_rows
from cnpp_trt.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

IMAGE = np.zeros((1, 1, 8, 8, 3), np.uint8)
SEG = np.array([[b"seg"]], np.object_)
PROMPT = np.array([[b"a house"]], np.object_)
TYPES: dict[str, Any] = {
    "TYPE_BOOL": np.bool_, "TYPE_UINT8": np.uint8, "TYPE_INT32": np.int32, "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
}  # fmt: skip


def test_every_field_of_a_request_has_a_tensor() -> None:
    """But for the number of images, which rows are, and the controls, whose fields are tensors."""
    names = {tensor.name for tensor in INPUTS}
    assert set(Request.__dataclass_fields__) - {"controls", "num_images_per_prompt"} <= names
    assert set(Control.__dataclass_fields__) - {"image"} <= names
    others = {"control_image", "extract"}
    assert names == {*Request.__dataclass_fields__, *Control.__dataclass_fields__, *others} - {
        "controls", "num_images_per_prompt", "image",
    }  # fmt: skip


def test_what_is_left_out_is_the_requests_own() -> None:
    [row] = read_rows({"prompt": PROMPT})
    for name in ("num_inference_steps", "guidance_scale", "scheduler", "seed", "strength", "guess_mode"):
        assert getattr(row.request, name) == getattr(Request("a house"), name)
    assert (row.controls, row.photos) == ((), ())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": PROMPT[:0]}, "has no rows"),
        ({"seed": np.zeros((2, 1), np.uint64)}, "different numbers of rows: prompt 1, seed 2"),
        ({"condition": SEG}, "a control needs condition and control_image"),
        ({"control_image": IMAGE}, "a control needs condition and control_image"),
        ({"control_guidance_end": np.ones((1, 1), np.float32)}, "a control needs condition and control_image"),
        (
            {"condition": SEG, "control_image": IMAGE, "extract": np.ones((1, 2), bool)},
            "different numbers of controls: condition 1, control_image 1, extract 2",
        ),
        ({"condition": SEG, "control_image": IMAGE[:, :, :0]}, "image"),
        ({"prompt": np.array([[b"\xff"]], np.object_)}, "is no UTF-8"),
        ({"guidance_scale": np.full((1, 1), np.nan, np.float32)}, "guidance_scale must be a number"),
        ({"num_inference_steps": np.array([[-1]], np.int32)}, "num_inference_steps must be a whole number"),
    ],
)
def test_what_cannot_be_read(more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_rows({"prompt": PROMPT, **more})


@st.composite
def tensors(draw: Any) -> dict[str, np.ndarray]:
    """Of the types and ranks that config.pbtxt has, which Triton checks before; of any sizes and values."""
    found = {}
    for tensor in INPUTS:
        if tensor.optional and not draw(st.booleans()):
            continue
        rows = draw(st.sampled_from([1, 1, 1, 2]))
        sizes = tuple(draw(st.integers(0, 3)) if size == -1 else size for size in tensor.dims)
        if tensor.type == "TYPE_STRING":
            content = arrays.arrays(np.object_, (rows, *sizes), elements=st.binary(max_size=8), fill=st.nothing())
        else:
            content = arrays.arrays(TYPES[tensor.type], (rows, *sizes))
        found[tensor.name] = draw(content)
    return found


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_any_tensors_are_read_or_refused_in_one_line(found: dict[str, np.ndarray]) -> None:
    try:
        rows = read_rows(found)
    except UserError as e:
        assert str(e).isprintable()
    else:
        assert len(rows) == len(found["prompt"])
