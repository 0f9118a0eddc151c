"""The backend `tensorrt` on the simulated GPU; run by tests/runtime/backends/test_tensorrt_simulated.py."""

import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.errors import BackendError
from cnpp_trt.runtime.backends.interface import aligned
from cnpp_trt.runtime.program_cache import MAX_PROGRAMS

gpu = fake_tensorrt.install()

bundle, plans = Bundle.open(sys.argv[2]), Path(sys.argv[3])
fake_tensorrt.make_plans(bundle, plans)
m = bundle.manifest
IMAGES = np.random.default_rng(0).integers(0, 256, (4, m.height, m.width, 3), np.uint8)


def request(*conditions: str, image: Any = 0, scale: Any = 1.0, **fields: Any) -> Request:
    controls = [Control(c, IMAGES[image], scale) for c in conditions or ("seg",)]
    fields = {"prompt": "a house", "num_inference_steps": fields.pop("steps", 3), "seed": 1, **fields}
    return Request(controls=controls, **fields)


def same(a, b):
    return np.array_equal(a.images, b.images) and np.array_equal(a.latents, b.latents)


def refused(call):
    try:
        call()
    except BackendError as e:
        assert "\n" not in str(e)
        return str(e)
    raise AssertionError("nothing was raised")


cpu = Pipeline.open(bundle, "onnxruntime-cpu", threads=1)


def opened(**options: Any) -> Any:
    return Pipeline.open(bundle, "tensorrt", plans=plans, **options)


def recorded_and_unrecorded_draw_the_cpu_backends_images() -> None:
    pipeline = opened()
    unguided = request(num_images_per_prompt=2, scheduler="lcm", guidance_scale=1.0)
    left_out = request("seg", "depth", guidance_end=0.67, controlnet_interval=2, timestep_spacing="trailing")
    reused = request("seg", "depth", guidance_interval=2, controlnet_interval=2, num_images_per_prompt=2)
    for wanted in (request(), request("seg", "depth"), unguided, left_out, reused):
        expected = cpu(wanted)
        one_by_one = pipeline(wanted)
        recorded = pipeline(wanted)
        stepped: list = []
        watched = pipeline(wanted, callback_on_step_end=lambda k, t, latents, to=stepped: to.append((k, latents)))
        assert "unet" in one_by_one.timings
        for result in (recorded, watched):
            assert "denoise" in result.timings and "unet" not in result.timings and result.notes == ()
        assert same(expected, one_by_one) and same(expected, recorded) and same(expected, watched)
        assert [k for k, _ in stepped] == [0, 1, 2] and np.array_equal(stepped[-1][1], expected.latents)


def images_to_begin_with_long_prompts_and_clip_skip() -> None:
    pipeline = opened()
    wanted = [
        request(init_image=IMAGES[1], strength=0.7, steps=5, num_images_per_prompt=2),
        request(init_image=IMAGES[2], strength=0.61, steps=5, num_images_per_prompt=2, guidance_scale=2.0),
        request(prompt="a house " * 15, long_prompt=True),
        request(prompt="a house " * 14, negative_prompt="fog", long_prompt=True, clip_skip=1),
        request(prompt="a house (again:1.3) BREAK red", long_prompt=True, prompt_weights=True, clip_skip=1),
    ]
    for each in wanted:
        assert same(cpu(each), pipeline(each)), each
        assert same(cpu(each), pipeline(each)), each
    assert len(pipeline._preparation.programs.programs) == 2
    assert [s.chunks for s in pipeline._preparation.programs.programs] == [1, 2]


def a_graph_launch_for_each_step_and_no_wait_inside() -> None:
    pipeline = opened(warm=request())
    gpu.clear()
    fake_tensorrt.launches.clear()
    pipeline(request(seed=9, prompt="a tree", image=1))
    trace = gpu.trace()
    assert trace.count("cuGraphLaunch") == 3 + 1, trace
    waits = [i for i, call in enumerate(trace) if "Synchronize" in call]
    first_copy_back = next(i for i, call in enumerate(trace) if call.startswith("cuMemcpyDtoH"))
    assert min(waits) > first_copy_back > max(i for i, call in enumerate(trace) if call == "cuGraphLaunch"), trace
    step = ["controlnet_seg", "unet", "update"]
    assert fake_tensorrt.launches == ["text_encoder", "text_kv", "text_kv_seg", "hint_seg", *step * 3, "vae_decoder"], (
        fake_tensorrt.launches
    )
    assert not any("Alloc" in call or "Free" in call for call in trace if "Host" in call), trace


