"""What a pipeline keeps within a budget, on the simulated GPU; run by tests/runtime/test_program_cache.py."""

import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.errors import DeviceMemoryError

gpu = fake_tensorrt.install()
fake: Any = fake_tensorrt

bundle, plans = Bundle.open(sys.argv[2]), Path(sys.argv[3])
fake_tensorrt.make_plans(bundle, plans)
m = bundle.manifest
IMAGES = np.random.default_rng(0).integers(0, 256, (2, m.height, m.width, 3), np.uint8)
MIB = 1 << 20  # what every engine takes
CORE = 6 * MIB
OF_A_CONDITION = 4 * MIB
loaded = fake_tensorrt.loaded


def ask(*conditions, image=0, steps=1, **fields):
    controls = [Control(c, IMAGES[image]) for c in conditions]
    return Request(**{"prompt": "a house", "seed": 1, **fields}, controls=controls, num_inference_steps=steps)


def same(a, b):
    return np.array_equal(a.images, b.images) and np.array_equal(a.latents, b.latents)


def loads(pipeline, condition, **fields):
    before = len(loaded)
    result = pipeline(ask(condition, **fields))
    return loaded[before:], result


def opened(**options: Any) -> Any:
    return Pipeline.open(bundle, "tensorrt", plans=plans, **options)


cpu = Pipeline.open(bundle, "onnxruntime-cpu", threads=1)


def a_swap_loads_and_records_nothing_again_on_a_gpu() -> None:
    pipeline = opened()
    before: list[str] = []
    for i in range(50):
        if i == 10:
            before = sorted(loaded)
            gpu.clear()
        result = pipeline(ask(list(CONDITIONS)[i % 5]))
        assert i < 5 or "denoise" in result.timings
    each = [f"{role}_{c}" for c in CONDITIONS for role in ("hint", "text_kv", "time_embeds", "controlnet")]
    core = ["text_encoder", "text_kv", "time_embeds", "unet", "update", "vae_decoder"]
    assert before == sorted(loaded) == sorted([*core, *each])
    assert not any("Instantiate" in call or "MemAlloc" in call for call in gpu.trace())


def two_hundred_mixed_requests_within_a_budget() -> None:
    LIMIT = CORE + OF_A_CONDITION + 2 * MIB
    pipeline = opened(vram_budget=LIMIT)
    rng = np.random.default_rng(1)
    names = list(CONDITIONS)
    used = []
    for i in range(200):
        one, other = rng.permutation(names)[:2]
        wanted = ask(
            *[one, other][: 2 if i % 7 == 0 else 1],
            image=i % 2,
            steps=1 + i % 2,
            seed=i,
            prompt=f"p {i % 20}",
            num_images_per_prompt=1 + i % 3 % 2,
            guidance_scale=float(rng.choice([1.0, 5.0])),
        )
        try:
            result = pipeline(wanted)
        except DeviceMemoryError:
            assert i % 7 == 0  # two conditions alone may not fit
            continue
        if i % 10 == 3:
            assert same(result, cpu(wanted)), i
        assert gpu.peak_bytes() <= LIMIT, i
        used.append((gpu.live_objects()["device"], gpu.live_objects()["exec"], gpu.live_objects()["pinned"]))
    assert len(used) > 170 and len(loaded) > 100
    assert np.max(used[100:], axis=0).tolist() <= (np.max(used[:100], axis=0) * 1.25).tolist(), used


def scratch_that_nothing_needs_any_more_goes_too() -> None:
    import gc

    def size(context):
        return context.shapes["model_input"][0] << 19 if "model_input" in context.shapes else 4096

    fake.Context.update_device_memory_size_for_shapes = size
    pipeline = opened(vram_budget=1 << 40)
    wanted = {n: ask("seg", num_images_per_prompt=n) for n in (1, 2)}
    LIMIT = CORE + OF_A_CONDITION + pipeline.memory_needed(wanted[2])["buffers"] + (2 << 20) + (256 << 10)
    pipeline.close()
    del pipeline
    gc.collect()
    pipeline = opened(vram_budget=LIMIT)
    for images in (1, 2, 1, 2, 1):
        assert same(pipeline(wanted[images]), cpu(wanted[images]))
    assert 3 * MIB + LIMIT // 2 < gpu.peak_bytes() <= LIMIT
    assert loaded.count("unet") == loaded.count("controlnet_seg") == 1


