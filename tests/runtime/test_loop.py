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
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.graph_names import STEPS_AT_ONCE
from cnpp_trt.runtime.backends import interface
from cnpp_trt.runtime.backends.interface import ALIGNMENT, Allocate, Buffer, Step, WallClock, aligned
from cnpp_trt.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from cnpp_trt.runtime.encoding_cache import EncodingCache
from cnpp_trt.runtime.loop import Program, RequestTensors, run
from cnpp_trt.runtime.sampling.schedulers import build_table
from cnpp_trt.runtime.shape import LoopShape, Schedule
from cnpp_trt.runtime.text.prompts import Prompts
from cnpp_trt.runtime.workspace import buffer_bytes


class Recorder:
    """A backend that keeps what each launch was bound to instead of running it: what a CUDA graph would capture."""

    name = "recorder"

    def __init__(self) -> None:
        self.launched: list[tuple[str, dict[str, Buffer]]] = []
        self.copied: list[tuple[Buffer, Buffer]] = []
        self.allocated: list[Buffer] = []
        self._end = ALIGNMENT

    def load(self, graph: str) -> Any:
        launched = self.launched

        class Loaded:
            def bind(self, buffers: Mapping[str, Buffer]) -> Any:
                return lambda: launched.append((graph, dict(buffers)))

        return Loaded()

    def beside(self, graph: str, buffers: Mapping[str, Buffer]) -> Any:
        return self.load(graph).bind(buffers)

    def join(self) -> None:
        self.launched.append(("join", {}))

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

    def copy(self, source: Buffer, target: Buffer) -> None:
        assert source.nbytes == target.nbytes
        self.copied.append((source, target))

    def download(self, buffer: Buffer) -> np.ndarray:
        return np.zeros(buffer.shape, buffer.dtype)


Controls = tuple[tuple[str, tuple[bool, ...]], ...]


def program_of(
    backend: Any, bundle: Any, controls: Controls, images: int, guided: bool, noisy: Sequence[bool], chunks: int = 1
) -> Program:
    schedule = Schedule(tuple(active for _, active in controls), tuple(noisy))
    shape = LoopShape(images, guided, tuple(name for name, _ in controls), schedule.uncontrolled, chunks)
    return Program(backend, bundle, shape, schedule)


def record(bundle: Any, *controls: tuple[str, tuple[bool, ...]], steps: int = 3, **fields: Any) -> Recorder:
    backend = Recorder()
    noisy = fields.pop("noisy", (False,) * steps)
    program = program_of(backend, bundle, controls, fields.pop("images", 2), True, noisy)
    run([program.text, *program.hints, *program.launches()], WallClock())
    return backend


@pytest.fixture
def request_of(control_image: Any) -> Any:
    def make(model: Any, **fields: Any) -> Request:
        return Request("a house", controls=Control("seg", control_image(*model.size)), seed=1, **fields)

    return make


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
        assert after["coefficients"].address == before["coefficients"].address
    decoded = next(buffers for name, buffers in backend.launched if name == "vae_decoder")
    assert decoded["latents"].address == updates[-1]["new_state"].address
    unets = [buffers for name, buffers in backend.launched if name == "unet"]
    assert {u["model_input"].address for u in unets} == {updates[0]["model_input"].address}
    # One slot for what differs, which every step fills from its own row.
    [embeds], [coefficients] = (
        {b[t].address for b in bound} for t, bound in (("time_embeds", unets), ("coefficients", updates))
    )
    for slot in (embeds, coefficients - ALIGNMENT):  # coefficients are the second part of theirs
        rows = [source.address for source, target in backend.copied if target.address == slot]
        assert len(set(rows)) == 3 == len(rows) and rows == sorted(rows)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_last_step_of_any_number_leaves_the_latents_where_they_are_decoded(tiny, steps):
    backend = record(tiny.pipeline.bundle, ("seg", (True,) * steps), steps=steps)
    last = [buffers for name, buffers in backend.launched if name == "update"][-1]
    decoded = next(buffers for name, buffers in backend.launched if name == "vae_decoder")
    assert decoded["latents"].address == last["new_state"].address


def test_a_kind_of_step_is_bound_once(tiny):
    """A step differs from another one by the controls that apply and by the state that it reads."""
    bundle, backend = tiny.pipeline.bundle, Recorder()
    active = (True, True, True, True, False, False)
    program = program_of(backend, bundle, (("seg", active),), 1, True, (False,) * 6)
    assert len(program._kinds) == 4
    assert program.step(0)[1:] == program.step(2)[1:] and program.step(0)[1:] != program.step(1)[1:]
    many = Schedule((active * 20,), (True,) * 120)
    program.follow(many)
    assert len([step for step in program.launches() if step.graph == "unet"]) == 120
    assert len(program._kinds) == 4