def values_are_data_in_the_recording() -> None:
    pipeline = opened(warm=request())
    (recordings,) = pipeline._preparation.programs.programs.values()
    made = gpu.live_objects()["exec"]
    changes = dict(prompt="a tree", seed=7, scale=0.3, guidance_scale=2.0, image=2, scheduler="ddim")
    for changed in [{name: value} for name, value in changes.items()] + [changes, {}]:
        assert same(pipeline(request(**changed)), cpu(request(**changed))), changed
    assert gpu.live_objects()["exec"] == made == 3  # both kinds of step and the decoder
    assert list(pipeline._preparation.programs.programs.values()) == [recordings]


def two_hundred_mixed_requests_need_no_more_memory() -> None:
    pipeline = opened()
    rng = np.random.default_rng(1)
    mixed = [
        request(
            *["seg", "depth"][: 1 + i % 2],
            image=int(rng.integers(4)),
            steps=1 + i % 3,
            seed=i,
            num_images_per_prompt=1 + i % 2,
            guidance_scale=float(rng.choice([1.0, 5.0])),
            prompt=f"prompt {i % 5}",
        )
        for i in range(200)
    ]
    used = []
    for i, wanted in enumerate(mixed):
        result = pipeline(wanted)
        if i % 40 == 39:
            assert same(result, cpu(wanted))
            used.append((gpu.live_bytes(), gpu.live_objects()["device"], gpu.live_objects()["exec"]))
    assert max(u[0] for u in used[1:]) <= used[0][0] * 1.25, used
    assert all(u[2] <= 3 * MAX_PROGRAMS for u in used), used  # two kinds of step and the decoder
    assert gpu.live_objects()["event"] == 0


def a_recording_keeps_its_memory_and_gives_it_back() -> None:
    import gc

    pipeline = opened(warm=request(), cuda_graphs="loop")
    (recordings,) = pipeline._preparation.programs.programs.values()
    recording, latents, before = recordings.loop(), recordings.program.workspace.latents, gpu.live_bytes()
    pipeline._preparation.programs.programs.clear()
    del recordings
    gc.collect()
    assert gpu.live_bytes() == before
    recording()
    assert np.isfinite(pipeline.backend.download(latents)).all()
    del recording, latents
    gc.collect()
    assert gpu.live_bytes() < before
    assert gpu.live_objects()["exec"] == 0


def garbage_that_is_collected_during_a_capture_does_not_spoil_it() -> None:
    import gc
    import weakref

    gc.set_threshold(0)  # on, but never of itself
    pipeline, gone = opened(), opened()
    gone(request())
    memory = weakref.ref(gone.backend._scratch[False]().owner)
    del gone
    assert memory() is not None
    record = pipeline.backend.record

    def collect():
        gc.set_threshold(1, 1, 1)
        return [[] for _ in range(5000)]

    pipeline.backend.record = lambda launches: record([launches[0], collect, *launches[1:]])
    pipeline(request())
    recorded = pipeline(request())
    assert "denoise" in recorded.timings and recorded.notes == (), recorded.notes
    assert same(recorded, cpu(request()))
    gc.collect()
    assert memory() is None


def requests_of_several_threads_queue() -> None:
    from concurrent.futures import ThreadPoolExecutor

    pipeline = opened()
    wanted = [request(seed=i, prompt=f"p{i % 3}", image=i % 4, steps=2 + i % 2) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(pipeline, wanted))
    for w, f in zip(wanted, found, strict=True):
        assert same(f, cpu(w))


def a_card_that_is_too_small_gets_one_line_before_anything_is_loaded() -> None:
    pipeline = opened()
    gpu.clear()
    print(refused(lambda: pipeline(request())))
    assert not any("Alloc" in call for call in gpu.trace())


