"""What a user asks for. Names are diffusers'; everything is checked when the object is made."""

import secrets
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeAlias, cast

import numpy as np

from ...bundles.defaults import SamplingDefaults
from ...conditions import CONDITIONS
from ...errors import UserError
from ...messages import printable, unknown_choice
from ..images.device_image import CudaArray, DeviceImage, device_image
from ..images.image_files import WHITE, ImageLike, Pixels, to_pixels
from ..sampling.scheduler_config import TIMESTEP_SPACINGS
from ..sampling.schedulers import SCHEDULERS

ControlImage: TypeAlias = ImageLike | CudaArray | DeviceImage
"""An image on the host, or an array that is on the GPU."""
MAX_IMAGES = 16
MAX_STEPS = 1000
MAX_CONTROLS = 16
MAX_PROMPT = 100_000
MAX_SEED = 2**64 - 1
# Scales beyond this overflow float16, and long before that every picture is noise.
MAX_SCALE = 1e4


@dataclass(frozen=True, eq=False, repr=False)
class Control:
    """A condition with its image.

    Attributes:
        condition: `seg`, `canny`, `hed`, `lineart` or `depth`.
        image: the control image: uint8 [H,W,3] in RGB, an image of Pillow's (transparent pixels become black) or the
            path of a file. It is resized to the bundle's size where it has another. The control keeps a copy that
            cannot be written to: an array that is filled anew afterwards, as a camera's, changes nothing. On a GPU also
            an array that is there already (PyTorch, CuPy, Numba, JAX), of the bundle's size: it is read there.
        controlnet_conditioning_scale: factor on the ControlNet's residuals.
        control_guidance_start, control_guidance_end: share of the steps at which the ControlNet starts and stops
            applying, 0 ≤ start < end ≤ 1.

    Raises:
        UserError: a value cannot be used.
    """

    condition: str
    image: ControlImage
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.condition, str) or self.condition not in CONDITIONS:
            raise unknown_choice("condition", self.condition, CONDITIONS)
        object.__setattr__(self, "image", _control_image(self.image, f"the {self.condition} image"))
        for name in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if not 0 <= self.control_guidance_start < self.control_guidance_end <= 1:
            raise UserError(
                f"control_guidance_start {self.control_guidance_start} and control_guidance_end "
                f"{self.control_guidance_end} must satisfy 0 <= start < end <= 1"
            )

    @property
    def pixels(self) -> Pixels:
        """The image, uint8 [H,W,3] in RGB; read-only.

        Raises:
            UserError: it is in a GPU's memory.
        """
        if isinstance(self.image, DeviceImage):
            raise UserError(f"the {self.condition} image is in a GPU's memory: give it as a NumPy array")
        assert isinstance(self.image, np.ndarray)
        return self.image

    def active(self, num_inference_steps: int) -> tuple[bool, ...]:
        """At which steps the ControlNet applies: diffusers' `controlnet_keep`, step for step."""
        return steps_within(self.control_guidance_start, self.control_guidance_end, num_inference_steps)

    def __repr__(self) -> str:
        return _repr(self)


