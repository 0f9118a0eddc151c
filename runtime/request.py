"""What a user asks for. Names are diffusers'; everything is checked when the object is made."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable
from .sampling.schedulers import SCHEDULERS

MAX_IMAGES = 16
MAX_STEPS = 1000
MAX_CONTROLS = 16
MAX_PROMPT = 100_000
# Scales beyond this overflow float16, and long before that every picture is noise.
MAX_SCALE = 1e4


@dataclass(frozen=True, eq=False)
class Control:
    """A condition with its image.

    Attributes:
        condition: `seg`, `canny`, `hed`, `lineart` or `depth`.
        image: the control image, uint8 [H,W,3] RGB; of another size than the bundle's it is resized. The control keeps
            a copy, which cannot be written to: an array that is filled anew afterwards, as a camera's, changes nothing.
        controlnet_conditioning_scale: factor on the ControlNet's residuals.
        control_guidance_start, control_guidance_end: share of the steps at which the ControlNet starts and stops
            applying, 0 ≤ start < end ≤ 1.
    Raises: UserError
    """

    condition: str
    image: NDArray[np.uint8]
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.condition, str) or self.condition not in CONDITIONS:
            raise UserError(f"unknown condition {self.condition!r}: choose from {', '.join(CONDITIONS)}")
        object.__setattr__(self, "image", _own_image(f"the {self.condition} image", self.image))
        for name in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if not 0 <= self.control_guidance_start < self.control_guidance_end <= 1:
            raise UserError(
                f"control_guidance_start {self.control_guidance_start} and control_guidance_end "
                f"{self.control_guidance_end} must satisfy 0 <= start < end <= 1"
            )

    def active(self, num_inference_steps: int) -> tuple[bool, ...]:
        """At which steps the ControlNet applies: diffusers' `controlnet_keep`, step for step."""
        n = num_inference_steps
        start, end = self.control_guidance_start, self.control_guidance_end
        return tuple(not (k / n < start or (k + 1) / n > end) for k in range(n))


@dataclass(frozen=True, eq=False)
class Request:
    """One call of a pipeline.

    Attributes:
        prompt, negative_prompt: the negative one counts only with guidance.
        controls: none, one or several; their residuals add up.
        num_inference_steps: 1 to 1000.
        guidance_scale: 1 or less runs without guidance, at half the work.
        scheduler: one of `SCHEDULERS`.
        seed: 0 to 2**64 - 1; image i is drawn from `torch.Generator("cpu").manual_seed(seed + i)`, so that it is the
            image which that seed gives alone. None: a random one, reported in the result.
        num_images_per_prompt: 1 to 16.
        init_image: the image to begin with, uint8 [H,W,3] RGB; of another size than the bundle's it is resized. The
            request keeps a copy, as a control does.
        strength: how much of the schedule runs on the initial image, above 0 to 1: 1 all of it.
        clip_skip: how many of the text encoder's last layers are left out, of the prompt alone, as in diffusers.
        clip_skip_negative: they are left out of the negative prompt too, as in AUTOMATIC1111's web UI.
        long_prompt: prompts of more than 77 tokens are read in chunks, as AUTOMATIC1111 does, instead of cut off.
        prompt_weights: emphasis in the prompts is read, `(word)`, `(word:1.4)`, `[word]`, as AUTOMATIC1111's web UI
            reads it; else brackets are text.
        guess_mode: not supported; True is refused.
    Raises: UserError
    """

    prompt: str = ""
    negative_prompt: str = ""
    controls: tuple[Control, ...] = field(default=())
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    scheduler: str = "unipc"
    seed: int | None = None
    num_images_per_prompt: int = 1
    init_image: NDArray[np.uint8] | None = None
    strength: float = 0.8
    clip_skip: int = 0
    clip_skip_negative: bool = False
    long_prompt: bool = False
    prompt_weights: bool = False
    guess_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be a string, not {type(getattr(self, name)).__name__}")
            if len(getattr(self, name)) > MAX_PROMPT:
                raise UserError(f"{name} has more than {MAX_PROMPT} characters: shorten it")
        if not isinstance(self.controls, list | tuple) or not all(isinstance(c, Control) for c in self.controls):
            raise UserError("controls must be a list of Control objects")
        object.__setattr__(self, "controls", tuple(self.controls))
        if len(self.controls) > MAX_CONTROLS:
            raise UserError(f"{len(self.controls)} controls are too many: give at most {MAX_CONTROLS}")
        steps = _integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        images = _integer("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_IMAGES)
        object.__setattr__(self, "num_inference_steps", steps)
        object.__setattr__(self, "num_images_per_prompt", images)
        object.__setattr__(self, "guidance_scale", _number("guidance_scale", self.guidance_scale))
        if not isinstance(self.scheduler, str) or self.scheduler not in SCHEDULERS:
            raise UserError(f"unknown scheduler {self.scheduler!r}: choose from {', '.join(SCHEDULERS)}")
        if self.seed is not None:
            object.__setattr__(self, "seed", _integer("seed", self.seed, 0, 2**64 - images))
        if self.init_image is not None:
            object.__setattr__(self, "init_image", _own_image("the initial image", self.init_image))
        object.__setattr__(self, "strength", _number("strength", self.strength))
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, not {self.strength:g}")
        object.__setattr__(self, "clip_skip", _integer("clip_skip", self.clip_skip, 0, 1000))
        for name in ("clip_skip_negative", "long_prompt", "prompt_weights"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, not {printable(repr(getattr(self, name)), 80)}")
        if self.guess_mode:
            raise UserError("guess_mode is not supported: lower guidance_scale and leave the prompt empty instead")

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, as diffusers decides it for UNets that were not distilled with it."""
        return self.guidance_scale > 1


def _own_image(what: str, image: Any) -> NDArray[np.uint8]:
    """A copy of `image` that cannot be written to.

    Raises:
        UserError: it is no image.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"{what} must be a uint8 array [height, width, 3], not {found}")
    if 0 in image.shape:
        raise UserError(f"{what} is empty: {image.shape[1]}x{image.shape[0]} pixels")
    own: NDArray[np.uint8] = np.array(image, order="C")
    own.flags.writeable = False
    return own


def _integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as Python's own int: NumPy's overflow in sums and cannot be written as JSON."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= int(value) <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    # The comparison is false for NaN as well.
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_SCALE:
        raise UserError(f"{name} must be a number from {-MAX_SCALE:.0f} to {MAX_SCALE:.0f}, not {value!r}")
    return float(value)
