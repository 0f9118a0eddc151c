"""bundle → plans: which graphs at which sizes, and that nothing is built twice or from a damaged file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.bundles.bundle import Bundle, GraphSpec, TensorSpec
from cnpp_trt.engines import build as module
from cnpp_trt.engines.build import MAX_IMAGES, Engines, Sizes, build_engines, required_graphs
from cnpp_trt.engines.flavor import Flavor
from cnpp_trt.engines.plan import BuilderSettings, PlanKey, Profile, Range
from cnpp_trt.engines.store import PlanStore
from cnpp_trt.errors import BackendError, BundleError, UserError

ALL = ["unet", "update", "hint_seg", "controlnet_seg", "extractor_seg", "hint_depth", "controlnet_depth"]


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, fake_built: Any) -> list[tuple[Path, list[Profile], dict[str, Any]]]:
    """The calls of the builder, which builds nothing: each plan is its number."""
    calls: list[tuple[Path, list[Profile], dict[str, Any]]] = []

    def fake(flavor: Flavor, onnx: Path, profiles: list[Profile], settings: BuilderSettings, **options: Any) -> Any:
        calls.append((onnx, profiles, {**options, "settings": settings}))
        cache = options["timing_cache"]
        return fake_built(f"plan {len(calls)}".encode(), timing_cache=cache if cache is None else cache + b"+")

    monkeypatch.setattr(module, "build_plan", fake)
    return calls


FAKE_RTX = Flavor("tensorrt-rtx", None, "1.7.1")


def make(bundle: Bundle, conditions: list[str], store: PlanStore, **options: Any) -> Engines:
    options = {"flavor": FAKE_RTX, "sizes": Sizes(), "settings": BuilderSettings(), **options}
    return build_engines(bundle, conditions, store=store, **options)


# -------------------------------------------------------------------------------------------------------- which graphs


@pytest.mark.parametrize(
    ("conditions", "wanted"),
    [
        (["seg"], set(ALL) - {"hint_depth", "controlnet_depth"}),
        (["depth"], {"unet", "update", "hint_depth", "controlnet_depth"}),
        (["seg", "depth"], set(ALL)),
        (["depth", "seg", "depth"], set(ALL)),
        ([], {"unet", "update"}),
    ],
)
def test_graphs_of_the_conditions(small: Bundle, conditions: list[str], wanted: set[str]) -> None:
    names = required_graphs(small, conditions)
    assert set(names) == wanted
    assert len(names) == len(wanted)


def test_the_smallest_graph_comes_first(small: Bundle) -> None:
    for i, name in enumerate(reversed(ALL)):
        small.manifest.files[f"{name}.onnx"] = {"size": 10 * (i + 1), "sha256": ""}
    small.manifest.files["hint_seg.onnx.data"] = {"size": 1000, "sha256": ""}
    names = required_graphs(small, ["seg", "depth"])
    assert names == [*(n for n in reversed(ALL) if n != "hint_seg"), "hint_seg"]


@pytest.mark.parametrize(
    ("condition", "said"), [("canny", r"has no condition 'canny'.*cnpp-trt export"), ("frob", "unknown condition")]
)
def test_a_condition_that_the_bundle_lacks(
    small: Bundle, store: PlanStore, builds: list[Any], condition: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make(small, ["seg", condition], store)
    assert builds == []
    assert not store.root.exists()


@pytest.mark.slow
def test_the_real_bundle(real: Bundle) -> None:
    names = required_graphs(real, ["seg"])
    assert set(names) == set(real.manifest.graphs)
    assert names[-1] == "unet"


# --------------------------------------------------------------------------------------------------------- which sizes


def graph(name: str = "unet", **shapes: tuple[int | str, ...]) -> GraphSpec:
    return GraphSpec(
        f"{name}.onnx", tuple(TensorSpec(n, "float16", s) for n, s in shapes.items()), (), 0.0, 0.0, "relative L2", 0.0
    )


UNET = graph(model_input=("batch", 4, 8, 8), timestep=(1,), prompt_embeds=("batch", 77, 32))
UPDATE = graph("update", noise_pred=("guidance", "images", 4, 8, 8), state=(4, "images", 4, 8, 8), coefficients=(5, 7))
DECODER = graph("vae_decoder", latents=("images", 4, 8, 8))
HINT = graph("hint_seg", control_image=(1, 64, 64, 3))
EXTRACTOR = graph("extractor_seg", image=("images", 64, 64, 3))


def fixed_sizes(sizes: Sizes, spec: GraphSpec) -> list[dict[str, tuple[int, ...]]]:
    profiles = sizes.profiles(spec)
    assert all(r.min == r.opt == r.max for p in profiles for r in p.values())
    return [{name: r.opt for name, r in profile.items()} for profile in profiles]


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        (Sizes(), [2]),
        (Sizes(guided=(False,)), [1]),
        (Sizes(guided=(True, False)), [2, 1]),
        (Sizes((1, 2, 3, 4)), [2, 4, 6, 8]),
        (Sizes((1, 2, 3, 4), (False,)), [1, 2, 3, 4]),
        (Sizes((1, 2, 4), (True, False)), [2, 4, 8, 1]),  # 2 and 4 are there already
        (Sizes((2, 2)), [4]),
    ],
)
def test_a_profile_for_each_batch(sizes: Sizes, batches: list[int]) -> None:
    assert fixed_sizes(sizes, UNET) == [
        {"model_input": (n, 4, 8, 8), "timestep": (1,), "prompt_embeds": (n, 77, 32)} for n in batches
    ]


def test_images_and_guidance_are_two_dimensions() -> None:
    both = Sizes((1, 2), (True, False))
    assert [(s["noise_pred"][:2], s["state"][1]) for s in fixed_sizes(both, UPDATE)] == [
        ((2, 1), 1), ((3, 1), 1), ((2, 2), 2), ((3, 2), 2), ((1, 1), 1), ((1, 2), 2)
    ]  # fmt: skip
    [whole] = Sizes((1, 2), (True, False), dynamic=True).profiles(UPDATE)
    assert (whole["noise_pred"].min[:2], whole["noise_pred"].max[:2]) == ((1, 1), (3, 2))
    assert all(s["coefficients"] == (5, 7) for s in fixed_sizes(both, UPDATE))


def test_graphs_that_know_no_guidance() -> None:
    both = Sizes((1, 4), (True, False))
    assert fixed_sizes(both, DECODER) == [{"latents": (n, 4, 8, 8)} for n in (1, 4)]
    assert fixed_sizes(both, HINT) == [{"control_image": (1, 64, 64, 3)}]


def test_prompts_of_several_chunks() -> None:
    """The UNet reads their tokens in a row, the text encoder one chunk after the other."""
    text = graph("text_encoder", input_ids=("prompts", 77))
    unet = graph(model_input=("batch", 4, 8, 8), prompt_embeds=("batch", "tokens", 32))
    sizes = Sizes((1, 2), chunks=(1, 3))
    assert [s["prompt_embeds"] for s in fixed_sizes(sizes, unet)] == [
        (2, 77, 32),
        (4, 77, 32),
        (2, 231, 32),
        (4, 231, 32),
    ]
    assert [s["input_ids"] for s in fixed_sizes(sizes, text)] == [(2, 77), (4, 77), (6, 77), (12, 77)]
    assert fixed_sizes(sizes, HINT) == [{"control_image": (1, 64, 64, 3)}]
    with pytest.raises(UserError, match="1 chunk or more"):
        Sizes(chunks=(0,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_extractors_look_at_one_image(dynamic: bool) -> None:
    for sizes in (Sizes((1, 4), (True, False), dynamic), Sizes((2, 3), dynamic=dynamic)):
        assert fixed_sizes(sizes, EXTRACTOR) == [{"image": (1, 64, 64, 3)}]


def test_one_profile_for_the_whole_range() -> None:
    def batch(sizes: Sizes) -> tuple[int, int, int]:
        [profile] = sizes.profiles(UNET)
        assert profile["timestep"] == Range((1,), (1,), (1,))
        r = profile["model_input"]
        assert {s[1:] for s in (r.min, r.opt, r.max)} == {(4, 8, 8)}
        return r.min[0], r.opt[0], r.max[0]

    assert batch(Sizes((1, 2, 4), dynamic=True)) == (2, 2, 8)
    assert batch(Sizes((1, 4), (True, False), dynamic=True)) == (1, 2, 8)
    assert batch(Sizes((4, 1), dynamic=True)) == (2, 8, 8)
    [update] = Sizes((1, 3), (True, False), dynamic=True).profiles(UPDATE)
    assert update["noise_pred"] == Range((1, 1, 4, 8, 8), (2, 1, 4, 8, 8), (3, 3, 4, 8, 8))
    assert Sizes((3,), dynamic=True).profiles(HINT) == Sizes().profiles(HINT)


@pytest.mark.parametrize("images", [(), (0,), (1, -1), (MAX_IMAGES + 1,), (1, 99)])
def test_numbers_of_images_that_no_plan_is_for(images: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="plans are for 1 to 16 images, not ") as refused:
        Sizes(images)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------- building once


def test_a_second_build_builds_nothing(
    small: Bundle, store: PlanStore, builds: list[Any], told: pytest.LogCaptureFixture
) -> None:
    first = make(small, ["seg"], store)
    assert [p.key.graph for p in first.plans] == list(first.built) == required_graphs(small, ["seg"])
    assert [onnx for onnx, _, _ in builds] == [small.folder / f"{name}.onnx" for name in first.built]
    assert [line.partition(":")[0] for line in told.messages] == list(first.built)
    assert all(p.model == "small" for p in first.plans)
    told.clear()
    second = make(small, ["seg"], store)
    assert (second.built, told.messages, len(builds)) == ((), [], len(first.built))
    assert [p.sha256 for p in second.plans] == [p.sha256 for p in first.plans]


def test_one_unet_for_two_conditions(small: Bundle, store: PlanStore, builds: list[Any]) -> None:
    seg, depth = make(small, ["seg"], store), make(small, ["depth"], store)
    assert set(depth.built) == {"hint_depth", "controlnet_depth"}
    folders = {plan.key.graph: plan.folder for plan in seg.plans}
    assert {plan.key.graph: plan.folder for plan in depth.plans if plan.key.graph in folders} == {
        name: folders[name] for name in ("unet", "update")
    }
    assert make(small, ["depth", "seg"], store).built == ()
    assert len(list(store.root.glob("unet-*"))) == 1


def test_only_what_changed_is_built(
    small: Bundle, store: PlanStore, builds: list[Any], told: pytest.LogCaptureFixture
) -> None:
    first = make(small, ["seg"], store)
    (next(p for p in first.plans if p.key.graph == "unet")).engine.write_bytes(b"")
    told.clear()
    assert make(small, ["seg"], store).built == ("unet",)
    assert "has 0 bytes" in told.messages[0]
    told.clear()
    # A number of images changes no hint's and no extractor's plan.
    assert set(make(small, ["seg"], store, sizes=Sizes((2,))).built) == {"unet", "controlnet_seg"}
    newer = replace(FAKE_RTX, version="1.7.2")
    assert len(make(small, ["seg"], store, flavor=newer).built) == len(first.plans)
    reasons = [line for line in told.messages if "building it again" in line]
    assert len(reasons) == len(first.plans)
    assert all("was built for version 1.7.1, not 1.7.2" in line for line in reasons)


def test_profiles_and_settings_reach_the_builder(small: Bundle, store: PlanStore, builds: list[Any]) -> None:
    sizes = Sizes((1, 2), (True, False))
    make(small, ["seg"], store, sizes=sizes, settings=BuilderSettings(4))
    for onnx, profiles, options in builds:
        assert profiles == sizes.profiles(small.graph(onnx.stem))
        assert options["settings"] == BuilderSettings(4)


def test_progress_says_which_graph(small: Bundle, store: PlanStore, builds: list[Any]) -> None:
    seen: list[tuple[str, float]] = []
    make(small, ["seg"], store, progress=lambda phase, share: seen.append((phase, share)))
    for _, _, options in builds:
        options["progress"]("Timing", 0.5)
    assert seen == [(f"{onnx.stem}: Timing", 0.5) for onnx, _, _ in builds]
    make(small, ["depth"], store)
    assert builds[-1][2]["progress"] is None


def test_timings_are_handed_on(
    small: Bundle, store: PlanStore, builds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT measures kernels; what it measured for one graph serves the next. TensorRT-RTX measures nothing."""
    make(small, ["depth"], store)
    assert [options["timing_cache"] for _, _, options in builds] == [None] * 4
    builds.clear()
    monkeypatch.setattr(Flavor, "target", lambda self: "sm90")
    make(small, ["depth"], store, flavor=Flavor("tensorrt", None, "11.1"))
    assert [options["timing_cache"] for _, _, options in builds] == [b"", b"+", b"++", b"+++"]


