"""The denoising loop as people write it: sessions called on NumPy arrays, and the sampler in NumPy between the calls.

It computes what `runtime.loop.Program` computes, and is where the waterfall starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundles.bundle import Bundle
from ...errors import BackendError
from ...runtime.loop import RequestTensors

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class HostLoopOutput:
    """images uint8 [B,H,W,3]; latents float32 [B,4,h,w], as the decoder was given them."""

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]


class Sessions:
    """ONNX Runtime's sessions of a bundle, each made when it is first called.

    Args:
        make: a session of a graph by the graph's name.
    """

    def __init__(self, bundle: Bundle, make: Callable[[str], Any]) -> None:
        self.bundle = bundle
        self._make = make
        self._sessions: dict[str, Any] = {}

    def __call__(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """The graph's outputs by name.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        try:
            if graph not in self._sessions:
                self._sessions[graph] = self._make(graph)
            outputs = self._sessions[graph].run(None, feeds)
        except Exception as e:  # ONNX Runtime's exceptions share no base class
            raise BackendError(f"ONNX Runtime failed in {graph}: {' '.join(str(e).split())[:300]}") from e
        return {t.name: a for t, a in zip(self.bundle.graph(graph).outputs, outputs, strict=True)}


class HostLoop:
    """Called, it goes from an encoded prompt to decoded images. One control, which applies at every step.

    Args:
        hoist_hint: the control image is encoded once; else at every step for each row of the batch, as diffusers does
            in its ControlNet.
        hoist_prompt: keys and values of the prompt are computed once; else at every step, as in diffusers' networks.
        hoist_time: the time embeddings of all steps are computed at once; else each at its step.
        share_prefix: what all prompts of an image share is computed once; else for each row of the batch, as
            diffusers does.
        update_graph: guidance, sampler and the next model input are the graph `update`; else NumPy.
    """

    def __init__(
        self,
        run: Sessions,
        condition: str,
        tensors: RequestTensors,
        *,
        hoist_hint: bool = False,
        hoist_prompt: bool = False,
        hoist_time: bool = False,
        share_prefix: bool = False,
        update_graph: bool = False,
    ) -> None:
        self._run = run
        self._condition = condition
        self._tensors = tensors
        self._hoist_hint, self._hoist_prompt, self._hoist_time = hoist_hint, hoist_prompt, hoist_time
        self._update = self._update_in_graph if update_graph else self._update_on_host
        self._float = run.bundle.graph(f"controlnet_{condition}").inputs[0].dtype
        self._batch, self._images = len(tensors.prompts.input_ids), len(tensors.latents)
        # How many times each image is computed before the first cross-attention.
        self._copies = 1 if share_prefix else self._batch // self._images
        self._rows = np.arange(self._batch) % (self._copies * self._images)
        text = {"input_ids": tensors.prompts.input_ids, "clip_skip": tensors.prompts.clip_skip}
        self._prompt_embeds = run("text_encoder", text)["prompt_embeds"]

    def __call__(self) -> HostLoopOutput:
        """Runs the loop and decodes."""
        tensors, table = self._tensors, self._tensors.table
        x = tensors.latents
        state = np.stack([x, *[np.zeros_like(x)] * 3])
        model_input = self._batched(x * np.float32(table.input_scale))
        hint: Array | None = None
        before: list[dict[str, Array]] = []  # of each network: its keys and values, or the prompt itself
        timesteps = table.timesteps.astype(np.float32)
        times: list[list[dict[str, Array]]] = []  # of each network and step
        networks = (f"_{self._condition}", "")
        for k in range(len(timesteps)):
            if hint is None or not self._hoist_hint:
                hint = self._hint()
            if not before or not self._hoist_prompt:
                before = [self._text(network) for network in networks]
            if not self._hoist_time:
                times = [[{}] * k + self._times(network, timesteps[k : k + 1]) for network in networks]
            elif not times:
                times = [self._times(network, timesteps) for network in networks]
            common = {"model_input": model_input, "rows": self._rows}
            control, unet = ({**common, **text, **time[k]} for text, time in zip(before, times, strict=True))
            scales = tensors.residual_scales[0].reshape(-1, self._batch)
            residuals = self._run(f"controlnet_{self._condition}", {**control, "hint": hint, "scales": scales})
            noise_pred = self._run("unet", {**unet, **residuals})["noise_pred"]
            state, model_input = self._update(k, state, noise_pred)
        images = self._run("vae_decoder", {"latents": state[0]})["image"]
        return HostLoopOutput(images, state[0])

    def _text(self, network: str) -> dict[str, Array]:
        """What a network reads of the prompt, by tensor name."""
        prompt = {"prompt_embeds": self._prompt_embeds}
        graph = f"text_kv{network}"
        return self._run(graph, prompt) if graph in self._run.bundle.manifest.graphs else prompt

    def _times(self, network: str, timesteps: Array) -> list[dict[str, Array]]:
        """What a network reads of each of these time steps, by tensor name."""
        graph = f"time_embeds{network}"
        if graph not in self._run.bundle.manifest.graphs:
            return [{"timestep": t[None]} for t in timesteps]
        return [{"time_embeds": row} for row in self._run(graph, {"timesteps": timesteps})["time_embeds"]]

    def _hint(self) -> Array:
        feeds = {"control_image": self._tensors.control_image(0)}
        hints: list[Array] = []
        for _ in range(1 if self._hoist_hint else self._batch):
            hints.append(self._run(f"hint_{self._condition}", feeds)["hint"])
        return np.concatenate([hints[-1]] * (self._copies * self._images))

    def _update_on_host(self, k: int, state: Array, noise_pred: Array) -> tuple[Array, Array]:
        """noise_pred [G,4,h,w], state [4,B,4,h,w] → the new state, the next model input [G,4,h,w]."""
        guided = noise_pred.astype(np.float32)
        if self._batch > self._images:
            unconditional, conditional = np.split(guided, 2)
            scales = np.array(self._tensors.guidance_scales, np.float32)[:, None, None, None]
            guided = unconditional + scales * (conditional - unconditional)
        rows = np.concatenate([state, guided[None], self._noise(k)[None]])
        coefficients, limit = self._coefficients(k), np.float32(self._tensors.table.x0_limit)
        new = np.tensordot(coefficients[:, :6], rows, axes=1)
        new += coefficients[:, 6].reshape(5, 1, 1, 1, 1) * (np.clip(new[2], -limit, limit) - new[2])
        return new[:4], self._batched(new[4])

    def _update_in_graph(self, k: int, state: Array, noise_pred: Array) -> tuple[Array, Array]:
        n = self._batch // self._images
        feeds = {
            "noise_pred": noise_pred.reshape(n, self._images, *noise_pred.shape[1:]),
            "guidance": self._tensors.guidance(n == 2),
            "state": state,
            "coefficients": self._coefficients(k),
            "x0_limit": np.array([self._tensors.table.x0_limit], np.float32),
            "noise": self._noise(k),
        }
        found = self._run("update", feeds)
        return found["new_state"], self._batched(found["model_input"])

    def _coefficients(self, k: int) -> Array:
        coefficients: Array = self._tensors.table.coefficients[k].astype(np.float32)
        return coefficients

    def _noise(self, k: int) -> Array:
        drawn = self._tensors.step_noise[k]
        return np.zeros_like(self._tensors.latents) if drawn is None else drawn

    def _batched(self, x: Array) -> Array:
        """[B,4,h,w] as the model reads it: once, or once for each side of the guidance."""
        batched: Array = np.concatenate([x] * self._copies).astype(self._float)
        return batched
