"""The named buffers that launches are bound to, and the values that each step of a request copies into them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..bundles.bundle import Bundle, Manifest, TensorSpec
from ..bundles.graph_names import STEPS_AT_ONCE
from ..errors import BundleError
from .backends.interface import ALIGNMENT, Allocate, Buffer, aligned
from .shape import LoopShape, Schedule

# What a ControlNet hands the UNet, buffer by tensor name.
Residuals = dict[str, Buffer]

# A step's values (timestep and coefficients) lie in a row each, so that both are aligned for TensorRT and all of a
# request's are uploaded at once.
ROW = ALIGNMENT // 4
TIMESTEP, COEFFICIENTS = 0, 1


@dataclass(frozen=True)
class Network:
    """What is computed before the loop for the UNet or a ControlNet; empty where its graph computes it at every step.

    Attributes:
        block: the memory of `keys_values`.
        keys_values: of every cross-attention, by tensor name.
        time_embeds: the slot of the step's row.
        times: where the rows of `STEPS_AT_ONCE` steps are computed.
    """

    block: Buffer
    keys_values: dict[str, Buffer]
    time_embeds: Buffer | None
    times: Buffer | None

    def inputs(self) -> dict[str, Buffer]:
        """What the network's graph reads of it, by tensor name."""
        return self.keys_values | ({} if self.time_embeds is None else {"time_embeds": self.time_embeds})


def network_suffixes(shape: LoopShape) -> list[str]:
    """How the graphs of each network end: nothing for the UNet, `_<condition>` for a ControlNet."""
    return ["", *(f"_{condition}" for condition in dict.fromkeys(shape.controls))]


