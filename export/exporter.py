"""checkpoint → bundle."""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundles.bundle import MANIFEST, Bundle, GraphSpec, Manifest, bundle_folder, lock_bundle
from ..bundles.manifest import ConditionRecord, GraphOptions
from ..bundles.staging import Progress, write_bundle
from ..conditions import CONDITIONS
from ..errors import BundleError, CnppError, UserError
from ..files import sha256_of
from ..install import EXPORT_MODULES, cannot_import
from ..messages import printable, some
from ..schema import SchemaError, finite
from ..versions import __version__, installed
from .checkpoint import Checkpoint
from .recipe import COMPONENTS
from .sources import LocalTree, Source

if TYPE_CHECKING:
    from .onnx_graph import ExportSpec

PRECISIONS = ("fp32", "fp16")

logger = logging.getLogger(__name__)


def export_bundle(
    checkpoint: Checkpoint,
    conditions: Sequence[str],
    out: Path,
    *,
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    options: GraphOptions | None = None,
) -> Bundle:
    """Exports a checkpoint's graphs into the bundle `out`, each compared with its PyTorch module.

    Where `out` is a bundle of the same checkpoint, size and precision already, only the graphs of conditions that it
    lacks are exported. Nothing it has is written again. Where an export of the same was interrupted, the graphs that it
    finished are taken over.

    Args:
        conditions: of `CONDITIONS`, at least one.
        size: (width, height) in pixels, multiples of 8, 64 to 2048; None takes the UNet's own sample size.
        options: how the networks are divided into graphs; None takes the options of the bundle that is there, or the
            default ones.

    Raises:
        UserError: an argument or the checkpoint cannot be used, or the disk is full.
        ExportError: a graph differs from its module. No bundle appears then.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: choose fp32 or fp16")
    if not conditions:
        raise UserError(f"no condition given: choose from {', '.join(CONDITIONS)}")
    if options and options.split_unet and options.deep_cache:
        raise UserError("--deep-cache is of a UNet in one graph: leave --split-unet out")
    for condition in (*conditions, *checkpoint.recipe.controlnets):
        checkpoint.check_controlnet(condition)
    manifest = _manifest(checkpoint, precision, *checkpoint.size(size), options or GraphOptions())
    with lock_bundle(out):
        return _export_locked(checkpoint, conditions, out, manifest, any_options=options is None)


def export_model(
    checkpoint: Checkpoint,
    conditions: Sequence[str],
    precision: str,
    size: tuple[int, int] | None,
    out: Path | None,
    options: GraphOptions | None = None,
) -> Bundle:
    """`export_bundle` to where a user's bundles are (or `out`), at the model's own size unless another is given.

    Raises:
        UserError: an argument or the checkpoint cannot be used, or the disk is full.
        ExportError: a graph differs from its module.
        CnppError: what exporting needs is not installed.
    """
    pixels = checkpoint.size(size)
    folder = out or bundle_folder(checkpoint.name, precision, *pixels)
    try:
        return export_bundle(checkpoint, conditions, folder, precision=precision, size=pixels, options=options)
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("export", e, *EXPORT_MODULES)) from None


def _export_locked(
    checkpoint: Checkpoint, conditions: Sequence[str], out: Path, manifest: Manifest, *, any_options: bool
) -> Bundle:
    before = ""
    if (out / MANIFEST).exists():
        manifest = _existing(out, manifest, any_options)
        before = manifest.digest
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no bundle: choose another --out")
    missing = []
    for condition in dict.fromkeys(conditions):
        if condition not in manifest.conditions:
            missing.append(condition)
        elif manifest.conditions[condition].get("controlnet") != checkpoint.controlnet_fingerprint(condition):
            raise UserError(f"the bundle {out} has another ControlNet for {condition}: choose another --out")
    if not missing:
        logger.info(f"{out} has {', '.join(conditions)} already: nothing to export")
        return Bundle.open(out)

    # Not before there is something to export: PyTorch is slow to import.
    from .disk import check_disk_space, space_needed
    from .extractors import open_extractor
    from .graphs import GraphDims, base_graphs, condition_graphs

    dims = GraphDims.of(checkpoint, manifest)
    start = time.perf_counter()
    for condition in missing:  # what is damaged is found before anything is exported
        if extractor := checkpoint.resolved.extractor(condition):
            open_extractor(condition, extractor, manifest.width, manifest.height)
    base = () if manifest.graphs else COMPONENTS
    checkpoint.check_weights((*base, *(f"controlnet_{condition}" for condition in missing)))
    if not manifest.graphs:
        checkpoint.check_tokenizer()
        _record_adapters(checkpoint, manifest)
    records = {condition: _condition(checkpoint, condition) for condition in missing}
    example_images = _add_examples(checkpoint, records)
    _require_valid(manifest, records)
    check_disk_space(out, space_needed(checkpoint, not manifest.graphs, missing, manifest.precision))

    made_of = _made_of(checkpoint, manifest, before)
    graphs: _Graphs = []
    if not manifest.graphs:
        graphs += [(name, make, made_of({})) for name, make in base_graphs(checkpoint, dims)]
    for condition in missing:
        own = made_of({**records[condition], "extractor": _extractor_digest(checkpoint, condition)})
        graphs += [(name, make, own) for name, make in condition_graphs(checkpoint, condition, dims)]

    progress = Progress()
    whole = not manifest.graphs
    with write_bundle(out, manifest, progress) as staging:
        taken = progress.keep({name: made_of for name, _, made_of in graphs})
        if taken:
            logger.info(f"{len(taken)} of {len(graphs)} graphs are there from an interrupted export, which goes on")
        if whole:
            checkpoint.tokenizer().save_pretrained(staging / "tokenizer")
        for name, image in example_images.items():
            target = staging / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(image, target)
        _export(graphs, taken, manifest, staging, progress)
        manifest.conditions.update(records)
    bundle = Bundle.open(out)
    logger.info(f"bundle {out}: {', '.join(manifest.conditions)} in {time.perf_counter() - start:.1f} s")
    return bundle


# Of each graph its name, what makes it, and SHA-256 over all that it depends on.
_Graphs = list[tuple[str, "Callable[[], ExportSpec]", str]]


def _export(
    graphs: _Graphs,
    taken: Mapping[str, GraphSpec],
    manifest: Manifest,
    folder: Path,
    progress: Progress,
) -> None:
    """Exports the graphs into `folder` and compares each with PyTorch.

    Args:
        taken: graphs that an interrupted export left there.
    """
    from .onnx_graph import OPSET, export_graph

    try:
        for name, source, made_of in graphs:
            if name in taken:
                manifest.graphs[name] = taken[name]
                continue
            logger.info(f"{name}: exporting and comparing with PyTorch")
            start = time.perf_counter()
            # Extractors score images: they stay exact whatever the precision of the model.
            exact = name.startswith("extractor_") or name.endswith("_fp32")
            precision = "fp32" if exact else manifest.precision
            spec = export_graph(source(), folder, precision, OPSET[manifest.precision])
            progress.add(name, made_of, spec)
            manifest.graphs[name] = spec
            logger.info(
                f"{name}: {time.perf_counter() - start:.1f} s, largest difference "
                f"{spec.max_abs_difference:.1e} ({spec.measure} {spec.difference:.1e}, allowed {spec.tolerance:.0e})"
            )
    except (KeyboardInterrupt, SystemExit):
        if progress.graphs:
            logger.info(
                f"interrupted: {progress.graphs} of {len(graphs)} graphs are kept; the same command goes on from there"
            )
        raise


def _manifest(checkpoint: Checkpoint, precision: str, width: int, height: int, options: GraphOptions) -> Manifest:
    packages = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
    resolved = checkpoint.resolved
    sources = {component: _public(resolved.weights_source(component)) for component in COMPONENTS}
    return Manifest(
        model=checkpoint.name,
        base=checkpoint.fingerprint(),
        precision=precision,
        width=width,
        height=height,
        latent_channels=checkpoint.setting("unet", "in_channels"),
        vae_scale_factor=checkpoint.vae_scale_factor,
        text_encoder_layers=checkpoint.setting("text_encoder", "num_hidden_layers"),
        scheduler_config=_scheduler_config(checkpoint),
        defaults=checkpoint.examples()[0],  # type: ignore[arg-type]  # checked with all the rest
        recipe=checkpoint.recipe.recorded(),
        options=options,
        identity=checkpoint.recipe.identity,
        sources={**sources, "tokenizer": _public(resolved.component("tokenizer"))},
        exported_with={"cnpp-trt": __version__, **installed(packages)},
    )


def _scheduler_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's, without the places of its machine.

    Raises:
        UserError: a number in it is not finite, but for the one that stands for "no limit".
    """
    config = {key: value for key, value in checkpoint.config("scheduler").items() if key != "_name_or_path"}
    for key, value in config.items():
        if not finite(value) and (key, value) != ("lambda_min_clipped", -math.inf):
            place = checkpoint.resolved.component("scheduler").uri
            raise UserError(f"{place}/scheduler_config.json has {key} {value!r}, which is no finite number: correct it")
    return config


