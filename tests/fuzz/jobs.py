"""Rows of batch jobs: JSON lines and CSV."""

import csv
import io
from typing import Any

import numpy as np
from cnpp_trt import Bundle
from cnpp_trt.batch.filters import Filter
from cnpp_trt.batch.reading import read_lines
from cnpp_trt.batch.rows import RowReader
from cnpp_trt.errors import UserError
from hypothesis import strategies as st
from PIL import Image

from .kind import Kind, Place, put
from .mutations import STRINGS, damaged, documents

_ROW: dict[str, Any] = {
    "id": "1",
    "prompt": "a (red:1.2) house",
    "negative_prompt": "snow",
    "controls": [{"condition": "seg", "image": "map.png", "extract": False, "controlnet_conditioning_scale": 0.5}],
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "scheduler": "ddim",
    "seed": [1, 2],
    "num_images_per_prompt": 2,
    "init_image": {"bytes": "aGVsbG8=", "path": None},
    "strength": 0.5,
    "clip_skip": 0,
    "prompt_weights": True,
}
_FLAT: dict[str, Any] = {"prompt": "a house, red", "seed": 3, "condition": "seg", "image": "map.png", "extract": "true"}


def rows(place: Place) -> Kind:
    """A row, changed, between two that are right; and filters."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(place.folder / "map.png")
    reader = RowReader(Bundle.open(place.bundle), lambda content: put(place.folder / "kept", content))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_FLAT))
    writer.writeheader()
    writer.writerows([_FLAT, _FLAT])
    right = b'{"prompt": "x"}\n'
    lines = documents({**_ROW, "init_image": None}).map(lambda line: right + line.replace(b"\n", b" ") + b"\n" + right)

    def attempt(example: tuple[str, Any]) -> None:
        kind, content = example
        if kind == "filter":
            Filter.parse(content)
            return
        errors = []
        for line in read_lines(put(place.folder / f"jobs.{kind}", content)):
            if line.value is None:
                errors.append(line.error)
                continue
            try:
                reader.read(line.value, line.folder)
            except UserError as e:
                errors.append(str(e))
        for error in errors:
            raise UserError(error)

    return Kind(
        st.one_of(
            st.tuples(st.just("jsonl"), lines),
            st.tuples(st.just("jsonl"), documents(_ROW)),
            st.tuples(st.just("csv"), damaged(text.getvalue().encode())),
            st.tuples(
                st.just("filter"), st.one_of(st.sampled_from(STRINGS), st.text("score.g<>=8 andepth", max_size=60))
            ),
        ),
        attempt,
    )
