"""Image-to-image: where the schedule begins, and the latents of the image that it begins with."""

import math

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle
from ..errors import BackendError, UserError
from .backends.interface import Backend, aligned
from .finiteness import advice
from .images.fitting import to_size
from .settings.request import ResolvedRequest

ENCODER = "vae_encoder"


def first_step(request: ResolvedRequest) -> int:
    """The step of the whole schedule that a request begins at; 0 without an initial image.

    As `get_timesteps` of diffusers' image-to-image pipelines (pipeline_controlnet_img2img.py).

    Raises:
        UserError: the strength leaves no step.
    """
    if request.init_image is None:
        return 0
    n = request.num_inference_steps
    steps = min(int(n * request.strength), n)
    if steps < 1:
        raise UserError(f"strength {request.strength:g} leaves none of {n} steps: raise it, or take more steps")
    return n - steps


def draws_noise(bundle: Bundle) -> bool:
    """Whether the encoder samples its latents: a tiny VAE gives them as they are."""
    return any(t.name == "noise" for t in bundle.graph(ENCODER).inputs)


def fit_init_image(bundle: Bundle, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], list[str]]:
    """The image [H,W,3] at the bundle's size, as diffusers' `VaeImageProcessor` brings it there, and a note on that."""
    return to_size(image, "the initial image", bundle.manifest.width, bundle.manifest.height, "lanczos")


def encode_init_image(
    bundle: Bundle, backend: Backend, image: NDArray[np.uint8], noise: NDArray[np.float32] | None, images: int
) -> tuple[NDArray[np.float32], list[str]]:
    """The latents float32 [B,4,h,w] of `image` uint8 [H,W,3], one sample for each of B images, and notes on that.

    Args:
        noise: float32 [B,4,h,w], what the samples are drawn with; None where the encoder draws nothing.

    Raises:
        BackendError: they are not finite.
    """
    found = _encode(bundle, backend, ENCODER, image, noise, images)
    if np.isfinite(found).all():
        return found, []
    twin = f"{ENCODER}_fp32"
    if twin in bundle.manifest.graphs:
        found = _encode(bundle, backend, twin, image, noise, images)
        if np.isfinite(found).all():
            return found, ["the encoder overflowed fp16: the initial image was encoded again in fp32"]
    raise BackendError(f"the encoder's latents are not finite ({bundle.manifest.precision}): {advice(bundle)}")


def encoder_bytes(bundle: Bundle) -> int:
    """What the encoder's buffers take, each rounded up to the alignment."""
    return sum(aligned(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in _tensors(bundle).values())


def _tensors(bundle: Bundle) -> dict[str, tuple[list[int], str]]:
    """(shape, type) of the encoder's tensors: one image at a time, as diffusers encodes for a list of generators."""
    spec = bundle.graph(ENCODER)
    return {t.name: ([1 if isinstance(d, str) else d for d in t.shape], t.dtype) for t in (*spec.inputs, *spec.outputs)}


def _encode(
    bundle: Bundle,
    backend: Backend,
    graph: str,
    image: NDArray[np.uint8],
    noise: NDArray[np.float32] | None,
    images: int,
) -> NDArray[np.float32]:
    nbytes = encoder_bytes(bundle)
    backend.reserve([graph], nbytes)
    allocate = backend.arena(nbytes)
    buffers = {name: allocate(shape, dtype) for name, (shape, dtype) in _tensors(bundle).items()}
    launch = backend.load(graph).bind(buffers)
    backend.upload(buffers["image"], image[None])
    if noise is None:
        launch()
        return np.concatenate([backend.download(buffers["latents"])] * images)
    latents = []
    for sample in noise:
        backend.upload(buffers["noise"], sample[None])
        launch()
        latents.append(backend.download(buffers["latents"]))
    return np.concatenate(latents)