def a_budget_that_one_request_exceeds() -> None:
    pipeline = opened(vram_budget=CORE + OF_A_CONDITION + MIB)
    expected = pipeline(ask("seg"))
    try:
        pipeline(ask("seg", "depth"))
    except DeviceMemoryError as e:
        print(e)
    assert same(pipeline(ask("seg")), expected) and same(pipeline(ask("depth")), cpu(ask("depth")))
    small = opened(vram_budget=3 * MIB)
    gpu.clear()
    try:
        small(ask("seg"))
    except DeviceMemoryError as e:
        print(e)
    assert not any("MemAlloc" in call for call in gpu.trace())


def a_program_that_is_held_outside_keeps_its_engines() -> None:
    import gc

    gc.disable()  # nothing here may depend on it
    pipeline = opened()
    pipeline(ask("seg"))
    pipeline(ask("seg"))
    recordings = next(iter(pipeline._preparation.programs.programs.values()))
    held = gpu.live_bytes()
    for graph in ("hint_seg", "text_kv_seg", "time_embeds_seg", "controlnet_seg"):
        pipeline.backend.release(graph)
    pipeline._preparation.programs.programs.clear()
    assert gpu.live_bytes() == held
    assert pipeline.backend.held()["weights"] == CORE + OF_A_CONDITION
    replay = [step.launch for step in recordings.launches()]
    for launch in replay:
        launch()
    assert np.isfinite(pipeline.backend.download(recordings.program.workspace.latents)).all()
    del recordings, replay, launch  # pyright: ignore[reportPossiblyUnboundVariable]
    assert pipeline.backend.held()["weights"] == CORE
    assert gpu.live_bytes() <= held - OF_A_CONDITION
    assert loads(pipeline, "seg")[0] == ["hint_seg", "text_kv_seg", "time_embeds_seg", "controlnet_seg"]


def extractors_are_loaded_on_demand_too() -> None:
    LIMIT = CORE + OF_A_CONDITION + 2 * MIB
    pipeline = opened(vram_budget=LIMIT)
    photo = IMAGES[0]
    pipeline.extract("hed", photo)
    pipeline.backend.release("extractor_hed")
    assert fake_tensorrt.compiled == []
    pipeline.extract("hed", photo)
    assert fake_tensorrt.compiled == [b"compiled"]  # what was compiled before it was unloaded
    for condition in ("hed", "depth", "hed", "depth"):
        assert np.array_equal(pipeline.extract(condition, photo), cpu.extract(condition, photo))
        inside: list = []
        watched = pipeline(
            ask(condition),
            callback_on_step_end=lambda *step, inside=inside: inside.append(pipeline.extract("hed", photo)),
        )
        assert same(watched, cpu(ask(condition))) and same(pipeline(ask(condition)), watched)
        assert np.array_equal(inside[0], cpu.extract("hed", photo))
        assert gpu.peak_bytes() <= LIMIT
    assert loaded.count("unet") == 1
    assert loaded.count("controlnet_hed") > 1 and loaded.count("extractor_depth") > 1


def what_was_used_longest_ago_goes_first(limited: str) -> None:
    LIMIT = CORE + 2 * OF_A_CONDITION + MIB
    pipeline = opened(vram_budget=LIMIT if limited == "by a budget" else None)
    first, expected = loads(pipeline, "seg")
    own = ["hint_seg", "text_kv_seg", "time_embeds_seg", "controlnet_seg"]
    rest = ["text_encoder", "text_kv", "time_embeds", "unet", "vae_decoder"]
    assert sorted(first) == sorted([*own, *rest])  # update was, when opening
    assert same(expected, cpu(ask("seg")))

    def pair(condition):
        return sorted(f"{role}_{condition}" for role in ("hint", "text_kv", "time_embeds", "controlnet"))

    for condition, new in [
        ("depth", True),
        ("seg", False),
        ("hed", True),  # depth was used longest ago
        ("seg", False),
        ("depth", True),  # hed went
        ("seg", False),
        ("depth", False),
        ("hed", True),  # seg went
        ("depth", False),
        ("seg", True),
        ("canny", True),
        ("lineart", True),
        ("canny", False),
        ("seg", True),
    ]:
        found, result = loads(pipeline, condition)
        assert sorted(found) == (pair(condition) if new else []), (condition, found)
        assert same(result, cpu(ask(condition))), condition
        again = loads(pipeline, condition)[1]
        assert same(result, again) and "denoise" in again.timings, condition
        assert gpu.live_bytes() <= gpu.peak_bytes() <= LIMIT
    parts = pipeline.backend.memory()
    assert sum(parts.values()) == gpu.peak_bytes(), parts


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[4:])