def memory_by_part() -> None:
    pipeline = opened()
    needed = pipeline.memory_needed(request())
    assert gpu.live_bytes() == 1 << 20 and needed["weights"] == 9 << 20, needed  # the smallest is loaded when opening
    pipeline(request())
    held = pipeline.memory_needed(request())
    assert held["weights"] == held["activations"] == 0 < held["buffers"] == needed["buffers"], held
    begun = pipeline.memory_needed(request(init_image=IMAGES[1]))
    assert begun["weights"] == 1 << 20, begun  # the encoder's plan
    assert begun["buffers"] > held["buffers"], begun
    parts = pipeline.backend.memory()
    assert parts["weights"] == 10 << 20, parts  # ten plans of 1 MiB, as their records say
    assert parts["activations"] == aligned(fake_tensorrt.SCRATCH) > fake_tensorrt.SCRATCH
    assert sum(parts.values()) == gpu.live_bytes()


def what_was_compiled_is_kept_for_the_next_process() -> None:
    opened(warm=request())
    caches = sorted(p.parent.name.rpartition("-")[0] for p in plans.glob("*/runtime-sm120-cuda*.cache"))
    once = ["text_encoder", "text_kv", "text_kv_seg", "time_embeds", "time_embeds_seg"]
    assert caches == ["controlnet_seg", "hint_seg", *once, "unet", "update", "vae_decoder"], caches
    assert {p.suffix for p in plans.glob("*/*")} == {".cache", ".engine", ".json"}
    assert fake_tensorrt.compiled == []
    opened(warm=request())
    assert fake_tensorrt.compiled == [b"compiled"] * 10


def what_cannot_be_captured_runs_launch_by_launch_and_says_so() -> None:
    fake_tensorrt.uncapturable.add("unet")
    for asked in ("loop", "step"):
        pipeline = opened(cuda_graphs=asked)
        first = pipeline(request())
        assert first.notes == ()
        gpu.clear()
        second = pipeline(request())
        assert same(first, cpu(request())) and same(second, first) and "unet" in second.timings
        [note] = second.notes
        what = {"loop": "the whole loop", "step": "each step"}[asked]
        assert note.startswith(f"CUDA graphs record each launch instead of {what}: tensorrt-rtx 1.7.1.116 cannot "), (
            note
        )
        assert "capture unet" in note, note
        assert gpu.trace().count("cuGraphLaunch") == 2 * 3 + 1  # the UNet's own launches are none
    fake_tensorrt.uncapturable.update(bundle.manifest.graphs)
    pipeline = opened(warm=request())
    gpu.clear()
    last = pipeline(request())
    assert same(last, first) and not any("cuGraphLaunch" in call for call in gpu.trace())
    assert last.notes[0].startswith("CUDA graphs record nothing instead of each step: "), last.notes


