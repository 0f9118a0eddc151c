"""checkpoint → bundle."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundle import MANIFEST, Bundle, Manifest, bundle_folder, lock_bundle, model_name, write_bundle
from ..conditions import CONDITIONS
from ..doctor import installed
from ..errors import BundleError, CnppError, UserError
from ..files import sha256_of
from ..install import EXPORT_MODULES, cannot_import
from ..messages import printable, some
from .checkpoint import Checkpoint
from .recipe import COMPONENTS

if TYPE_CHECKING:
    from .graphs import Graphs

PRECISIONS = ("fp32", "fp16")

Report = Callable[[str], None]


def export_bundle(
    checkpoint: Checkpoint,
    conditions: Sequence[str],
    out: Path,
    *,
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    report: Report = lambda line: None,
) -> Bundle:
    """Exports a checkpoint's graphs into the bundle `out`, each compared with its PyTorch module.

    Where `out` is a bundle of the same checkpoint, size and precision already, only the graphs of conditions that it
    lacks are exported. Nothing it has is written again.

    Args:
        conditions: of `CONDITIONS`, at least one.
        size: (width, height) in pixels, multiples of 8, 64 to 2048; None takes the UNet's own sample size.
        report: is told in one line what was done and how long it took.
    Raises: UserError for an argument or checkpoint that cannot be used or a full disk, ExportError where a graph
        differs from its module. No bundle appears then.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: choose fp32 or fp16")
    if not conditions:
        raise UserError(f"no condition given: choose from {', '.join(CONDITIONS)}")
    for condition in (*conditions, *checkpoint.recipe.controlnets):
        checkpoint.check_controlnet(condition)
    manifest = _manifest(checkpoint, precision, *checkpoint.size(size))
    with lock_bundle(out):
        return _export_locked(checkpoint, conditions, out, manifest, report)


def export_model(
    checkpoint: Checkpoint,
    conditions: Sequence[str],
    precision: str,
    size: tuple[int, int] | None,
    out: Path | None,
    report: Report,
) -> Bundle:
    """`export_bundle` to where a user's bundles are (or `out`), at the model's own size unless another is given.

    Raises: as `export_bundle`; CnppError where what exporting needs is not installed.
    """
    pixels = checkpoint.size(size)
    folder = out or bundle_folder(checkpoint.name, precision, *pixels)
    try:
        return export_bundle(checkpoint, conditions, folder, precision=precision, size=pixels, report=report)
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("export", e, *EXPORT_MODULES)) from None


def _export_locked(
    checkpoint: Checkpoint, conditions: Sequence[str], out: Path, manifest: Manifest, report: Report
) -> Bundle:
    if (out / MANIFEST).exists():
        manifest = _existing(out, manifest)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no bundle: choose another --out")
    missing = []
    for condition in dict.fromkeys(conditions):
        if condition not in manifest.conditions:
            missing.append(condition)
        elif manifest.conditions[condition].get("controlnet") != checkpoint.controlnet_fingerprint(condition):
            raise UserError(f"the bundle {out} has another ControlNet for {condition}: choose another --out")
    if not missing:
        report(f"{out} has {', '.join(conditions)} already: nothing to export")
        return Bundle.open(out)

    # Not before there is something to export: PyTorch is slow to import.
    from .disk import space_needed, state_space
    from .extractors import open_extractor
    from .graphs import Geometry, base_graphs, condition_graphs

    geometry = Geometry.of(checkpoint, manifest)
    start = time.perf_counter()
    for condition in missing:  # what is damaged is found before anything is exported
        if extractor := checkpoint.places.extractor(condition):
            open_extractor(condition, extractor, manifest.width, manifest.height)
    base = () if manifest.graphs else COMPONENTS
    checkpoint.check_weights((*base, *(f"controlnet_{condition}" for condition in missing)))
    if not manifest.graphs:
        _put_in(checkpoint, manifest, report)
    state_space(out, space_needed(checkpoint, not manifest.graphs, missing, manifest.precision), report)
    with write_bundle(out, manifest) as staging:
        if not manifest.graphs:
            checkpoint.tokenizer().save_pretrained(staging / "tokenizer")
            _export(base_graphs(checkpoint, geometry), manifest, staging, report)
        _, examples = checkpoint.examples()
        for condition in missing:
            _export(condition_graphs(checkpoint, condition, geometry), manifest, staging, report)
            manifest.conditions[condition] = _condition(checkpoint, condition)
            if example := examples.get(condition):
                folder = staging / "examples"
                folder.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.example_image(example["image"]), folder / f"{condition}.png")
                manifest.conditions[condition] |= {**example, "image": f"examples/{condition}.png"}
    bundle = Bundle.open(out)
    report(f"bundle {out}: {', '.join(manifest.conditions)} in {time.perf_counter() - start:.1f} s")
    return bundle


