"""The published extractors against the libraries that they come from: transformers, controlnet_aux and Pillow."""

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle, write_bundle
from cnpp_trt.developer.full_size import Reference, reference
from cnpp_trt.developer.random_models.extractors import make_extractor, photo
from cnpp_trt.engines.builder import build_plan
from cnpp_trt.engines.flavor import installed_flavors, load_flavor
from cnpp_trt.engines.plan import BuilderSettings, Range
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.extractors import open_extractor
from cnpp_trt.export.extractors.pillow_resize import PillowResize
from cnpp_trt.export.graphs import GraphDims, condition_graphs, extractor_graph
from cnpp_trt.export.onnx_graph import OPSET, export_graph, run_onnx
from cnpp_trt.export.sources import Finder
from cnpp_trt.runtime.control.palette import labels_from_colors
from PIL import Image
from torch import nn

pytestmark = pytest.mark.slow

CONDITIONS = ("seg", "depth", "hed", "lineart")
# (width, height): the tiny UPerNet's own size is 128, the tiny DPT's 96.
SIZES = ((128, 128), (192, 128), (64, 192))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny networks for seg and depth, the others at their own size; read only."""
    parent = tmp_path_factory.mktemp("extractors")
    return {condition: make_extractor(condition, parent / condition, tiny=True) for condition in CONDITIONS}


@pytest.fixture(scope="module")
def references(published: dict[str, Path]) -> dict[str, Reference]:
    """photo [H,W,3] → map [H,W], sides multiples of 64, as the official demo's parts make it."""
    if importlib.util.find_spec("controlnet_aux") is None:
        pytest.skip("controlnet-aux is not installed: pip install --no-deps controlnet-aux")
    return {condition: reference(condition, path) for condition, path in published.items()}


def opened(condition: str, path: Path, width: int = 128, height: int = 128) -> nn.Module:
    return open_extractor(condition, Finder().find(path), width, height)


def assert_same(condition: str, found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.uint8 and found.shape == expected.shape
    if condition == "seg":
        assert (found == expected).mean() >= 0.999
        assert len(np.unique(expected)) > 10, "a map of one label proves nothing"
    else:
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found == expected).mean() > 0.99
        assert len(np.unique(expected)) > 100 and expected.max() - expected.min() > 200


