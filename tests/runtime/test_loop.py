"""The list of launches: its order, what each launch is bound to, and how long buffers live."""

import gc
import itertools
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cnpp_trt.runtime.backends import interface
from cnpp_trt.runtime.backends.interface import ALIGNMENT, Allocate, Buffer, Step, WallClock, aligned
from cnpp_trt.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from cnpp_trt.runtime.encoding_cache import EncodingCache
from cnpp_trt.runtime.loop import LoopShape, Program, RequestTensors, run, workspace_bytes
from cnpp_trt.runtime.sampling.schedulers import build_table
from cnpp_trt.runtime.text.prompts import Prompts


class Recorder:
    """A backend that keeps what each launch was bound to instead of running it: what a CUDA graph would capture."""

    name = "recorder"

    def __init__(self) -> None:
        self.launched: list[tuple[str, dict[str, Buffer]]] = []
        self.allocated: list[Buffer] = []
        self._end = ALIGNMENT

    def load(self, graph: str) -> Any:
        launched = self.launched

        class Loaded:
            def bind(self, buffers: Mapping[str, Buffer]) -> Any:
                return lambda: launched.append((graph, dict(buffers)))

        return Loaded()

    def reserve(self, graphs: Sequence[str], nbytes: int) -> None: ...

    def arena(self, nbytes: int) -> Allocate:
        end = self._end + nbytes

        def allocate(shape: Sequence[int], dtype: str) -> Buffer:
            buffer = Buffer(self._end, tuple(shape), np.dtype(dtype), None)
            self._end += aligned(buffer.nbytes)
            assert self._end <= end, "the arena is too small"
            self.allocated.append(buffer)
            return buffer

        return allocate

    def upload(self, buffer: Buffer, array: np.ndarray) -> None: ...

    def download(self, buffer: Buffer) -> np.ndarray:
        return np.zeros(buffer.shape, buffer.dtype)


def program_of(backend: Any, bundle: Any, shape: LoopShape) -> Program:
    return Program(backend, bundle, shape)


def record(bundle: Any, *controls: tuple[str, tuple[bool, ...]], steps: int = 3, **fields: Any) -> Recorder:
    backend = Recorder()
    noisy = fields.pop("noisy", (False,) * steps)
    program = program_of(backend, bundle, LoopShape(fields.pop("images", 2), True, steps, controls, noisy))
    run([program.text, *program.hints, *program.denoise, *program.decode], WallClock())
    return backend


def names(backend: Recorder) -> list[str]:
    return [name for name, _ in backend.launched]


ALWAYS = (True, True, True)


def test_order_with_one_control(tiny):
    step = ["controlnet_seg", "unet", "update"]
    expected = ["text_encoder", "hint_seg", *step * 3, "vae_decoder"]
    assert names(record(tiny.pipeline.bundle, ("seg", ALWAYS))) == expected


def test_order_with_two_controls_and_steps_without(tiny):
    backend = record(tiny.pipeline.bundle, ("seg", (True, True, False)), ("depth", (False, True, False)))
    assert names(backend) == [
        "text_encoder", "hint_seg", "hint_depth",
        "controlnet_seg", "unet", "update",
        "controlnet_seg", "controlnet_depth", "add_residuals", "unet", "update",
        "unet", "update",
        "vae_decoder",
    ]  # fmt: skip


def test_a_sum_never_reads_what_it_writes(tiny):
    backend = record(tiny.pipeline.bundle, *[("seg", ALWAYS)] * 4, ("depth", ALWAYS))
    additions = [buffers for name, buffers in backend.launched if name == "add_residuals"]
    assert len(additions) == 4 * 3
    for buffers in additions:
        written = {b.address for name, b in buffers.items() if name.startswith("sum_")}
        read = {b.address for name, b in buffers.items() if not name.startswith("sum_")}
        assert not written & read
        assert len(written) == len(read) / 2