def _export(graphs: "Graphs", manifest: Manifest, folder: Path, report: Report) -> None:
    from .onnx_graph import OPSET, export_graph, return_large_blocks

    return_large_blocks()
    for name, source in graphs:
        report(f"{name}: exporting and comparing with PyTorch")
        start = time.perf_counter()
        # Extractors score images: they stay exact whatever the precision of the model.
        exact = name.startswith("extractor_") or name.endswith("_fp32")
        precision = "fp32" if exact else manifest.precision
        spec = export_graph(source(), folder, precision, OPSET[manifest.precision])
        manifest.graphs[name] = spec
        report(
            f"{name}: {time.perf_counter() - start:.1f} s, largest difference "
            f"{spec.max_abs_difference:.1e} ({spec.measure} {spec.difference:.1e}, allowed {spec.tolerance:.0e})"
        )


def _manifest(checkpoint: Checkpoint, precision: str, width: int, height: int) -> Manifest:
    packages = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
    return Manifest(
        model=model_name(checkpoint.name),
        base=checkpoint.fingerprint(),
        precision=precision,
        width=width,
        height=height,
        latent_channels=checkpoint.setting("unet", "in_channels"),
        vae_scale_factor=checkpoint.vae_scale_factor,
        text_encoder_layers=checkpoint.setting("text_encoder", "num_hidden_layers"),
        scheduler_config=checkpoint.config("scheduler"),
        defaults=checkpoint.examples()[0],
        recipe=checkpoint.recipe.to_json(),
        sources=checkpoint.sources(),
        exported_with={"cnpp-trt": __version__, **installed(packages)},
    )


def _condition(checkpoint: Checkpoint, condition: str) -> dict[str, Any]:
    """What the manifest says of a condition."""
    entry = {
        "controlnet": checkpoint.controlnet_fingerprint(condition),
        "source": checkpoint.places.controlnet(condition).origin,
    }
    if (palette := checkpoint.places.palette(condition)) != "ade20k":
        entry["palette"] = palette
    if extractor := checkpoint.places.extractor(condition):
        entry["extractor"] = extractor.origin
    return entry


def _put_in(checkpoint: Checkpoint, manifest: Manifest, report: Report) -> None:
    """What LoRAs and textual inversions there are, before anything heavy is loaded.

    Raises: UserError where one does not fit the model.
    """
    for lora, fit in zip(checkpoint.places.loras, checkpoint.fit_loras(), strict=True):
        if fit.unmatched:
            report(
                f"warning: {len(fit.unmatched)} of the LoRA {printable(lora.source)}'s keys match no layer and are "
                f"left out ({some(fit.unmatched)}); {fit.fused} layers are fused"
            )
        report(f"the LoRA {printable(lora.source)} is fused into {fit.fused} layers with weight {lora.weight:g}")
        entry = {"source": lora.source, "sha256": sha256_of(lora.file), "weight": lora.weight}
        manifest.loras.append({**entry, "fused": fit.fused, "unmatched": list(fit.unmatched)})
    tokenizer = checkpoint.tokenizer()  # refuses a word that it has already
    manifest.vocabulary = checkpoint.setting("text_encoder", "vocab_size")
    if checkpoint.places.embeddings:
        manifest.vocabulary = max(manifest.vocabulary, len(tokenizer))
    highest = max(tokenizer.get_vocab().values())
    if highest >= manifest.vocabulary:
        raise UserError(
            f"the tokenizer of {checkpoint.name} has the id {highest}, but its text encoder knows "
            f"{manifest.vocabulary} tokens: they are of different models"
        )
    for embedding in checkpoint.embeddings():
        count = len(embedding.vectors)
        report(
            f"embedding: write {embedding.token} in a prompt, the word from {embedding.named_by} "
            f"({count} vector{'s' if count > 1 else ''})"
        )
        manifest.embeddings[embedding.token] = count


def _existing(out: Path, new: Manifest) -> Manifest:
    try:
        found = Bundle.open(out).manifest
    except BundleError as e:
        # Its advice is to export again, which is what the user does.
        instead = "delete it first, or choose another --out"
        raise BundleError(str(e).replace("export the bundle again", instead)) from None
    for key in ("base", "precision", "width", "height"):
        if getattr(found, key) != getattr(new, key):
            what = "base model's weights" if key == "base" else key
            raise UserError(f"the bundle {out} has another {what}: choose another --out, or delete it first")
    return found
