"""No black picture in silence: graphs that go bad are named, an overflowing decoder is replaced; nothing stays bad."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.errors import BackendError
from cnpp_trt.runtime.backends.host_memory import view
from cnpp_trt.runtime.backends.interface import Buffer, Launch
from cnpp_trt.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from cnpp_trt.runtime.loop import run

pytestmark = pytest.mark.slow

STEPS = 4
ROW = (2, 64)  # timestep and coefficients of a step


def advice(pipeline: Any) -> str:
    folder = shlex.quote(str(pipeline.bundle.folder))
    return f"check the weights with `cnpp-trt verify {folder}`, or use a fp32 bundle"


class Spoiled(OnnxRuntimeCpu):
    """The CPU backend, where chosen launches write a value that is not finite into some of their outputs.

    Attributes:
        bad: by graph and step, the tensors to spoil, with the value; what runs outside of the steps is at step 0.
        step: that runs now: every step begins by copying its row of the table, which is uploaded before the first one.
        once: whether each launch is bad only the first time that it runs.
        downloads: shapes of what was downloaded.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, threads=1)
        self.bad: dict[tuple[str, int], dict[str, float]] = {}
        self.once = False
        self.step = -1
        self.downloads: list[tuple[int, ...]] = []

    def load(self, graph: str) -> Any:
        return _Graph(self, graph, super().load(graph))

    def upload(self, buffer: Buffer, array: Any) -> None:
        if buffer.shape[1:] == ROW:
            self.step = -1
        super().upload(buffer, array)

    def copy(self, source: Buffer, target: Buffer) -> None:
        if source.shape == ROW:
            self.step += 1
        super().copy(source, target)

    def download(self, buffer: Buffer) -> Any:
        self.downloads.append(buffer.shape)
        return super().download(buffer)


class _Graph:
    def __init__(self, backend: Spoiled, name: str, graph: Any) -> None:
        self._backend, self._name, self._graph = backend, name, graph

    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        backend, launch = self._backend, self._graph.bind(buffers)
        of_a_step = self._name in ("unet", "update", "add_residuals") or self._name.startswith("controlnet_")

        def call() -> None:
            launch()
            key = (self._name, backend.step if of_a_step else 0)
            for tensor, value in backend.bad.get(key, {}).items():
                view(buffers[tensor]).reshape(-1)[0] = value
            if backend.once:
                backend.bad.pop(key, None)

        return call


@pytest.fixture(scope="module")
def fp16(tiny_half: Path) -> Bundle:
    return Bundle.open(tiny_half)


Ask = Callable[..., Request]


@pytest.fixture
def request_(tiny: Any, control_image: Any) -> Ask:
    def make(*conditions: str, **fields: Any) -> Request:
        controls = [Control(condition, control_image(*tiny.size)) for condition in conditions or ("seg",)]
        return Request(
            "a house", "", controls, **{"num_inference_steps": STEPS, "guidance_scale": 3.0, "seed": 1, **fields}
        )

    return make


def spoiled(bundle: Bundle) -> tuple[Pipeline, Spoiled]:
    backend = Spoiled(bundle)
    return Pipeline(bundle, backend), backend


def refusal(pipeline: Pipeline, request: Request) -> str:
    with pytest.raises(BackendError) as error:
        pipeline(request)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.latents, b.latents)


OUTPUTS = [
    ("controlnet_seg", {"mid": np.nan}),
    ("controlnet_seg", {"down_0": np.inf}),
    ("unet", {"noise_pred": np.nan}),
    ("unet", {"noise_pred": -np.inf}),
    # What it computes the magnitude of is in it: both go bad together.
    ("update", {"new_state": np.nan, "magnitude": np.nan}),
    ("update", {"new_state": np.inf, "magnitude": np.inf}),
]


@pytest.mark.parametrize("step", [0, 1, STEPS - 1])
@pytest.mark.parametrize(("graph", "tensors"), OUTPUTS)
def test_the_first_bad_step_graph_and_tensor_are_named(tiny, request_, graph, tensors, step):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.bad[graph, step] = tensors
    expected = f"step {step + 1} of {STEPS}: {graph} gives values that are not finite in {next(iter(tensors))} (fp32)"
    assert refusal(pipeline, request_()) == f"{expected}: {advice(pipeline)}"

    # Nothing of it stays: the same program draws the next request as if nothing had been.
    backend.bad.clear()
    program = next(iter(pipeline._preparation.programs.programs.values()))
    drawn = pipeline(request_())
    assert next(iter(pipeline._preparation.programs.programs.values())) is program
    assert same(drawn, tiny.pipeline(request_()))
    assert drawn.notes == ()