def test_every_step_reads_the_state_that_the_last_one_wrote(tiny):
    backend = record(tiny.pipeline.bundle, ("seg", ALWAYS))
    updates = [buffers for name, buffers in backend.launched if name == "update"]
    for before, after in itertools.pairwise(updates):
        assert after["state"].address == before["new_state"].address
        assert after["state"].address != after["new_state"].address
        assert after["coefficients"].address != before["coefficients"].address
    decoded = next(buffers for name, buffers in backend.launched if name == "vae_decoder")
    assert decoded["latents"].address == updates[-1]["new_state"].address
    unets = [buffers for name, buffers in backend.launched if name == "unet"]
    assert {u["model_input"].address for u in unets} == {updates[0]["model_input"].address}
    assert len({u["timestep"].address for u in unets}) == 3


def test_the_unet_reads_what_the_controls_wrote(tiny):
    backend = record(tiny.pipeline.bundle, ("seg", (True, True, False)), ("depth", (False, True, False)))
    launched = backend.launched
    sources = []
    for i, (name, buffers) in enumerate(launched):
        if name == "unet":
            before, written = launched[i - 1]
            key = {"add_residuals": "sum_mid", "controlnet_seg": "mid"}.get(before)
            sources.append(before if key and written[key].address == buffers["mid"].address else None)
    assert sources == ["controlnet_seg", "add_residuals", None]
    # Where no control applies it reads zeros, which nothing writes.
    silent = [b for n, b in launched if n == "unet"][2]["mid"].address
    outputs = {b.address for n, bound in launched if n in ("controlnet_seg", "controlnet_depth", "add_residuals")
               for key, b in bound.items() if key.removeprefix("sum_") == "mid"}  # fmt: skip
    assert silent not in outputs


def test_noise_is_bound_only_where_it_is_drawn(tiny):
    backend = record(tiny.pipeline.bundle, ("seg", ALWAYS), noisy=(True, True, False))
    noises = [buffers["noise"].address for name, buffers in backend.launched if name == "update"]
    assert len(set(noises)) == 3
    quiet = record(tiny.pipeline.bundle, ("seg", ALWAYS))
    assert len({buffers["noise"].address for name, buffers in quiet.launched if name == "update"}) == 1


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_buffers_have_the_graphs_own_shapes_and_types(tiny, images, guided, chunks):
    """Every bound buffer against the signature in the manifest, with the free dimensions filled in."""
    bundle = tiny.pipeline.bundle
    backend = Recorder()
    controls = (("seg", ALWAYS), ("depth", ALWAYS))
    program = program_of(backend, bundle, LoopShape(images, guided, 3, controls, (True,) * 3, chunks))
    run([program.text, *program.hints, *program.denoise, *program.decode], WallClock())
    n = 2 if guided else 1
    sizes = {"batch": n * images, "images": images, "guidance": n}
    sizes |= {"tokens": 77 * chunks, "prompts": n * images * chunks}
    for graph, buffers in backend.launched:
        spec = bundle.graph(graph)
        tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        assert tensors.keys() == buffers.keys(), graph
        for name, tensor in tensors.items():
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            assert (buffers[name].shape, buffers[name].dtype.name) == (shape, tensor.dtype), f"{graph}.{name}"