def test_the_table_grows_with_the_number_of_steps(tiny):
    backend = Recorder()
    program = program_of(backend, tiny.pipeline.bundle, (("seg", ALWAYS),), 1, True, (False,) * 3)
    first = program.table
    program.follow(Schedule(((True, True),), (False,) * 2))
    assert program.table is first
    for longer in (Schedule(((True,) * 4,), (False,) * 4), Schedule(((True,) * 2,), (True, False))):
        program.follow(longer)
        assert program.table is not first
        first = program.table


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


def test_noise_is_copied_only_where_a_sampler_draws_some(tiny):
    for noisy, copies in (((True, True, False), 3), ((False,) * 3, 0)):
        backend = record(tiny.pipeline.bundle, ("seg", ALWAYS), noisy=noisy)
        [slot] = {buffers["noise"].address for name, buffers in backend.launched if name == "update"}
        found = [source.address for source, target in backend.copied if target.address == slot]
        assert len(set(found)) == len(found) == copies


def test_noise_of_an_earlier_request_does_not_stay(tiny, request_of):
    """LCM adds noise, DDIM does not: the slot is the same."""
    pipeline = Pipeline(tiny.pipeline.bundle, OnnxRuntimeCpu(tiny.pipeline.bundle, threads=1))
    quiet = request_of(tiny, scheduler="ddim", num_inference_steps=3)
    expected = pipeline(quiet).latents
    pipeline(request_of(tiny, scheduler="lcm", num_inference_steps=3))
    np.testing.assert_array_equal(pipeline(quiet).latents, expected)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_buffers_have_the_graphs_own_shapes_and_types(tiny, images, guided, chunks):
    """Every bound buffer against the signature in the manifest, with the free dimensions filled in."""
    bundle = tiny.pipeline.bundle
    backend = Recorder()
    controls = (("seg", ALWAYS), ("depth", ALWAYS))
    program = program_of(backend, bundle, controls, images, guided, (True,) * 3, chunks)
    run([program.text, *program.hoists.steps(), *program.hints, *program.launches()], WallClock())
    assert {name for name, _ in backend.launched} >= {"text_kv", "text_kv_depth", "time_embeds", "time_embeds_seg"}
    n = 2 if guided else 1
    sizes = {"batch": n * images, "images": images, "guidance": n, "steps": STEPS_AT_ONCE}
    sizes |= {"tokens": 77 * chunks, "prompts": n * images * chunks}
    for graph, buffers in backend.launched:
        spec = bundle.graph(graph)
        tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        assert tensors.keys() == buffers.keys(), graph
        for name, tensor in tensors.items():
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            assert (buffers[name].shape, buffers[name].dtype.name) == (shape, tensor.dtype), f"{graph}.{name}"


def test_timings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds are those of a clock by hand: each call of the UNet takes two."""
    now = [5.0]
    monkeypatch.setattr(interface, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = WallClock()

    def launch(seconds: float) -> None:
        now[0] += seconds

    def step(stage: str) -> Step:
        return Step(stage, stage, partial(launch, 2.0 if stage == "unet" else 0.25), {}, {})

    run([step("unet"), step("update"), step("unet"), step("update"), step("x")], clock)
    assert list(clock.seconds()) == ["unet", "update", "x"]
    run([step("unet"), step("update"), step("update")], clock)
    assert clock.seconds() == {"unet": 6.0, "update": 1.0, "x": 0.25}


def test_buffers_live_as_long_as_a_launch_that_holds_them(tiny):
    backend = OnnxRuntimeCpu(tiny.pipeline.bundle, threads=1)
    bundle = tiny.pipeline.bundle
    program = program_of(backend, bundle, (("seg", (True, True)),), 1, False, (False, False))
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
    steps, latents = [*program.step(0), *program.step(1)], program.workspace.latents
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
    backend = Recorder()
    start = backend._end
    program = program_of(backend, bundle, (("seg", ALWAYS), ("depth", ALWAYS)), 2, True, (True, False, True))
    assert backend._end - start == buffer_bytes(bundle, program.shape, program.schedule)
    spans = sorted((b.address, b.address + b.nbytes) for b in backend.allocated if b.nbytes)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert all(b.address % ALIGNMENT == 0 for b in backend.allocated)
