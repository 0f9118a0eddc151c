"""FID and CLIP score with networks small enough to compute both by hand; what is missing is said in one line."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cnpp_trt.benchmarks.consistency.dataset import Folder
from cnpp_trt.benchmarks.consistency.generating import generate
from cnpp_trt.benchmarks.consistency.quality import ClipScore, Fid
from cnpp_trt.benchmarks.consistency.scores import measure_quality
from cnpp_trt.benchmarks.consistency.shards import Shard
from cnpp_trt.benchmarks.consistency.study import Study, sampling_config
from cnpp_trt.benchmarks.systems import subject_system
from cnpp_trt.errors import CnppError, UserError
from hints import hint
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from transformers import CLIPConfig, CLIPModel

pytestmark = pytest.mark.slow

SIZE = (24, 16)


class Means(nn.Module):
    """Six numbers of an image: the means of its channels' halves."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.double().unflatten(-1, (2, -1)).mean((2, 4)).flatten(1) / 16


def features(images: list[np.ndarray]) -> np.ndarray:
    return Means()(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).numpy()


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Heusel et al., equation 6."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return float(apart + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


def pictures(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    tones = rng.integers(20, 200, (count, 1, 2, 3)).repeat(SIZE[0] // 2, 2)
    return list((tones + rng.integers(0, 50, (count, SIZE[1], SIZE[0], 3))).astype(np.uint8))


@pytest.fixture
def real(tmp_path: Path) -> Callable[..., Path]:
    def save(images: list[np.ndarray]) -> Path:
        (tmp_path / "real" / "deeper").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "real" / ("deeper" if i % 2 else "") / f"{i}.png")
        (tmp_path / "real" / "notes.txt").write_text("no image")
        return tmp_path / "real"

    return save


def test_fid_is_the_frechet_distance(real):
    originals = pictures(40, 0)
    fid = Fid(real(originals), SIZE, Means())
    groups = [pictures(30, 1), pictures(30, 2)]
    expected = [frechet(features(originals), features(group)) for group in groups]
    assert expected[0] != pytest.approx(expected[1], rel=0.01)
    for _ in range(2):  # one call leaves nothing to the next
        assert fid(iter(groups)) == pytest.approx(np.mean(expected), rel=1e-6)
    assert fid([originals]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="FID needs two prompts or more"):
        fid([originals[:1]])


def test_real_images_are_brought_to_the_size_of_the_generated(real):
    originals = pictures(20, 0)
    large = [np.asarray(Image.fromarray(i).resize((48, 32), Image.Resampling.NEAREST)) for i in originals]
    there_and_back = [np.asarray(Image.fromarray(i).resize(SIZE, Image.Resampling.LANCZOS)) for i in large]
    group = pictures(20, 1)
    expected = frechet(features(there_and_back), features(group))
    assert Fid(real(large), SIZE, Means())([group]) == pytest.approx(expected, rel=1e-6)


def test_too_few_real_images(real, tmp_path):
    for folder, count in ((tmp_path / "nowhere", 0), (real(pictures(1, 0)), 1)):
        with pytest.raises(UserError, match=f"holds {count} images: give a folder of the real ones"):
            Fid(folder, SIZE, Means())


class Processor:
    """As CLIPProcessor is called: pixels scaled to [0, 1] at the network's size, and one token for each character."""

    def __call__(self, text: Any = None, images: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        if images is not None:
            pixels = torch.stack([image.float() / 255 for image in images])
            return {"pixel_values": nn.functional.interpolate(pixels, (32, 32))}
        longest = max(map(len, text))
        ids = torch.tensor([[*map(ord, line), *[0] * (longest - len(line))] for line in text])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 128, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.visual_projection.weight.data.neg_()  # or every cosine is negative, for which the score is 0
    return model


def test_clip_score_is_the_cosine(clip):
    prompts = ["a house", "two trees by a lake"]
    images = [pictures(3, seed) for seed in range(2)]
    cosines = []
    with torch.inference_mode():
        for prompt, of_prompt in zip(prompts, images, strict=True):
            pixels = Processor()(images=[torch.from_numpy(i).permute(2, 0, 1) for i in of_prompt])
            tokens = Processor()(text=[prompt])
            out = clip(**pixels, **tokens)  # transformers' own whole model, which normalizes its embeddings
            cosines += (out.image_embeds @ out.text_embeds.T).flatten().tolist()
    score = ClipScore(lambda: (clip, Processor()))
    for _ in range(2):
        found = score(zip(images, prompts, strict=True))
        assert found == pytest.approx(100 * np.mean(cosines), abs=1e-4)
    assert np.mean(cosines) > 0.1


def test_quality_of_a_study(canny, photos, tmp_path, real, clip, logged):
    _, pipeline = canny
    data = Folder(photos(4), pipeline, ["canny"])
    sampling = sampling_config(pipeline.bundle.manifest, 2, steps=1)
    study = Study(pipeline, [subject_system(pipeline)], data, ["canny"], sampling, tmp_path / "out", True)
    size = pipeline.bundle.manifest.width, pipeline.bundle.manifest.height
    originals = [np.asarray(Image.fromarray(i).resize(size)) for i in pictures(8, 0)]
    fid, score = Fid(real(originals), size, Means()), ClipScore(lambda: (clip, Processor()))

    generate(study, Shard(1, 2))
    logged()
    assert measure_quality(study, fid, score) == {}
    assert logged() == ["deployed, canny: FID and CLIP score wait for the missing prompts"]
    generate(study, Shard(2, 2))
    found = measure_quality(study, fid, score)
    drawn = [pipeline(study.request("canny", i)).images for i in range(4)]
    groups = [[images[k] for images in drawn] for k in range(2)]
    assert found == {
        "deployed": {
            "FID, canny": pytest.approx(np.mean([frechet(features(originals), features(g)) for g in groups]), rel=1e-3),
            "CLIP score, canny": score((images, data.prompt(i)) for i, images in enumerate(drawn)),
        }
    }
    assert measure_quality(study, None, None) == {}
    unkept = replace(study, keep_pictures=False)
    assert list(measure_quality(unkept, None, score)["deployed"]) == ["CLIP score, canny"]


def test_what_is_missing_is_one_line(real, monkeypatch, tmp_path):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(CnppError, match=f"FID needs torch_fidelity, which is not installed: {hint('quality')}"):
        Fid(real(pictures(2, 0)), SIZE)
    with pytest.raises(
        CnppError, match=r"CLIP score needs the weights of .*nowhere, which transformers downloads"
    ) as e:
        ClipScore(str(tmp_path / "nowhere"))
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(CnppError, match=f"CLIP score needs torchmetrics.*{hint('quality')}") as e:
        ClipScore("openai/clip-vit-base-patch16")
    assert "\n" not in str(e.value)