class Workspace:
    """The named buffers of one loop shape. They are allocated once and live as long as any launch holds them.

    What differs from step to step (timestep, coefficients, noise) has one slot, whatever the number of steps: a step
    begins by copying its own values there from a `StepTable`.
    """

    def __init__(self, allocate: Allocate, bundle: Bundle, shape: LoopShape) -> None:
        self._allocate = allocate
        s, m = shape, bundle.manifest
        b, n = s.images, 2 if s.guided else 1
        float_type = "float16" if m.precision == "fp16" else "float32"
        tokens, width = bundle.graph("text_encoder").outputs[0].shape[1:]
        latent = latent_shape(m)

        self.input_ids = self._new("int64", n * b * s.chunks, tokens)
        self.clip_skip = self._new("int64", n * b * s.chunks)
        self.prompt_embeds = self._new(float_type, n * b, int(tokens) * s.chunks, width)
        # A row's chunks follow each other: the same memory, chunk by chunk.
        self.encoded_prompts = self.prompt_embeds.reshape(n * b * s.chunks, int(tokens), int(width))
        # One control image at a time is encoded, and its hint copied to the rows of the batch that it belongs to.
        self.control_image = self._new("uint8", 1, m.height, m.width, 3) if s.controls else None
        hint_shapes = [self._output(bundle, f"hint_{name}", "hint").shape[1:] for name in s.controls]
        if len(set(hint_shapes)) > 1:
            raise BundleError(f"the hints of {', '.join(s.controls)} differ in size: export the bundle again")
        self.hint = self._new(float_type, 1, *hint_shapes[0]) if s.controls else None
        self.hints = [self._new(float_type, b, *shape) for shape in hint_shapes]

        self.model_input = self._new(float_type, b, *latent)
        # Which image each row of the batch is of: all images with one side's prompts, then with the other's.
        self.rows = self._new("int64", n * b)
        # After both sides of guidance, which are used again, comes the prompt's of a step that runs it alone.
        self.noise_pred = self._new(float_type, (3 if s.reused_guidance else n) * b, *latent)
        # A step reads one and writes the other; the last one writes the first.
        self.states = [self._new("float32", 4, b, *latent) for _ in range(2)]
        self.latents = self.states[0].part(0)
        self.image = self._new("uint8", b, m.height, m.width, 3)
        # That of the state after the last step that ran, and the decoder's.
        self.magnitudes = self._new("float32", 2, ROW)

        self.guidance = self._new("float32", n, b)
        self.x0_limit = self._new("float32", 1)
        self.row = self._new("float32", 2, ROW)
        self.timestep = self.row.part(TIMESTEP, shape=(1,))
        self.coefficients = self.row.part(COEFFICIENTS, shape=(5, 7))
        self.noise = self._new("float32", b, *latent)

        # What only a distilled UNet reads.
        scale = bundle.guidance_width
        self.distilled = {} if scale is None else {"timestep_cond": self._new(float_type, b, scale)}
        self.networks = {suffix: self._network(bundle, suffix, s) for suffix in network_suffixes(s)}
        self.timesteps = self._new("float32", STEPS_AT_ONCE)

        # What the encoder of a divided UNet hands its decoder, and a whole one the graph of its outermost layer.
        encoder = m.graphs.get("unet_encoder")
        self.skips = {t.name: self._new(t.dtype, n * b, *t.shape[1:]) for t in encoder.outputs} if encoder else {}
        unet = bundle.graph("unet_decoder" if encoder else "unet")
        self.deep = {t.name: self._new(t.dtype, n * b, *t.shape[1:]) for t in unet.outputs if t.name == "deep"}
        self._residual_shapes = {t.name: t.shape for t in unet.inputs if t.name == "mid" or t.name.startswith("down_")}
        self._residual_batch = (float_type, n * b)
        # Where no control applies, the UNet reads zeros that nothing writes.
        self.no_residuals = self.residuals() if s.uncontrolled else {}
        self.control_residuals = [self.residuals() for _ in s.controls]
        self.sums = [self.residuals() for _ in range(min(len(s.controls) - 1, 2))]
        self.scales = [self._new("float32", len(self._residual_shapes), n * b) for _ in s.controls]
        self.unguided = self._unguided(s) if s.unguided_steps else None

    def _unguided(self, shape: LoopShape) -> "UnguidedBuffers":
        b, embeds = shape.images, self.prompt_embeds
        return UnguidedBuffers(
            prompt_embeds=self._new(embeds.dtype.name, b, *embeds.shape[1:]),
            keys_values={
                suffix: {name: self._new(t.dtype.name, b, *t.shape[1:]) for name, t in network.keys_values.items()}
                for suffix, network in self.networks.items()
            },
            scales=[self._new("float32", len(self._residual_shapes), b) for _ in shape.controls],
            guidance=self._new("float32", 1, b),
            reused_guidance=self._new("float32", 3, b) if shape.reused_guidance else None,
        )

    def network(self, suffix: str, unguided: bool) -> dict[str, Buffer]:
        """What the graph of a network reads of what is computed before the loop, by tensor name."""
        inputs = self.networks[suffix].inputs()
        return inputs if self.unguided is None or not unguided else inputs | self.unguided.keys_values[suffix]

    def unguided_copies(self) -> list[tuple[Buffer, Buffer]]:
        """From what guided steps read of the prompt to what the others do: the prompt's side, the second half."""
        own = self.unguided
        if own is None:
            return []
        pairs = [(self.prompt_embeds, own.prompt_embeds)]
        for suffix, network in self.networks.items():
            pairs += [(t, own.keys_values[suffix][name]) for name, t in network.keys_values.items()]
        return [(source.view(target.nbytes, target.shape, target.dtype.name), target) for source, target in pairs]

    def magnitude(self, decoded: bool = False) -> Buffer:
        """The mean magnitude of the last step's new state, or of the decoder's image, [1]."""
        return self.magnitudes.part(int(decoded), shape=(1,))

    def residuals(self) -> Residuals:
        """New buffers for a ControlNet's residuals."""
        float_type, batch = self._residual_batch
        return {name: self._new(float_type, batch, *shape[1:]) for name, shape in self._residual_shapes.items()}

    def _network(self, bundle: Bundle, suffix: str, s: LoopShape) -> "Network":
        graphs, rows = bundle.manifest.graphs, (2 if s.guided else 1) * s.images
        block, keys_values = self._new("uint8", 0), {}
        if spec := graphs.get(f"text_kv{suffix}"):
            sizes = {"batch": rows, "tokens": self.prompt_embeds.shape[1]}
            tensors = [(t, [sizes.get(str(d), d) for d in t.shape]) for t in spec.outputs]
            lengths = [aligned(math.prod(map(int, shape)) * np.dtype(t.dtype).itemsize) for t, shape in tensors]
            block = self._new("uint8", sum(lengths))
            for (t, shape), start in zip(tensors, np.cumsum([0, *lengths[:-1]]), strict=True):
                keys_values[t.name] = block.view(int(start), tuple(map(int, shape)), t.dtype)
        slot = times = None
        if spec := graphs.get(f"time_embeds{suffix}"):
            [t] = spec.outputs
            of_a_step = [s.images if d == "images" else d for d in t.shape[1:]]
            slot = self._new(t.dtype, *of_a_step)
            times = self._new(t.dtype, STEPS_AT_ONCE, *of_a_step)
        return Network(block, keys_values, slot, times)

    def _new(self, dtype: str, *shape: int | str) -> Buffer:
        if not all(isinstance(d, int) for d in shape):
            raise BundleError(f"a graph has {list(shape)} where its sizes must be fixed: export the bundle again")
        return self._allocate([int(d) for d in shape], dtype)

    def _output(self, bundle: Bundle, graph: str, output: str) -> TensorSpec:
        return next(t for t in bundle.graph(graph).outputs if t.name == output)


