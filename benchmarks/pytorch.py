"""diffusers' own pipeline behind the runtime's interface: the reference and the competitor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..export.checkpoint import Checkpoint
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import ResolvedRequest

# diffusers' class and settings of each of the runtime's schedulers.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@dataclass(frozen=True, eq=False)
class ReferenceOutput:
    """images uint8 [B,H,W,3]; trajectory, the latents after each step, float32 [B,4,h,w] each."""

    images: NDArray[np.uint8]
    trajectory: tuple[NDArray[np.float32], ...]

    @property
    def latents(self) -> NDArray[np.float32]:
        """As the decoder was given them."""
        return self.trajectory[-1]


class PyTorch:
    """`StableDiffusionControlNetPipeline` of a checkpoint, for requests with at least one control.

    Args:
        dtype: of weights and activations. On a CPU float16 rounds every operation's result, which is slow, and the
            most that fp16 can do to an image.
        adapt: is given each network (UNet, VAE, text encoder, ControlNet), loaded, by name, and returns what runs in
            its place: for `torch.compile` and memory formats.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        adapt: Callable[[str, Any], Any] = lambda name, module: module,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._dtype = dtype
        self._adapt = adapt
        self._pipelines: dict[tuple[str, ...], Any] = {}
        self._controlnets: dict[str, Any] = {}
        self._shared = {
            "unet": adapt("unet", checkpoint.unet(dtype).to(device)),
            "vae": adapt("vae", checkpoint.vae(dtype).to(device)),
            "text_encoder": adapt("text_encoder", checkpoint.text_encoder(dtype).to(device)),
            "tokenizer": checkpoint.tokenizer(),
        }

    def pipeline(self, request: ResolvedRequest) -> Any:
        """The pipeline of this request's conditions and scheduler; made once."""
        conditions = tuple(c.condition for c in request.controls)
        key = (request.scheduler, *conditions)
        if key not in self._pipelines:
            import diffusers

            name, settings = SCHEDULERS[request.scheduler]
            scheduler = getattr(diffusers, name).from_config(self.checkpoint.config("scheduler"), **settings)
            make: Any = diffusers.StableDiffusionControlNetPipeline  # annotated without None for its safety checker
            made = make(
                controlnet=_one_or_list([self._controlnet(condition) for condition in conditions]),
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **self._shared,
            )
            made.set_progress_bar_config(disable=True)
            self._pipelines[key] = made
        return self._pipelines[key]

    def __call__(self, request: ResolvedRequest) -> ReferenceOutput:
        """Generates the images of a request and keeps the latents after each step."""
        trajectory: list[Any] = []

        def remember(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            trajectory.append(kwargs["latents"])
            return kwargs

        images = self.images(request, remember)
        return ReferenceOutput(images, tuple(latents.float().cpu().numpy() for latents in trajectory))

    def images(
        self, request: ResolvedRequest, callback_on_step_end: Callable[..., Any] | None = None
    ) -> NDArray[np.uint8]:
        """uint8 [B,H,W,3], as diffusers makes them."""
        from PIL import Image

        output = self.pipeline(request)(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            image=_one_or_list([Image.fromarray(c.pixels) for c in request.controls]),
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.num_images_per_prompt,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
            controlnet_conditioning_scale=_one_or_list(
                [float(c.controlnet_conditioning_scale) for c in request.controls]
            ),
            control_guidance_start=_one_or_list([c.control_guidance_start for c in request.controls]),
            control_guidance_end=_one_or_list([c.control_guidance_end for c in request.controls]),
            guess_mode=request.guess_mode,
            output_type="np",
            callback_on_step_end=callback_on_step_end,
        )
        levels: NDArray[np.uint8] = (output.images * 255).round().astype(np.uint8)
        return levels

    def _controlnet(self, condition: str) -> Any:
        if condition not in self._controlnets:
            loaded = self.checkpoint.controlnet(condition, self._dtype).to(self.device)
            self._controlnets[condition] = self._adapt("controlnet", loaded)
        return self._controlnets[condition]


def _one_or_list(values: list[Any]) -> Any:
    """One value without its list: diffusers runs a list of one ControlNet as several, and adds residuals up in vain."""
    return values[0] if len(values) == 1 else values


def device_of(pipeline: Pipeline) -> str:
    """Where PyTorch runs beside this pipeline: on the GPU where the pipeline does, and PyTorch can."""
    on_cpu = pipeline.backend.name.startswith(("onnxruntime-cpu", "openvino"))
    return "cuda" if not on_cpu and torch.cuda.is_available() else "cpu"


def exact_float32() -> None:
    """For this process: on a GPU PyTorch computes fp32 convolutions in TF32, with 10 bits of mantissa, until told."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