def _public(source: Source) -> str:
    """Where a source is, for others: of a local one, the last part of its place."""
    if not isinstance(source.tree, LocalTree):
        return source.uri
    if source.file:
        return source.file
    return "/".join(part for part in (source.tree.folder.resolve().name, source.folder) if part)


def _condition(checkpoint: Checkpoint, condition: str) -> ConditionRecord:
    """What the manifest says of a condition."""
    entry: ConditionRecord = {
        "controlnet": checkpoint.controlnet_fingerprint(condition),
        "source": _public(checkpoint.resolved.controlnet(condition)),
    }
    if (palette := checkpoint.resolved.palette(condition)) != "ade20k":
        entry["palette"] = palette
    if extractor := checkpoint.resolved.extractor(condition):
        entry["extractor"] = _public(extractor)
    return entry


def _add_examples(checkpoint: Checkpoint, records: Mapping[str, ConditionRecord]) -> dict[str, Path]:
    """Adds the model's examples to the records of their conditions.

    Returns:
        The image of each condition that has one, by its name in the bundle.
    """
    images = {}
    for condition, example in checkpoint.examples()[1].items():
        if condition in records:
            name = f"examples/{condition}.png"
            images[name] = checkpoint.example_image(example["image"])
            records[condition]["image"] = name
            for key in ("prompt", "seed", "typical_score"):
                if key in example:
                    records[condition][key] = example[key]
    return images