@dataclass(frozen=True)
class UnguidedBuffers:
    """What only steps of B rows read, in a request that is guided: the prompt's side.

    Attributes:
        prompt_embeds: [B,T,D].
        keys_values: by the network's suffix and tensor name, [B,T,C].
        scales: for each control, [R,B].
        guidance: [1,B], all 1.
        reused_guidance: [3,B], the weights of both sides of an earlier step and of the prompt's of this one; None where
            there is no such step.
    """

    prompt_embeds: Buffer
    keys_values: dict[str, dict[str, Buffer]]
    scales: list[Buffer]
    guidance: Buffer
    reused_guidance: Buffer | None


def rows_of(buffer: Buffer, rows: int, first: int = 0) -> Buffer:
    """Some rows of a batch, in the same memory."""
    offset = first * (buffer.nbytes // buffer.shape[0])
    return buffer.view(offset, (rows, *buffer.shape[1:]), buffer.dtype.name)


class StepTable:
    """The values of every step of a request, which no launch is bound to: each step copies its own into the slots.

    Attributes:
        time_embeds: a row for each step, by the network's suffix.
        times_of: what they were computed from; empty before they are.
    """

    def __init__(self, allocate: Allocate, bundle: Bundle, shape: LoopShape, steps: int, noisy: bool) -> None:
        graphs = bundle.manifest.graphs
        self.rows = allocate((steps, 2, ROW), "float32")
        # A row for each step, so long that every one is aligned.
        noise = aligned(4 * shape.images * math.prod(latent_shape(bundle.manifest))) // 4
        self.noise = allocate((steps if noisy else 0, noise), "float32")
        self.times_of = b""
        self.time_embeds: dict[str, Buffer] = {}
        for suffix in network_suffixes(shape):
            if spec := graphs.get(f"time_embeds{suffix}"):
                [t] = spec.outputs
                of_a_step = [shape.images if d == "images" else int(d) for d in t.shape[1:]]
                self.time_embeds[suffix] = allocate((steps, *of_a_step), t.dtype)


def buffer_bytes(bundle: Bundle, shape: LoopShape, schedule: Schedule) -> int:
    """What the buffers of a request take, each rounded up to the alignment."""
    return workspace_bytes(bundle, shape) + table_bytes(bundle, shape, schedule)


def workspace_bytes(bundle: Bundle, shape: LoopShape) -> int:
    """What the buffers of a loop shape take, whatever the number of steps."""
    return _counted(lambda allocate: Workspace(allocate, bundle, shape))


def table_bytes(bundle: Bundle, shape: LoopShape, schedule: Schedule) -> int:
    """What the values of every step of a request take."""
    noisy = any(schedule.noisy)
    return _counted(lambda allocate: StepTable(allocate, bundle, shape, schedule.steps, noisy))


def _counted(make: Callable[[Allocate], object]) -> int:
    total = 0

    def count(shape: Sequence[int], dtype: str) -> Buffer:
        nonlocal total
        buffer = Buffer(0, tuple(shape), np.dtype(dtype), None)
        total += aligned(buffer.nbytes)
        return buffer

    make(count)
    return total


def latent_shape(manifest: Manifest) -> tuple[int, int, int]:
    """(channels, h, w) of one image's latents."""
    factor = manifest.vae_scale_factor
    return manifest.latent_channels, manifest.height // factor, manifest.width // factor
