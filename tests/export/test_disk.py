"""What an export writes is known and said before it begins; what does not fit is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.disk import space_needed
from cnpp_trt.export.exporter import export_bundle

pytestmark = pytest.mark.slow


def weights(bundle: Bundle) -> int:
    return sum(int(entry["size"]) for name, entry in bundle.manifest.files.items() if name.endswith(".data"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights outweigh its nodes."""
    from cnpp_trt.developer.random_models.checkpoint import make_checkpoint
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    folder = make_checkpoint(tmp_path_factory.mktemp("wide") / "wide", tiny=True)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    wider = {**unet.config, "block_out_channels": (128, 256), "attention_head_dim": 8}
    made: Any = UNet2DConditionModel.from_config(wider)
    made.save_pretrained(folder / "unet")
    hint: dict[str, Any] = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
    ControlNetModel.from_unet(made, **hint).save_pretrained(folder / "controlnet" / "seg")
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    smaller: Any = AutoencoderKL.from_config({**vae.config, "block_out_channels": (32, 32, 64, 64)})
    smaller.save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_said_is_what_is_written(wide, tmp_path, precision, caplog):
    checkpoint = Checkpoint(str(wide))
    caplog.set_level("INFO", "cnpp_trt")
    bundle = export_bundle(checkpoint, ["seg"], tmp_path / "bundle", precision=precision)
    # Beside the weights, some MB are set aside for each graph's nodes, which a graph of this size does not need.
    nodes = space_needed(checkpoint, True, ["seg"], precision) - space_needed_by_weights(checkpoint, precision)
    assert space_needed(checkpoint, True, ["seg"], precision) - nodes == pytest.approx(weights(bundle), rel=0.03)
    assert any(line.startswith("writes about ") and "are free" in line for line in caplog.messages[:1]), caplog.messages
    # A condition more is its own graphs only.
    assert space_needed(checkpoint, False, ["seg"], precision) < space_needed(checkpoint, True, ["seg"], precision) / 2


def space_needed_by_weights(checkpoint: Checkpoint, precision: str) -> int:
    """Independently: what the modules hold once they are loaded."""
    import torch

    def held(module: Any) -> int:
        return sum(p.nbytes for p in module.parameters())

    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    vae = checkpoint.vae(dtype)
    twins = 2 * held(vae) if precision == "fp16" else 0
    parts = (checkpoint.unet(dtype), checkpoint.text_encoder(dtype), vae, checkpoint.controlnet("seg", dtype))
    return sum(map(held, parts)) + twins


def test_what_does_not_fit_is_refused_before_it_begins(tiny_checkpoint, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    caplog.set_level("INFO", "cnpp_trt")
    with pytest.raises(
        UserError, match=r"MB do not fit on the disk of .*, 1 MB are free: free some, or choose another --out"
    ):
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], tmp_path / "out" / "bundle")
    assert caplog.messages == []
    assert [p.name for p in (tmp_path / "out").iterdir() if not p.name.endswith(".lock")] == []


def test_weights_are_stored_once(tiny):
    """No tensor of size is in two graphs of a bundle, but for those of a twin in another precision."""
    import hashlib

    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    bundle = tiny.pipeline.bundle
    seen: dict[str, str] = {}
    for name, spec in bundle.manifest.graphs.items():
        model = onnx.load(bundle.folder / spec.file, load_external_data=False)
        load_external_data_for_model(model, str(bundle.folder))
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < 4096:
                continue
            digest = hashlib.sha256(tensor.raw_data).hexdigest()
            assert digest not in seen, f"{tensor.name} of {name} is in {seen[digest]} too"
            seen[digest] = f"{name}, {tensor.name}"
    assert len(seen) > 50