@pytest.mark.parametrize("scheduler", ["unipc", "ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "lcm"])
def test_every_sampler_is_watched(tiny, request_, scheduler):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    wanted = request_(scheduler=scheduler, num_images_per_prompt=2)
    backend.bad["unet", 2] = {"noise_pred": np.nan}
    assert f"step 3 of {STEPS}: unet gives" in refusal(pipeline, wanted)
    backend.bad.clear()
    assert same(pipeline(wanted), tiny.pipeline(wanted))


def test_the_first_of_several_is_named(tiny, request_):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    wanted = request_("seg", "depth")
    for step in (1, 3):
        for graph, tensor in (("add_residuals", "sum_mid"), ("controlnet_depth", "mid"), ("unet", "noise_pred")):
            backend.bad[graph, step] = {tensor: np.nan}
    assert refusal(pipeline, wanted).startswith(f"step 2 of {STEPS}: controlnet_depth gives values")
    del backend.bad["controlnet_depth", 1]
    assert refusal(pipeline, wanted).startswith(f"step 2 of {STEPS}: add_residuals gives values")
    del backend.bad["add_residuals", 1]
    assert refusal(pipeline, wanted).startswith(f"step 2 of {STEPS}: unet gives values")


def test_a_model_input_that_overflows_is_the_update_graphs_fault(tiny, request_):
    """The next step's ControlNet is the first that shows it, but not where it came from; the state stays finite."""
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.bad["update", 1] = {"model_input": np.inf}
    assert refusal(pipeline, request_()).startswith(f"step 2 of {STEPS}: update gives values that are not finite in")


def test_the_last_model_input_is_nobodys(tiny, request_):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.bad["update", STEPS - 1] = {"model_input": np.inf}
    assert same(pipeline(request_()), tiny.pipeline(request_()))


@pytest.mark.parametrize(("graph", "tensor"), [("text_encoder", "prompt_embeds"), ("hint_seg", "hint")])
def test_what_is_encoded_before_the_loop_is_named_too(tiny, request_, graph, tensor):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.bad[graph, 0] = {tensor: np.nan}
    expected = f"{graph} gives values that are not finite in {tensor} (fp32): {advice(pipeline)}"
    assert refusal(pipeline, request_()) == expected
    # It is kept: the same input fails again without being computed, any other prompt is drawn.
    assert refusal(pipeline, request_()) == expected


def test_what_was_bad_only_once_is_said(tiny, request_):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.once = True
    backend.bad["unet", 1] = {"noise_pred": np.nan}
    said = refusal(pipeline, request_())
    assert said.startswith("a step gave values that are not finite once, and not when it was run again")
    assert same(pipeline(request_()), tiny.pipeline(request_()))


def test_step_by_step_it_is_found_as_well(tiny, request_):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.bad["unet", 1] = {"noise_pred": np.nan}
    seen: list[int] = []
    with pytest.raises(BackendError, match=f"step 2 of {STEPS}: unet gives"):
        pipeline(request_(), callback_on_step_end=lambda k, t, latents: seen.append(k))
    assert seen == list(range(STEPS))  # the callback is shown everything; nothing is drawn from it


def test_a_healthy_request_downloads_two_small_numbers_more_and_notes_nothing(tiny, request_):
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    drawn = pipeline(request_())
    assert drawn.notes == ()
    assert same(drawn, tiny.pipeline(request_()))
    workspace = next(iter(pipeline._preparation.programs.programs.values())).program.workspace
    assert backend.downloads == [b.shape for b in (workspace.magnitudes, workspace.image, workspace.latents)]


# --- the decoder


def decode(bundle: Bundle, graph: str, latents: np.ndarray) -> np.ndarray:
    """What the graph gives, without the package's runtime."""
    session = onnxruntime.InferenceSession(bundle.folder / bundle.graph(graph).file, providers=["CPUExecutionProvider"])
    outputs: Any = session.run(["image"], {"latents": latents})
    image: np.ndarray = outputs[0]
    return image


OVERFLOW = {"magnitude": np.nan, "image": 77}


@pytest.fixture(scope="module")
def half(fp16: Bundle) -> Iterator[tuple[Pipeline, Spoiled]]:
    yield spoiled(fp16)


def test_a_decoder_that_overflows_is_replaced_by_the_fp32_one(half, fp16, request_):
    pipeline, backend = half
    healthy = pipeline(request_())
    assert healthy.notes == ()
    backend.bad["vae_decoder", 0] = OVERFLOW
    replaced = pipeline(request_())
    assert replaced.notes == ("the decoder overflowed fp16: the latents were decoded again in fp32",)
    np.testing.assert_array_equal(replaced.latents, healthy.latents)
    exact = decode(fp16, "vae_decoder_fp32", replaced.latents)
    # This session optimizes the graph its own way: a last bit may round to the next level.
    assert np.abs(replaced.images.astype(int) - exact).max() <= 1
    assert (replaced.images == exact).mean() > 0.99
    # Again, and then healthy again.
    assert np.array_equal(pipeline(request_()).images, replaced.images)
    backend.bad.clear()
    after = pipeline(request_())
    assert after.notes == ()
    assert same(after, healthy)


def test_both_decoders_bad(half, request_):
    pipeline, backend = half
    healthy = pipeline(request_(seed=2))
    backend.bad["vae_decoder_fp32", 0] = OVERFLOW
    backend.bad["vae_decoder", 0] = OVERFLOW
    assert refusal(pipeline, request_(seed=2)) == f"the decoder's image is not finite (fp16): {advice(pipeline)}"
    backend.bad.clear()
    assert same(pipeline(request_(seed=2)), healthy)


def test_a_fp16_loop_that_overflows_is_an_error_and_the_decoder_is_not_blamed(half, request_):
    pipeline, backend = half
    backend.bad["controlnet_seg", 1] = {"mid": np.inf}
    said = refusal(pipeline, request_())
    assert said.startswith(f"step 2 of {STEPS}: controlnet_seg gives values that are not finite in mid (fp16)")
    backend.bad.clear()


def test_without_a_fp32_decoder_it_is_an_error(tiny, request_):
    assert "vae_decoder_fp32" not in tiny.pipeline.bundle.manifest.graphs
    pipeline, backend = spoiled(tiny.pipeline.bundle)
    backend.bad["vae_decoder", 0] = OVERFLOW
    assert refusal(pipeline, request_()) == f"the decoder's image is not finite (fp32): {advice(pipeline)}"
    backend.bad.clear()
    assert same(pipeline(request_()), tiny.pipeline(request_()))


def test_latents_that_are_infinite_really_go_through_the_decoders_check(fp16, half, request_):
    """Nothing is spoiled here: the decoder itself makes its magnitude of latents that fp16 cannot hold."""
    pipeline, backend = half
    program = pipeline.prepare(request_()).program
    for graph, latents, finite in [
        ("vae_decoder", 1.0, True),
        ("vae_decoder", 1e6, False),
        ("vae_decoder_fp32", 1e6, True),
        ("vae_decoder_fp32", np.inf, False),
        ("vae_decoder_fp32", np.nan, False),
    ]:
        backend.upload(program.workspace.latents, np.full(program.workspace.latents.shape, latents, np.float32))
        program.decoder(graph).launch()
        magnitude = backend.download(program.workspace.magnitude(decoded=True))
        assert np.isfinite(magnitude).all() == finite, (graph, latents, magnitude)


# --- the encoder


def test_an_encoder_that_overflows_is_replaced_by_the_fp32_one(half, fp16, request_, control_image):
    pipeline, backend = half
    m = fp16.manifest
    begun = request_(init_image=control_image(m.width, m.height, 3), strength=0.9)
    healthy = pipeline(begun)
    assert healthy.notes == ()
    backend.bad["vae_encoder", 0] = {"latents": np.inf}
    replaced = pipeline(begun)
    assert replaced.notes == ("the encoder overflowed fp16: the initial image was encoded again in fp32",)
    # The exact latents are near those of fp16, and the pictures with them.
    assert 0 < np.abs(replaced.latents - healthy.latents).max() < 0.05 * np.abs(healthy.latents).max()
    backend.bad["vae_encoder_fp32", 0] = {"latents": np.nan}
    assert "the encoder's latents are not finite (fp16)" in refusal(pipeline, begun)
    backend.bad.clear()
    assert same(pipeline(begun), healthy)


# --- the magnitudes themselves


@pytest.mark.parametrize("images", [1, 2])
def test_an_updates_magnitude_is_the_mean_of_its_new_state(tiny, request_, images):
    pipeline = tiny.pipeline
    ready = pipeline.prepare(request_(num_images_per_prompt=images))
    program, seen = ready.program, set()
    for k in range(STEPS):
        run(program.step(k), ready.clock)
        expected = np.abs(view(program.state(k + 1))).mean(dtype=np.float64)
        [magnitude] = pipeline.backend.download(program.workspace.magnitude())
        assert magnitude == pytest.approx(expected, rel=1e-5)
        seen.add(magnitude)
    assert len(seen) == STEPS


@pytest.mark.parametrize("graph", ["vae_decoder", "vae_decoder_fp32"])
def test_the_decoders_magnitude_is_that_of_its_picture_before_clamping(fp16, tmp_path, graph):
    model = onnx.load(fp16.folder / fp16.graph(graph).file)
    absolute = [node for node in model.graph.node if node.op_type == "Abs"]
    assert len(absolute) == 1
    before = absolute[0].input[0]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(before))
    onnx.save(model, tmp_path / "graph.onnx", save_as_external_data=True)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    m = fp16.manifest
    shape = (2, m.latent_channels, m.height // m.vae_scale_factor, m.width // m.vae_scale_factor)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    outputs: Any = session.run(["magnitude", "image", before], {"latents": latents})
    magnitude, image, decoded = outputs
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(magnitude, [np.abs(decoded).mean(dtype=np.float64)], rtol=1e-4)
    assert image.shape == (2, m.height, m.width, 3)
