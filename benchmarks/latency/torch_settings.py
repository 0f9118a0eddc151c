"""The ways of running diffusers that contenders of `cnpp-trt bench` measure."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TorchSettings:
    """How diffusers' networks are run.

    Attributes:
        channels_last: convolutions in that memory format.
        hoist_hint: the control image is encoded once for each request, and not at every step.
        compile: `torch.compile` of UNet, ControlNet and decoder with these arguments; None leaves them eager. The text
            encoder, once a request and a few milliseconds, is left as users leave it.
        inductor: what is set in `torch._inductor.config`.
        fuse_qkv: query, key and value of a self-attention as one product, where the network can (diffusers).
    """

    channels_last: bool = False
    hoist_hint: bool = False
    compile: Mapping[str, Any] | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    fuse_qkv: bool = False


SETTINGS: Mapping[str, TorchSettings] = {
    "pytorch": TorchSettings(),
    "pytorch-hint": TorchSettings(hoist_hint=True),
    "pytorch-compile": TorchSettings(compile={}, inductor={"freezing": True}),
    "pytorch-cuda": TorchSettings(),
    "pytorch-cuda-channels-last": TorchSettings(channels_last=True),
    "pytorch-cuda-hint": TorchSettings(channels_last=True, hoist_hint=True),
    "pytorch-cuda-reduce-overhead": TorchSettings(
        channels_last=True, compile={"mode": "reduce-overhead", "fullgraph": True}
    ),
    # The flags of diffusers' guide "Accelerate inference" (docs/source/en/optimization/fp16.md, torch.compile).
    "pytorch-cuda-max-autotune": TorchSettings(
        channels_last=True,
        compile={"mode": "max-autotune", "fullgraph": True},
        inductor={
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "epilogue_fusion": False,
            "coordinate_descent_check_all_directions": True,
        },
        fuse_qkv=True,
    ),
}
"""By contender."""


class Adapter:
    """What `benchmarks.pytorch.PyTorch` calls for each network that it loads.

    Args:
        torch: the module.
        settings: how the networks are run.
    """

    def __init__(self, torch: Any, settings: TorchSettings) -> None:
        self._torch = torch
        self._settings = settings
        if settings.inductor:
            import torch._inductor.config as inductor

            for name, value in settings.inductor.items():
                setattr(inductor, name, value)

    def __call__(self, name: str, module: Any) -> Any:
        """The network as it runs.

        Args:
            name: `unet`, `vae`, `text_encoder` or `controlnet`.
            module: diffusers' or transformers' own.
        """
        settings = self._settings
        if name == "text_encoder":
            return module
        if settings.channels_last:
            module = module.to(memory_format=self._torch.channels_last)
        if settings.fuse_qkv and hasattr(module, "fuse_qkv_projections"):
            module.fuse_qkv_projections()
        if name == "controlnet" and settings.hoist_hint:
            module.controlnet_cond_embedding = _once(self._torch, module.controlnet_cond_embedding)
        if settings.compile is None:
            return module
        if name == "vae":
            module.decoder = self._torch.compile(module.decoder, **settings.compile)
            return module
        return self._torch.compile(module, **settings.compile)


def _once(torch: Any, embedding: Any) -> Any:
    class Once(torch.nn.Module):  # type: ignore[misc]
        """A ControlNet's conditioning embedding that is computed once for each control image.

        diffusers' pipeline hands the same tensor to the ControlNet at every step of a request.
        """

        def __init__(self) -> None:
            super().__init__()
            self.embedding = embedding
            self._image: weakref.ref[Any] | None = None
            self._found: Any = None

        def forward(self, image: Any) -> Any:
            if self._image is None or self._image() is not image:
                self._found = self.embedding(image)
                self._image = weakref.ref(image)
            return self._found

    return Once()