def test_timings_are_kept_for_the_next_build_on_such_a_gpu(
    small: Bundle, store: PlanStore, builds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt = Flavor("tensorrt", None, "11.1")

    def given(target: str, flavor: Flavor = tensorrt) -> list[bytes]:
        builds.clear()
        monkeypatch.setattr(Flavor, "target", lambda self: target)
        levels = {"sm90": 1, "sm89": 2}
        make(small, [], store, flavor=flavor, settings=BuilderSettings(levels[target], timing_iterations=len(seen)))
        return [options["timing_cache"] for _, _, options in builds]

    seen: list[Any] = [1]
    assert given("sm90") == [b"", b"+"]
    seen.append(1)
    assert given("sm90") == [b"++", b"+++"]
    assert given("sm89") == [b"", b"+"]  # another GPU
    seen.append(1)
    assert given("sm90", Flavor("tensorrt", None, "11.2")) == [b"", b"+"]  # and another TensorRT
    [file] = store.root.glob("timing-tensorrt-11.1-sm90.cache")
    file.write_bytes(file.read_bytes()[:-1] + b"-")
    seen.append(1)
    assert given("sm90") == [b"", b"+"]  # what is damaged is measured again
    assert store.plans() and store.remove_leftovers() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimization_level": 6}, "optimization level 6 cannot be used: 0 to 5"),
        ({"aux_streams": -1}, "aux streams -1 cannot be used: 0 to 16"),
        ({"tiling_level": 4}, "tiling level 4 cannot be used: 0 to 3"),
        ({"timing_iterations": 0}, "timing iterations 0 cannot be used: 1 to 100"),
    ],
)
def test_settings_have_bounds(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuilderSettings(**settings)


def test_a_plan_without_further_settings_keeps_its_key(small: Bundle) -> None:
    """That of the time when there was no other setting than the level."""

    def key(settings: BuilderSettings) -> PlanKey:
        return PlanKey.of(small, "unet", FAKE_RTX, Sizes().profiles(small.graph("unet")), settings)

    assert key(BuilderSettings(4)).settings == {"optimization_level": 4}
    assert key(BuilderSettings(aux_streams=2)).settings == {"optimization_level": None, "aux_streams": 2}


# -------------------------------------------------------------------------------------------------------------- damage


def test_only_fp16_bundles(small: Bundle, store: PlanStore, builds: list[Any]) -> None:
    small.manifest.precision = "fp32"
    with pytest.raises(UserError, match=r"small is fp32, .*--precision fp16"):
        make(small, ["seg"], store)
    assert builds == []
    assert not store.root.exists()


@pytest.mark.parametrize("file", ["unet.onnx", "unet.onnx.data"])
def test_a_damaged_graph_is_refused_before_it_is_built(
    small: Bundle, store: PlanStore, builds: list[Any], file: str
) -> None:
    """Its plan would carry the good graph's digest. `Bundle.open` compares sizes only."""
    path = small.folder / file
    if not path.exists():
        path.write_bytes(b"weights")
        small.manifest.files[file] = {"size": 7, "sha256": "0" * 64}
    else:
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    with pytest.raises(BundleError) as refused:
        make(small, ["seg"], store)
    assert str(refused.value) == (
        f"{path.parent} is damaged: {path.name} changed since the export; export the bundle again"
    )
    assert "unet" not in {onnx.stem for onnx, _, _ in builds}
    assert list(store.root.glob("*unet-*/*")) == []
    assert "unet" not in {plan.key.graph for plan in store.plans()}


def test_a_graph_that_tensorrt_refuses(small: Bundle, store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise BackendError("cannot parse")

    monkeypatch.setattr(module, "build_plan", fail)
    with pytest.raises(BackendError, match="cannot parse"):
        make(small, ["seg"], store)
    assert store.plans() == []


# ---------------------------------------------------------------------------------------------------------- for real


def test_real_plans_of_a_small_bundle(small: Bundle, store: PlanStore, rtx: Flavor) -> None:
    sizes = Sizes((1, 2), (True, False))
    first = make(small, ["seg", "depth"], store, flavor=rtx, sizes=sizes)
    assert len(first.built) == len(ALL)
    assert len({plan.sha256 for plan in first.plans}) == len(ALL)
    assert all(plan.read()[1:4] == b"trt" for plan in first.plans)
    second = make(small, ["seg"], store, flavor=rtx, sizes=sizes)
    assert second.built == ()
    assert second.seconds < 1
    unet = next(plan for plan in store.find(small, "unet", rtx))
    assert {n: unet.profile_for({"x": (n, 16)}) for n in range(1, 6)} == {1: 2, 2: 0, 3: None, 4: 1, 5: None}
