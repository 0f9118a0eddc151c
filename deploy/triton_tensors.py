"""The tensors of the Triton model: which fields of a request they are, and how one becomes the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..messages import printable
from ..runtime.settings.request import Control, Request

Type = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT32", "TYPE_UINT64", "TYPE_FP32"]
Arrays = Mapping[str, NDArray[Any]]

CONDITION, CONTROL_IMAGE, EXTRACT = "condition", "control_image", "extract"


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model.

    Attributes:
        name: of the tensor; an input that is a field of `Request` or `Control` has its name.
        type: Triton's.
        dims: of one row; -1 is any size. A tensor has rows before that, one for each image.
        optional: whether a client may leave it out.
        help: what it is.
    """

    name: str
    type: Type
    dims: tuple[int, ...]
    optional: bool = True
    help: str = ""


INPUTS = (
    Tensor("prompt", "TYPE_STRING", (1,), optional=False, help="what the image shows, UTF-8"),
    Tensor("negative_prompt", "TYPE_STRING", (1,), help="what it does not show"),
    Tensor(CONDITION, "TYPE_STRING", (-1,), help="of each control: `seg`, `canny`, `hed`, `lineart` or `depth`"),
    Tensor(CONTROL_IMAGE, "TYPE_UINT8", (-1, -1, -1, 3), help="of each control, RGB; brought to the model's size"),
    Tensor(EXTRACT, "TYPE_BOOL", (-1,), help="of each control: whether its image is a photo to extract it from"),
    Tensor("controlnet_conditioning_scale", "TYPE_FP32", (-1,), help="of each control"),
    Tensor("control_guidance_start", "TYPE_FP32", (-1,), help="of each control: the share of steps where it begins"),
    Tensor("control_guidance_end", "TYPE_FP32", (-1,), help="of each control: where it ends"),
    Tensor("num_inference_steps", "TYPE_INT32", (1,), help="steps"),
    Tensor("guidance_scale", "TYPE_FP32", (1,), help="of classifier-free guidance"),
    Tensor("scheduler", "TYPE_STRING", (1,), help="the sampler's name"),
    Tensor("seed", "TYPE_UINT64", (1,), help="of the noise; random where it is left out"),
    Tensor("init_image", "TYPE_UINT8", (-1, -1, 3), help="the image to begin with, RGB"),
    Tensor("strength", "TYPE_FP32", (1,), help="how much of the schedule runs on that image"),
    Tensor("clip_skip", "TYPE_INT32", (1,), help="how many of the text encoder's last layers are left out"),
    Tensor("clip_skip_negative", "TYPE_BOOL", (1,), help="of the negative prompt too"),
    Tensor("long_prompt", "TYPE_BOOL", (1,), help="prompts of more than 77 tokens are read in chunks"),
    Tensor("prompt_weights", "TYPE_BOOL", (1,), help="emphasis in the prompts is read"),
    Tensor("guess_mode", "TYPE_BOOL", (1,), help="as in diffusers"),
    Tensor("timestep_spacing", "TYPE_STRING", (1,), help="where the time steps lie: `ays`, `karras` or `trailing`"),
    Tensor("guidance_start", "TYPE_FP32", (1,), help="the share of steps where guidance begins"),
    Tensor("guidance_end", "TYPE_FP32", (1,), help="where it ends"),
    Tensor("guidance_interval", "TYPE_INT32", (1,), help="guidance is computed at every so many-th step"),
    Tensor("controlnet_interval", "TYPE_INT32", (1,), help="the ControlNets run at every so many-th step"),
    Tensor("cache_interval", "TYPE_INT32", (1,), help="the whole UNet runs at every so many-th step"),
)
"""Names are those of `Request` and of `Control`, which say more of each."""

_OF_CONTROLS = tuple(t.name for t in INPUTS if t.name.startswith(("controlnet_conditioning_", "control_guidance_")))
_OF_REQUEST = tuple(t.name for t in INPUTS if t.dims == (1,))


def outputs(width: int, height: int) -> tuple[Tensor, ...]:
    """The outputs of a model whose images have this size in pixels."""
    return (
        Tensor("image", "TYPE_UINT8", (height, width, 3), help="RGB"),
        Tensor("seed", "TYPE_UINT64", (1,), help="of the noise, also where it was random"),
        Tensor("score", "TYPE_FP32", (-1,), help="of each control, as `Pipeline.score`; NaN without an extractor"),
        Tensor("notes", "TYPE_STRING", (1,), help="what was changed or dropped, one line each"),
    )


@dataclass(frozen=True, eq=False)
class Row:
    """An image that was asked for.

    Attributes:
        request: without the conditions of photos.
        controls: of the request.
        photos: of each control, whether its image is a photo.
    """

    request: Request
    controls: tuple[Control, ...]
    photos: tuple[bool, ...]


def read_rows(arrays: Arrays) -> list[Row]:
    """The rows of a request to Triton, from the tensors that it has.

    Args:
        arrays: by the names of `INPUTS`; the first dimension of each counts the rows.

    Raises:
        UserError: a value cannot be used, or tensors disagree on the number of rows or controls.
    """
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise UserError(f"tensors have different numbers of rows: {_shown(counts)}")
    if not counts["prompt"]:
        raise UserError("the request has no rows: give a prompt for each image")
    return [_row({name: array[i] for name, array in arrays.items()}) for i in range(len(arrays["prompt"]))]


def _row(values: Arrays) -> Row:
    settings: dict[str, Any] = {name: _plain(values[name][0]) for name in _OF_REQUEST if name in values}
    if "init_image" in values:
        settings["init_image"] = values["init_image"]
    given = {name: values[name] for name in (CONDITION, CONTROL_IMAGE, EXTRACT, *_OF_CONTROLS) if name in values}
    if given and not (CONDITION in given and CONTROL_IMAGE in given):
        raise UserError(f"a control needs {CONDITION} and {CONTROL_IMAGE}: {_shown(dict.fromkeys(given, 'given'))}")
    counts = {name: len(value) for name, value in given.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"tensors have different numbers of controls: {_shown(counts)}")
    n = len(given.get(CONDITION, ()))
    controls = [
        Control(
            _plain(given[CONDITION][i]),
            given[CONTROL_IMAGE][i],
            **{name: _plain(given[name][i]) for name in _OF_CONTROLS if name in given},
        )
        for i in range(n)
    ]
    photos = tuple(bool(flag) for flag in given.get(EXTRACT, np.zeros(n, bool)))
    return Row(Request(**settings, controls=controls), tuple(controls), photos)


def _plain(value: Any) -> Any:
    """A value as `Request` takes it.

    Raises:
        UserError: a text is no UTF-8.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{printable(repr(value), 60)} is no UTF-8") from None
    return value.item() if isinstance(value, np.generic) else value


def _shown(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
