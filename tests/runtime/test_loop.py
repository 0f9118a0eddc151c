"""The list of launches: its order, what each launch is bound to, and how long buffers live."""

import gc
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from cnpp_trt.runtime.backend import Buffer
from cnpp_trt.runtime.loop import Program, Structure, run
from cnpp_trt.runtime.onnxruntime_cpu import ALIGNMENT, OnnxRuntimeCpu
from cnpp_trt.runtime.schedulers import build_table


class Recorder:
    """A backend that keeps what each launch was bound to instead of running it: what a CUDA graph would capture."""

    name = "recorder"

    def __init__(self) -> None:
        self.launched: list[tuple[str, dict[str, Buffer]]] = []
        self.allocated: list[Buffer] = []
        self._end = ALIGNMENT

    def load(self, graph: str) -> Any:
        class Loaded:
            def bind(_, buffers: Mapping[str, Buffer]) -> Any:
                return lambda: self.launched.append((graph, dict(buffers)))

        return Loaded()

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        buffer = Buffer(self._end, tuple(shape), np.dtype(dtype), None)
        self._end += buffer.nbytes + ALIGNMENT
        self.allocated.append(buffer)
        return buffer

    def upload(self, buffer: Buffer, array: np.ndarray) -> None: ...

    def download(self, buffer: Buffer) -> np.ndarray:
        return np.zeros(buffer.shape, buffer.dtype)


def record(bundle: Any, *controls: tuple[str, tuple[bool, ...]], steps: int = 3, **fields: Any) -> Recorder:
    backend = Recorder()
    noisy = fields.pop("noisy", (False,) * steps)
    program = Program(backend, bundle, Structure(fields.pop("images", 2), True, steps, controls, noisy))
    run([*program.prepare, *program.denoise, *program.decode], {})
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


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_buffers_have_the_graphs_own_shapes_and_types(tiny, images, guided):
    """Every bound buffer against the signature in the manifest, with the free dimensions filled in."""
    bundle = tiny.pipeline.bundle
    backend = Recorder()
    controls = (("seg", ALWAYS), ("depth", ALWAYS))
    program = Program(backend, bundle, Structure(images, guided, 3, controls, (True,) * 3))
    run([*program.prepare, *program.denoise, *program.decode], {})
    n = 2 if guided else 1
    sizes = {"batch": n * images, "images": images, "guidance": n}
    for graph, buffers in backend.launched:
        spec = bundle.graph(graph)
        tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        assert tensors.keys() == buffers.keys(), graph
        for name, tensor in tensors.items():
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            assert (buffers[name].shape, buffers[name].dtype.name) == (shape, tensor.dtype), f"{graph}.{name}"


def test_timings_and_steps_are_told():
    told: list[int] = []
    from cnpp_trt.runtime.loop import Step

    timings = {"unet": 1.0}
    steps = [Step("unet", lambda: None), Step("update", lambda: None, ends=0), Step("update", lambda: None, ends=1)]
    run(steps, timings, told.append)
    assert told == [0, 1]
    assert set(timings) == {"unet", "update"}
    assert timings["unet"] >= 1.0


def test_buffers_live_as_long_as_a_launch_that_holds_them(tiny):
    backend = OnnxRuntimeCpu(tiny.pipeline.bundle, threads=1)
    bundle = tiny.pipeline.bundle
    structure = Structure(1, False, 2, (("seg", (True, True)),), (False, False))
    program = Program(backend, bundle, structure)
    owner = weakref.ref(program.workspace.noise_pred.owner)
    table = build_table("ddim", bundle.manifest.scheduler_config, 2)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, program.workspace.control_images[0].shape[1:], np.uint8)
    noise = rng.standard_normal(program.workspace.latents.shape, np.float32)
    program.fill(
        input_ids=np.zeros((1, 77), np.int64),
        control_images=[image],
        table=table,
        guidance_scale=1.0,
        conditioning_scales=[1.0],
        noise=noise,
        step_noise=[None, None],
    )
    steps, latents = [*program.prepare, *program.denoise], program.workspace.latents
    del program
    gc.collect()
    litter = [np.full(1 << 16, 0xFF, np.uint8) for _ in range(200)]  # would land in memory that was freed
    run(steps, {})
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
    buffer = backend.allocate(shape, dtype)
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
    buffer = OnnxRuntimeCpu(tiny.pipeline.bundle).allocate((2, 6), "float32")
    seen = buffer.reshape(3, 2, 2)
    assert (seen.address, seen.nbytes, seen.owner) == (buffer.address, 48, buffer.owner)
    with pytest.raises(ValueError, match="cannot see"):
        buffer.reshape(5)