def test_timings_and_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds are those of a clock by hand: each call of the UNet takes two."""
    told: list[int] = []
    now = [5.0]
    monkeypatch.setattr(interface, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = WallClock()

    def launch(seconds: float) -> None:
        now[0] += seconds

    def step(stage: str, index: int | None = None, ends: bool = False) -> Step:
        return Step(stage, stage, partial(launch, 2.0 if stage == "unet" else 0.25), {}, {}, index, ends)

    run([step("unet", 0), step("update", 0, True), step("unet", 1), step("update", 1, True), step("x")], clock)
    assert clock.seconds().keys() == {"unet", "update", "x"}
    run([step("unet", 0), step("update", 0, True), step("update", 1, True)], clock, told.append)
    assert told == [0, 1]
    assert list(clock.seconds()) == ["unet", "update", "x", "callback"]
    assert clock.seconds() == {"unet": 6.0, "update": 1.0, "x": 0.25, "callback": 0.0}


def test_buffers_live_as_long_as_a_launch_that_holds_them(tiny):
    backend = OnnxRuntimeCpu(tiny.pipeline.bundle, threads=1)
    bundle = tiny.pipeline.bundle
    shape = LoopShape(1, False, 2, (("seg", (True, True)),), (False, False))
    program = Program(backend, bundle, shape)
    owner = weakref.ref(program.workspace.noise_pred.owner)
    table = build_table("ddim", bundle.manifest.scheduler_config, 2)
    rng = np.random.default_rng(0)
    assert program.workspace.control_image is not None
    image = rng.integers(0, 256, program.workspace.control_image.shape[1:], np.uint8)
    noise = rng.standard_normal(program.workspace.latents.shape, np.float32)
    tensors = RequestTensors(
        prompts=Prompts(np.zeros((1, 77), np.int64), np.zeros(1, np.int64), None, 1),
        control_images=[[image]],
        table=table,
        guidance_scales=[1.0],
        residual_scales=[np.ones((len(program.workspace.control_residuals[0]), 1, 1), np.float32)],
        latents=noise,
        step_noise=[None, None],
    )
    program.fill(tensors)
    program.encode(tensors, EncodingCache(backend), WallClock())
    steps, latents = program.denoise, program.workspace.latents
    del program
    gc.collect()
    litter = [np.full(1 << 16, 0xFF, np.uint8) for _ in range(200)]  # would land in memory that was freed
    run(steps, WallClock())
    assert owner() is not None
    found = backend.download(latents)
    assert np.isfinite(found).all()
    assert np.abs(found - noise).max() > 1e-3
    del steps, latents, litter
    gc.collect()
    assert owner() is None


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8"])
def test_cpu_buffers(tiny, shape, dtype):
    backend = OnnxRuntimeCpu(tiny.pipeline.bundle)
    buffer = backend.arena(0)(shape, dtype)
    assert buffer.address % ALIGNMENT == 0
    np.testing.assert_array_equal(backend.download(buffer), np.zeros(shape, dtype))
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    backend.upload(buffer, values)
    found = backend.download(buffer)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    np.testing.assert_array_equal(found, values)
    found[...] = 0
    np.testing.assert_array_equal(backend.download(buffer), values)


def test_a_buffer_seen_in_another_shape(tiny):
    buffer = OnnxRuntimeCpu(tiny.pipeline.bundle).arena(48)((2, 6), "float32")
    seen = buffer.reshape(3, 2, 2)
    assert (seen.address, seen.nbytes, seen.owner) == (buffer.address, 48, buffer.owner)
    with pytest.raises(ValueError, match="cannot see"):
        buffer.reshape(5)


def test_a_part_of_a_buffer(tiny):
    backend = OnnxRuntimeCpu(tiny.pipeline.bundle)
    buffer = backend.arena(0)((3, 4, 5), "float32")
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    backend.upload(buffer, values)
    np.testing.assert_array_equal(backend.download(buffer.part(2)), values[2])
    np.testing.assert_array_equal(backend.download(buffer.part(1, 3)), values[1, 3])
    np.testing.assert_array_equal(backend.download(buffer.part(1, 3, shape=(2, 1))), values[1, 3, :2].reshape(2, 1))
    assert backend.download(buffer.part(0, 1, shape=())) == values[0, 1, 0]
    assert buffer.part(1).owner is buffer.owner
    with pytest.raises(ValueError, match="cannot see"):
        buffer.part(1, 3, shape=(6,))
    with pytest.raises(IndexError):
        buffer.part(3)


def test_the_arena_is_exactly_as_large_as_its_buffers(tiny):
    bundle = tiny.pipeline.bundle
    shape = LoopShape(2, True, 3, (("seg", ALWAYS), ("depth", ALWAYS)), (True, False, True))
    backend = Recorder()
    start = backend._end
    program_of(backend, bundle, shape)
    assert backend._end - start == workspace_bytes(bundle, shape)
    spans = sorted((b.address, b.address + b.nbytes) for b in backend.allocated if b.nbytes)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert all(b.address % ALIGNMENT == 0 for b in backend.allocated)
