"""diffusers' own pipeline behind the runtime's interface: the reference and the competitor."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..export.checkpoint import Checkpoint
from ..runtime.request import Request


@dataclass(frozen=True, eq=False)
class Drawn:
    """images uint8 [B,H,W,3], latents float32 [B,4,h,w] as the decoder was given them."""

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]


class PyTorch:
    """`StableDiffusionControlNetPipeline` of a checkpoint, for requests with at least one control.

    Args:
        dtype: of weights and activations. On a CPU float16 rounds every operation's result, which is slow, and the
            most that fp16 can do to an image.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._controlnets: dict[str, Any] = {}
        self._components = {
            name: getattr(checkpoint, name)(dtype).to(device) for name in ("unet", "vae", "text_encoder")
        }

    def __call__(self, request: Request) -> Drawn:
        import diffusers
        from PIL import Image

        schedulers = {
            "ddim": diffusers.DDIMScheduler,
            "euler": diffusers.EulerDiscreteScheduler,
            "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
            "unipc": diffusers.UniPCMultistepScheduler,
            "lcm": diffusers.LCMScheduler,
        }
        pipeline = diffusers.StableDiffusionControlNetPipeline(
            controlnet=[self._controlnet(c.condition) for c in request.controls],
            scheduler=schedulers[request.scheduler].from_config(self._checkpoint.config("scheduler")),
            tokenizer=self._checkpoint.tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **self._components,
        )
        pipeline.set_progress_bar_config(disable=True)
        seeds = [int(request.seed or 0) + i for i in range(request.num_images_per_prompt)]
        latents: list[Any] = []

        def remember(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            latents[:] = [kwargs["latents"]]
            return kwargs

        output = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            image=[Image.fromarray(c.image) for c in request.controls],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.num_images_per_prompt,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            controlnet_conditioning_scale=[float(c.controlnet_conditioning_scale) for c in request.controls],
            control_guidance_start=[c.control_guidance_start for c in request.controls],
            control_guidance_end=[c.control_guidance_end for c in request.controls],
            output_type="np",
            callback_on_step_end=remember,
        )
        return Drawn((output.images * 255).round().astype(np.uint8), latents[0].float().cpu().numpy())

    def _controlnet(self, condition: str) -> Any:
        if condition not in self._controlnets:
            self._controlnets[condition] = self._checkpoint.controlnet(condition, self._dtype).to(self._device)
        return self._controlnets[condition]