def _require_valid(manifest: Manifest, records: Mapping[str, ConditionRecord]) -> None:
    """Checks what the manifest will hold, before anything is exported.

    Raises:
        UserError: the manifest would hold what no manifest can.
    """
    files = dict(manifest.files)
    for record in records.values():
        if "image" in record:
            files[record["image"]] = {"size": 0, "sha256": "0" * 64}
    planned = replace(manifest, conditions={**manifest.conditions, **records}, files=files)
    try:
        planned.require_valid()
    except SchemaError as e:
        raise UserError(f"this model cannot be exported: what its manifest would say is not allowed: {e}") from None


def _made_of(checkpoint: Checkpoint, manifest: Manifest, before: str) -> Callable[[Mapping[str, Any]], str]:
    """What gives SHA-256 over all that a graph depends on, from what it has of its own.

    Args:
        before: digest of the bundle that is added to.
    """
    shared = {
        "before": before,
        "base": manifest.base,
        "recipe": checkpoint.recipe.digest,
        "precision": manifest.precision,
        "size": [manifest.width, manifest.height],
        "options": asdict(manifest.options),
        "versions": {"cnpp-trt": __version__, **manifest.exported_with},
        "configs": {component: checkpoint.config(component) for component in COMPONENTS},
    }

    def digest(own: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps({**shared, "own": own}, sort_keys=True).encode()).hexdigest()

    return digest


def _extractor_digest(checkpoint: Checkpoint, condition: str) -> list[str]:
    """Digests of the files of the condition's extractor."""
    extractor = checkpoint.resolved.extractor(condition)
    if extractor is None:
        return []
    try:
        return [extractor.uri, *map(sha256_of, extractor.weights())]
    except UserError:  # one of the miniature's fixed filters
        return [extractor.uri]


def _record_adapters(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """What LoRAs and textual inversions there are, before anything heavy is loaded.

    Raises:
        UserError: one does not fit the model.
    """
    recipe = checkpoint.recipe
    public = dict(zip(recipe.loras, recipe.recorded().get("loras", ()), strict=True))
    for lora, match in zip(checkpoint.resolved.loras, checkpoint.match_loras(), strict=True):
        if match.unmatched:
            logger.warning(
                f"{len(match.unmatched)} of the LoRA {printable(lora.source)}'s keys match no layer and are "
                f"left out ({some(match.unmatched)}); {match.fused} layers are fused"
            )
        logger.info(f"the LoRA {printable(lora.source)} is fused into {match.fused} layers with weight {lora.weight:g}")
        manifest.loras.append(
            {
                "source": public.get(lora.source, lora.source),
                "sha256": sha256_of(lora.file),
                "weight": lora.weight,
                "fused": match.fused,
                "unmatched": list(match.unmatched),
            }
        )
    tokenizer = checkpoint.tokenizer()  # refuses a word that it has already
    manifest.vocabulary = checkpoint.setting("text_encoder", "vocab_size")
    if checkpoint.resolved.embeddings:
        manifest.vocabulary = max(manifest.vocabulary, len(tokenizer))
    for embedding in checkpoint.embeddings():
        count = len(embedding.vectors)
        logger.info(
            f"embedding: write {embedding.token} in a prompt, the word from {embedding.named_by} "
            f"({count} vector{'s' if count > 1 else ''})"
        )
        manifest.embeddings[embedding.token] = count


def _existing(out: Path, new: Manifest, any_options: bool) -> Manifest:
    try:
        manifest = Bundle.open(out).manifest
    except BundleError as e:
        # Its advice is to export again, which is what the user does.
        instead = "delete it first, or choose another --out"
        raise BundleError(str(e).replace("export the bundle again", instead)) from None
    for key in ("base", "precision", "width", "height"):
        if getattr(manifest, key) != getattr(new, key):
            what = "base model's weights" if key == "base" else key
            raise UserError(f"the bundle {out} has another {what}: choose another --out, or delete it first")
    if manifest.options != new.options and not any_options:
        raise UserError(f"the bundle {out} has its graphs divided in another way: choose another --out")
    return manifest