@dataclass(frozen=True, eq=False, repr=False)
class Request:
    """One call of a pipeline. Where a setting of the sampling is None, the model's own is used, else diffusers'.

    Attributes:
        prompt, negative_prompt: the negative one counts only with guidance.
        controls: a `Control`, or any sequence of them; the residuals of several add up.
        num_inference_steps: 1 to 1000.
        guidance_scale: 1 or less runs without guidance, at half the work.
        scheduler: one of `SCHEDULERS`.
        seed: 0 to 2**64 - 1; image i is drawn from `torch.Generator("cpu").manual_seed(seed + i)`, so that it is the
            image which that seed gives alone. A sequence has the seed of each image. None: a random one, which the
            result has.
        num_images_per_prompt: 1 to 16.
        init_image: the image to begin with, of the same kinds as a control's (transparent pixels become white).
        strength: how much of the schedule runs on the initial image, above 0 to 1: 1 all of it.
        clip_skip: how many of the text encoder's last layers are left out, of the prompt alone, as in diffusers.
        clip_skip_negative: they are left out of the negative prompt too, as in AUTOMATIC1111's web UI.
        long_prompt: prompts of more than 77 tokens are read in chunks, as AUTOMATIC1111 does, instead of cut off.
        prompt_weights: emphasis in the prompts is read, `(word)`, `(word:1.4)`, `[word]`, as AUTOMATIC1111's web UI
            reads it; else brackets are text.
        guess_mode: the ControlNets apply to the prompt's side of the guidance alone, with factors that grow from 0.1
            to 1 by depth, as in diffusers: control also where the prompt says nothing. It runs as fast as without.
        timestep_spacing: `ays` (Align Your Steps, for few steps), `karras` or `trailing`, in place of the model's own.
        guidance_start, guidance_end: share of the steps at which guidance starts and stops, 0 ≤ start < end ≤ 1. At the
            others the prompt alone is followed, at half the work (arXiv 2404.07724). None: at every step.
        guidance_interval: guidance is computed at every so many-th step, 1 to 1000; between, the prompt alone runs, at
            half the work, and what guidance added last is added again. None: 1, at every step.
        controlnet_interval: the ControlNets run at every so many-th step, 1 to 1000; between, what they gave last is
            used again. None: 1, at every step.
        cache_interval: the UNet's deeper layers and the ControlNets run at every so many-th step, 1 to 1000; between,
            only the outermost layer runs (DeepCache, arXiv 2312.00858). It needs a bundle that was exported for it.
            None: 1, at every step.

    Raises:
        UserError: a value cannot be used.
    """

    prompt: str = ""
    negative_prompt: str = ""
    controls: Control | Sequence[Control] = ()
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int | Sequence[int] | None = None
    num_images_per_prompt: int = 1
    init_image: ImageLike | None = None
    strength: float = 0.8
    clip_skip: int = 0
    clip_skip_negative: bool = False
    long_prompt: bool = False
    prompt_weights: bool = False
    guess_mode: bool = False
    timestep_spacing: str | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    guidance_interval: int | None = None
    controlnet_interval: int | None = None
    cache_interval: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be a string, not {type(getattr(self, name)).__name__}")
            if len(getattr(self, name)) > MAX_PROMPT:
                raise UserError(f"{name} has more than {MAX_PROMPT} characters: shorten it")
        self._set("controls", _controls(self.controls))
        if self.num_inference_steps is not None:
            self._set(
                "num_inference_steps", whole_number("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
            )
        images = whole_number("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_IMAGES)
        self._set("num_images_per_prompt", images)
        if self.guidance_scale is not None:
            self._set("guidance_scale", _number("guidance_scale", self.guidance_scale))
        if self.scheduler is not None and (not isinstance(self.scheduler, str) or self.scheduler not in SCHEDULERS):
            raise unknown_choice("scheduler", self.scheduler, SCHEDULERS)
        self._set("seed", _seed(self.seed, images))
        if self.init_image is not None:
            self._set("init_image", to_pixels(self.init_image, "the initial image", background=WHITE))
        self._set("strength", _number("strength", self.strength))
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, not {self.strength:g}")
        self._set("clip_skip", whole_number("clip_skip", self.clip_skip, 0, 1000))
        for name in ("clip_skip_negative", "long_prompt", "prompt_weights", "guess_mode"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, not {printable(repr(getattr(self, name)), 80)}")
        self._check_levers()

    def _check_levers(self) -> None:
        spacing = self.timestep_spacing
        if spacing is not None and (not isinstance(spacing, str) or spacing not in TIMESTEP_SPACINGS):
            raise unknown_choice("timestep_spacing", spacing, TIMESTEP_SPACINGS)
        for name in ("guidance_start", "guidance_end"):
            if getattr(self, name) is not None:
                self._set(name, _number(name, getattr(self, name)))
        start = 0.0 if self.guidance_start is None else self.guidance_start
        end = 1.0 if self.guidance_end is None else self.guidance_end
        if not 0 <= start < end <= 1:
            raise UserError(f"guidance_start {start} and guidance_end {end} must satisfy 0 <= start < end <= 1")
        for name in ("guidance_interval", "controlnet_interval", "cache_interval"):
            if getattr(self, name) is not None:
                self._set(name, whole_number(name, getattr(self, name), 1, MAX_STEPS))

    def resolve(self, defaults: SamplingDefaults) -> "ResolvedRequest":
        """The request with every setting decided: `defaults` where one is None, a random seed where there is none."""
        given = {f.name: getattr(self, f.name) for f in fields(Request)}
        if given["scheduler"] is None and given["timestep_spacing"] is None:  # a spacing is one of a scheduler's own
            given["timestep_spacing"] = defaults.timestep_spacing
        for name in DEFAULTED:
            if given[name] is None:
                given[name] = getattr(defaults, name)
        if given["seed"] is None:
            given["seed"] = secrets.randbits(32)
        return ResolvedRequest(**given)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return _repr(self)


@dataclass(frozen=True, eq=False, repr=False)
class ResolvedRequest(Request):
    """A request of which every setting is decided: `Request.resolve` makes it."""

    controls: tuple[Control, ...] = ()
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    scheduler: str = "unipc"
    seed: int | tuple[int, ...] = 0
    init_image: Pixels | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_interval: int = 1
    controlnet_interval: int = 1
    cache_interval: int = 1

    def resolve(self, defaults: SamplingDefaults) -> "ResolvedRequest":
        """The request itself."""
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each image."""
        if isinstance(self.seed, int):
            return tuple(range(self.seed, self.seed + self.num_images_per_prompt))
        return self.seed

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, as diffusers decides it for UNets that were not distilled with it."""
        return self.guidance_scale > 1


def _control_image(image: ControlImage, what: str) -> Pixels | DeviceImage:
    if isinstance(image, DeviceImage):
        return image
    return device_image(image, what) or to_pixels(cast(ImageLike, image), what)


DEFAULTED = (
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "guidance_start",
    "guidance_end",
    "guidance_interval",
    "controlnet_interval",
    "cache_interval",
)
"""Fields of a request that are None where the pipeline decides."""


def steps_within(start: float, end: float, steps: int) -> tuple[bool, ...]:
    """Which steps lie within a share of them, as diffusers decides it for `control_guidance_start` and `_end`."""
    return tuple(not (k / steps < start or (k + 1) / steps > end) for k in range(steps))


def to_request(request: Request | str, controls: Control | Sequence[Control], fields: dict[str, Any]) -> Request:
    """A request, or that of a prompt with other fields as arguments.

    Raises:
        UserError: a request has no such field, or it cannot be used.
    """
    if not isinstance(request, str):
        if controls or fields:
            raise UserError("a Request has its own controls and settings: give them there")
        return request
    try:
        return Request(request, controls=controls, **fields)
    except TypeError as e:
        raise UserError(f"a request has no such field ({e}): its fields are those of cnpp_trt.Request") from None


def _repr(record: Any) -> str:
    """Fields that differ from their defaults; an image by its size."""
    parts = []
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, np.ndarray):
            parts.append(f"{f.name}=<{value.shape[1]}x{value.shape[0]} image>")
        elif f.default is MISSING or value != f.default:
            parts.append(f"{f.name}={value!r}")
    return f"{type(record).__name__}({', '.join(parts)})"


def _controls(controls: Any) -> tuple[Control, ...]:
    controls = (controls,) if isinstance(controls, Control) else controls
    if not isinstance(controls, Sequence) or not all(isinstance(c, Control) for c in controls):
        raise UserError("controls must be Control objects, as in controls=[Control('seg', image)]")
    if len(controls) > MAX_CONTROLS:
        raise UserError(f"{len(controls)} controls are too many: give at most {MAX_CONTROLS}")
    return tuple(controls)


def _seed(seed: Any, images: int) -> int | tuple[int, ...] | None:
    if seed is None:
        return None
    if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str):
        return whole_number("seed", seed, 0, MAX_SEED + 1 - images)
    if len(seed) != images:
        raise UserError(f"{len(seed)} seeds for {images} images: give one for each, or a single one")
    return tuple(whole_number("seed", one, 0, MAX_SEED) for one in seed)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
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