# --------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize(("old", "new"), [((96, 128), (128, 128)), ((128, 96), (72, 31)), ((50, 200), (384, 96))])
def test_resizing_is_pillows_to_the_bit(old: tuple[int, int], new: tuple[int, int], resample: Image.Resampling) -> None:
    images = np.stack([photo(*old, seed=seed) for seed in (1, 2)])
    # Black and white beside each other: Lanczos and bicubic overshoot there.
    images[:, 8:30, 10:40] = np.random.default_rng(0).integers(0, 2, (22, 30, 1)) * 255
    module = PillowResize(old, new, resample)
    found = module(torch.from_numpy(images).float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    expected = np.stack([np.array(Image.fromarray(image).resize((new[1], new[0]), resample)) for image in images])
    np.testing.assert_array_equal(found, expected)


def test_what_a_graph_cannot_preprocess_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(published["depth"], tmp_path, "preprocessor_config.json", do_pad=True, size_divisor=64)
    with pytest.raises(UserError, match="more than to resize, rescale and normalize"):
        opened("depth", folder)


def test_code_that_comes_with_an_extractor_is_not_run(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    folder = copy(published["depth"], tmp_path, "preprocessor_config.json", **changes)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # to the question that transformers asks
    with pytest.raises(UserError, match="names code of its own, which is never run"):
        opened("depth", folder)
    assert not (tmp_path / "ran").exists()


def test_the_preprocessors_settings_count(published: dict[str, Path], tmp_path: Path) -> None:
    changes = {"size": 128, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 127.5, "image_mean": [1, 0.9, 0.8]}
    folder = copy(published["depth"], tmp_path, "preprocessor_config.json", **changes)
    image = photo(128, 192)
    found = opened("depth", folder, 192, 128)(torch.from_numpy(image)[None])[0].numpy()
    assert_same("depth", found, reference("depth", folder)(image))
    assert np.abs(found.astype(int) - reference("depth", published["depth"])(image)).mean() > 1


# --------------------------------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_maps_are_the_librarys(
    condition: str, width: int, height: int, published: dict[str, Path], references: dict[str, Reference]
) -> None:
    images = np.stack([photo(height, width, seed=seed) for seed in (1, 2)])
    images[1] //= 2  # every image of a batch has its own range
    found = opened(condition, published[condition], width, height)(torch.from_numpy(images)).numpy()
    for i, image in enumerate(images):
        assert_same(condition, found[i], references[condition](image))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_graphs_compute_the_same_and_tensorrt_takes_them(
    condition: str, published: dict[str, Path], references: dict[str, Reference], tmp_path: Path
) -> None:
    width, height = 192, 128
    source = extractor_graph(condition, Finder().find(published[condition]), width, height)
    spec = export_graph(source, tmp_path, "fp32", 20)
    assert [t.dtype for t in (*spec.inputs, *spec.outputs)] == ["uint8", "uint8"]
    images = np.stack([photo(height, width, seed=seed) for seed in (5, 6, 7)])
    (found,) = run_onnx(tmp_path / spec.file, {"image": images})
    for i, image in enumerate(images):
        assert_same(condition, found[i], references[condition](image))
    if "tensorrt-rtx" in installed_flavors():
        shape = (1, height, width, 3)
        profile = {"image": Range(shape, shape, shape)}
        assert build_plan(load_flavor("tensorrt-rtx"), tmp_path / spec.file, [profile], BuilderSettings()).weights > 0


def test_depth_of_nothing_is_black(published: dict[str, Path]) -> None:
    module: Any = opened("depth", published["depth"])
    module.network.head.head[4].weight.zero_()
    module.network.head.head[4].bias.fill_(-1)
    assert module(torch.zeros(1, 128, 128, 3, dtype=torch.uint8)).max() == 0


# ---------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def bundle(published: dict[str, Path], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with the published extractors' graphs."""
    folder = Path(shutil.copytree(tiny.bundle, tmp_path_factory.mktemp("bundles") / "published"))
    extractors = {condition: str(published[condition]) for condition in ("seg", "depth")}
    checkpoint = Checkpoint(str(tiny.checkpoint), extractors=extractors)
    manifest = Bundle.open(folder).manifest
    with write_bundle(folder, manifest) as staging:
        for condition in extractors:
            name, make = next(condition_graphs(checkpoint, condition, GraphDims.of(checkpoint, manifest)))
            manifest.graphs[name] = export_graph(make(), staging, "fp32", OPSET["fp32"])
    return folder


def demo_resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """The official demo's `resize_image` (cv_utils.py), its arithmetic."""
    k = resolution / max(image.shape[:2])
    height, width = (int(np.round(side * k / 64.0)) * 64 for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LANCZOS4 if k > 1 else cv2.INTER_AREA)


@pytest.mark.parametrize("side", [301, 64, 50])
def test_a_bundle_extracts_what_the_demo_does(side: int, bundle: Path, references: dict[str, Reference]) -> None:
    pipeline = Pipeline.open(bundle, backend="onnxruntime-cpu")
    image = photo(side, side, seed=9)
    prepared = demo_resize(image, pipeline.bundle.manifest.width)
    labels, inexact = labels_from_colors(pipeline.extract("seg", image))
    assert inexact == 0
    # Road (6) and skyscraper (48) have one color.
    expected = references["seg"](prepared)
    assert_same("seg", labels, np.where(expected == 48, 6, expected).astype(np.uint8))
    depth = pipeline.extract("depth", image)
    assert (depth == depth[:, :, :1]).all()
    assert_same("depth", depth[:, :, 0], references["depth"](prepared))


def test_the_command_extracts(bundle: Path, command: Any, tmp_path: Path) -> None:
    image = photo(64, 64, seed=3)
    Image.fromarray(image).save(tmp_path / "photo.png")
    asked = ("--bundle", bundle, "--cond", "depth", "--image", tmp_path / "photo.png", "--prompt", "a", "--seed", 3)
    outcome = command("run", *asked, "--extract", "--steps", 2, "--out", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    pipeline = Pipeline.open(bundle, backend="onnxruntime-cpu")
    control = Control("depth", pipeline.extract("depth", image))
    (drawn,) = pipeline(Request("a", controls=[control], num_inference_steps=2, seed=3)).images
    (file,) = (tmp_path / "run").rglob("image-0.png")
    np.testing.assert_array_equal(np.array(Image.open(file)), drawn)


# ------------------------------------------------------------------------------------------------- what files may be


def test_layers_that_are_never_run_may_be_there_or_not(published: dict[str, Path], tmp_path: Path) -> None:
    image = torch.from_numpy(photo(128, 128))[None]
    folder = Path(shutil.copytree(published["depth"], tmp_path / "depth"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    unused = "neck.fusion_stage.layers.{}.residual_layer1.convolution1.weight"
    assert unused.format(0) not in state, "as in the published file"
    state |= {unused.format(0): state[unused.format(1)], "dpt.pooler.dense.bias": torch.zeros(32)}
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(opened("depth", folder)(image), opened("depth", published["depth"])(image))

    folder = Path(shutil.copytree(published["seg"], tmp_path / "seg"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    without = {key: t for key, t in state.items() if not key.startswith("auxiliary_head.")}
    assert len(without) < len(state)
    torch.save(without, folder / "pytorch_model.bin")
    assert torch.equal(opened("seg", folder)(image), opened("seg", published["seg"])(image))


def test_an_annotator_may_be_named_by_its_folder(published: dict[str, Path]) -> None:
    image = torch.from_numpy(photo(64, 64))[None]
    by_file, by_folder = (opened("lineart", path) for path in (published["lineart"], published["lineart"].parent))
    coarse = opened("lineart", published["lineart"].with_name("sk_model2.pth"))
    assert torch.equal(by_file(image), by_folder(image)) and not torch.equal(by_file(image), coarse(image))


def copy(folder: Path, tmp_path: Path, file: str, **changes: Any) -> Path:
    """The folder with settings changed in one of its JSON files; None takes a setting out."""
    new = Path(shutil.copytree(folder, tmp_path / "changed"))
    content = {**json.loads((new / file).read_text()), **changes}
    (new / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return new


@pytest.mark.parametrize(
    ("file", "changes", "line"),
    [
        ("config.json", {"architectures": ["GLPNForDepthEstimation"]}, "is a GLPNForDepthEstimation, not a DPTFor"),
        ("config.json", {"architectures": None, "model_type": None}, "of unknown kind, not a DPTForDepthEstimation"),
        ("config.json", {"num_hidden_layers": "four"}, "config.json of the depth extractor .* cannot be used"),
        ("config.json", {"num_hidden_layers": 5}, "lacks 16 of its "),
        ("config.json", {"fusion_hidden_size": 24}, "of shape .*, its config.json says"),
        (
            "preprocessor_config.json",
            {"image_mean": "gray"},
            "preprocessor_config.json of the depth extractor .* cannot",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    file: str, changes: dict[str, Any], line: str, published: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line) as error:
        opened("depth", copy(published["depth"], tmp_path, file, **changes))
    assert "\n" not in str(error.value)


def test_a_segmentation_of_other_labels_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(published["seg"], tmp_path, "config.json", id2label={str(i): str(i) for i in range(19)})
    with pytest.raises(UserError, match="has 19 labels, not the 150 of ADE20K"):
        opened("seg", folder)


def test_one_published_extractor_is_not_another(published: dict[str, Path], tmp_path: Path) -> None:
    for condition, path, line in (
        ("depth", published["seg"], "is a UperNetForSemanticSegmentation, not a DPTForDepthEstimation"),
        ("seg", published["hed"], "is a file: give the folder"),
        ("hed", published["lineart"], "lacks 32 of its 32? ?weights|lacks .* of its"),
        ("hed", published["depth"], "has no ControlNetHED.pth"),
        ("canny", published["hed"], "no extractor network for canny"),
    ):
        with pytest.raises(UserError, match=line):
            opened(condition, path)
    cut = tmp_path / "ControlNetHED.pth"
    cut.write_bytes(published["hed"].read_bytes()[:100_000])
    with pytest.raises(UserError, match="cut off or damaged"):
        opened("hed", cut)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        opened("depth", tmp_path)