def every_rung_draws_the_same_bytes() -> None:
    """More steps than any program was made for, controls that end early, callbacks, progress and cancellation."""
    import threading

    from cnpp_trt.errors import Cancelled

    wanted = [
        request(),
        request(steps=7, seed=3),
        request(steps=4, scheduler="lcm", guidance_scale=1.0),
        request("seg", "depth", steps=5),
    ]
    half = request(steps=6)
    half = Request(**{**vars(half), "controls": [Control("seg", IMAGES[0], control_guidance_end=0.5)]})
    wanted.append(half)
    graphs = {"loop": 1, "step": 4, "launch": 10, "off": 0}
    for rung, count in graphs.items():
        pipeline = opened(cuda_graphs=rung)
        for each in wanted:
            expected = cpu(each)
            for _ in range(3):
                found = pipeline(each)
                assert same(found, expected) and found.notes == (), (rung, found.notes)
        gpu.clear()
        pipeline(wanted[0])
        assert gpu.trace().count("cuGraphLaunch") == count, (rung, gpu.trace())
        seen: list[Any] = []
        pipeline(wanted[1], on_progress=lambda *of, to=seen: to.append(of))
        assert seen == ([] if rung == "loop" else [(k + 1, 7) for k in range(7)]), seen
        latents: list[Any] = []
        pipeline(wanted[1], callback_on_step_end=lambda k, t, x, to=latents: to.append((k, t, x)))
        expected_latents: list[Any] = []

        def expect(k: int, t: float, x: Any, to: Any = expected_latents) -> None:
            to.append((k, t, x))

        cpu(wanted[1], callback_on_step_end=expect)
        for (k, t, x), (j, u, y) in zip(latents, expected_latents, strict=True):
            assert (k, t) == (j, u) and np.array_equal(x, y)
        cancel = threading.Event()
        stopped: list[int] = []

        def stop(k: int, t: float, x: Any, to: Any = stopped, cancel: Any = cancel) -> None:
            to.append(k)
            if k == 2:
                cancel.set()

        fake_tensorrt.launches.clear()
        try:
            pipeline(wanted[1], callback_on_step_end=stop, cancel=cancel)
            raise AssertionError("it was not cancelled")
        except Cancelled:
            pipeline.backend.synchronize()
        assert stopped == [0, 1, 2] and fake_tensorrt.launches.count("update") == 4  # one step more was under way
        assert same(pipeline(wanted[1]), cpu(wanted[1]))


def a_single_request_records_nothing() -> None:
    pipeline = opened()
    pipeline(request())
    assert not any("Capture" in call or "Instantiate" in call for call in gpu.trace())
    pipeline(request(steps=5))  # of the same kinds of step
    assert sum("Instantiate" in call for call in gpu.trace()) == 3


def a_recording_that_does_not_fit_evicts_or_is_not_made() -> None:
    from cnpp_trt.runtime.backends import cuda

    pipeline = opened(vram_budget=1 << 40)
    pipeline(request())
    pipeline._preparation.encodings.clear()  # they would make room first
    held = sum(pipeline.backend.held().values())
    tight = opened(vram_budget=held + 1000)
    tight(request())
    result = tight(request())
    assert same(result, cpu(request())) and "unet" in result.timings
    assert "CUDA graphs record nothing instead of each step: a recording of" in result.notes[0], result.notes
    roomy = opened(vram_budget=held + 100 * cuda._BYTES_PER_NODE)
    roomy(request())
    assert "denoise" in roomy(request()).timings


def a_plan_that_was_changed_is_not_loaded() -> None:
    plan = next(plans.glob("unet-*/plan.engine"))
    content = bytearray(plan.read_bytes())
    content[3] ^= 1
    plan.write_bytes(content)
    print(refused(lambda: opened()(request())))


def plans_that_are_missing_or_of_another_version_or_size() -> None:
    print(refused(lambda: opened()(request(num_images_per_prompt=3))))
    module: Any = sys.modules["tensorrt_rtx"]
    module.__version__ = "1.8.0"
    print(refused(opened))
    print(refused(lambda: Pipeline.open(bundle, "tensorrt", plans=plans / "nowhere")))


def auto_takes_plans_where_there_are_some_and_says_why_not() -> None:
    import os

    os.environ["CNPP_TRT_HOME"] = str(plans.parent / "home")
    print(Pipeline.open(bundle, "auto", plans=plans).backend.name)
    chosen = Pipeline.open(bundle, "auto")
    print(chosen.backend.name, chosen.reason)


def a_nan_is_traced_to_its_graph(graph: str) -> None:
    pipeline = opened(warm=request())
    bad = {"unet": "noise_pred", "controlnet_seg": "mid", "vae_decoder": "magnitude"}[graph]

    def poison(name, value):
        # The update graph's launches count the steps.
        late = graph == "vae_decoder" or fake_tensorrt.launches.count("update") % 3 >= 1
        return np.full_like(value, np.nan) if name == bad and late else value

    fake_tensorrt.launches.clear()
    fake_tensorrt.poison[graph] = poison
    print(refused(lambda: pipeline(request())))
    fake_tensorrt.poison.clear()
    fake_tensorrt.launches.clear()
    assert same(pipeline(request()), cpu(request()))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[4:])
