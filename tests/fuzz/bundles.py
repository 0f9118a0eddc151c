"""Manifests, the recipes in them, tokenizers, plan records and scheduler configs."""

import json
import shutil
from pathlib import Path

import numpy as np
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.errors import CnppError
from cnpp_trt.runtime.pipeline import Pipeline
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS, build_table
from cnpp_trt.runtime.settings.request import Control, Request
from cnpp_trt.runtime.text.tokenizer import Tokenizer
from hypothesis import strategies as st
from manifests import signed

from .kind import Kind, Place, difference, put
from .mutations import NUMBERS, STRINGS, damaged, documents, encode


def manifest(place: Place) -> Kind:
    folder = Path(shutil.copytree(place.bundle, place.folder / "bundle"))
    file = folder / "manifest.json"
    valid = file.read_bytes()

    def attempt(content: bytes) -> None:
        put(file, _sealed(content))
        bundle = Bundle.open(folder)
        pipeline = Pipeline.open(bundle.folder, "onnxruntime-cpu", threads=1)
        condition = next(iter(bundle.manifest.conditions), "seg")
        image = np.zeros((64, 64, 3), np.uint8)
        pipeline(Request("a house", controls=(Control(condition, image),), num_inference_steps=2, seed=1))

    return Kind(documents(json.loads(valid)), attempt, difference(encode(json.loads(valid))))


class OtherPicture(Exception):
    """A damaged bundle drew, and drew something else."""


def bit(place: Place) -> Kind:
    """One flipped bit anywhere in a bundle, and a picture drawn from it: the same one, or a refusal."""
    folder = Path(shutil.copytree(place.bundle, place.folder / "bundle"))
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    valid = {file: file.read_bytes() for file in files}
    control = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def draw() -> bytes:
        request = Request("a red house", controls=(Control("seg", control),), num_inference_steps=2, seed=1)
        return Pipeline.open(folder, "onnxruntime-cpu", threads=1)(request).images.tobytes()

    undamaged = draw()

    def attempt(example: tuple[Path, int]) -> None:
        file, position = example
        content = bytearray(valid[file])
        content[position // 8] ^= 1 << position % 8
        put(file, bytes(content))
        try:
            if draw() != undamaged:
                raise OtherPicture
        finally:
            put(file, valid[file])

    bits = st.one_of([st.tuples(st.just(file), st.integers(0, 8 * len(valid[file]) - 1)) for file in files])
    return Kind(bits, attempt, lambda e: f"bit {e[1]} of {e[0].relative_to(folder)}")


def _sealed(content: bytes) -> bytes:
    try:
        document = json.loads(content)
        return signed(document).encode() if isinstance(document, dict) else content
    except (ValueError, RecursionError):
        return content


def recipe(place: Place) -> Kind:
    """What `parity` and `consistency` find the checkpoint by."""
    from cnpp_trt.export.provenance import find_source_checkpoint

    folder = Path(shutil.copytree(place.bundle, place.folder / "bundle"))
    file = folder / "manifest.json"
    document = json.loads(file.read_bytes())
    find_source_checkpoint(Bundle.open(folder), str(place.checkpoint))
    texts = st.sampled_from([*STRINGS, "seg=x", "x:1e999", ":", "x:nan", "owner/name", str(place.checkpoint)])

    def attempt(example: tuple[bytes, str, str]) -> None:
        content, model, text = example
        try:
            changed = json.loads(content)
        except (ValueError, RecursionError):
            changed = text
        put(file, signed({**document, "recipe": changed}).encode())
        bundle = Bundle.open(folder)
        find_source_checkpoint(bundle, model or None, {"seg": text} if text else None)

    inputs = st.tuples(documents(document["recipe"]), st.sampled_from(["", str(place.checkpoint)]) | texts, texts)
    return Kind(inputs, attempt)


def tokenizer(place: Place) -> Kind:
    folder = Path(shutil.copytree(place.bundle / "tokenizer", place.folder / "tokenizer"))
    valid = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

    def attempt(example: tuple[str, bytes]) -> None:
        name, content = example
        put(folder / name, content)
        try:
            opened = Tokenizer(folder)
            opened.encode("a photo of a (red:1.4) house, 模型 🙂")
            opened.encode_long("house " * 200)
        finally:
            put(folder / name, valid[name])

    def inputs(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        whole = damaged(valid[name])
        contents = whole if not name.endswith(".json") else st.one_of(whole, documents(json.loads(valid[name])))
        return st.tuples(st.just(name), contents)

    return Kind(st.one_of([inputs(name) for name in valid]), attempt, lambda e: f"{e[0]} {difference(valid[e[0]])(e)}")


def plan(place: Place) -> Kind:
    """Records of the plan store, as `engines list`, `inspect` and `prune` read them."""
    from cnpp_trt.engines.describe import plan_details, plan_json, plans_table
    from cnpp_trt.engines.fusion import FusionReport
    from cnpp_trt.engines.plan import BuildResult, PlanKey, Row, system
    from cnpp_trt.engines.store import PlanStore, installed_versions

    store = PlanStore(place.folder / "plans")
    row: dict[str, Row] = {"x": {"min": [1, 16], "opt": [2, 16], "max": [4, 16]}}
    settings: dict[str, int | None] = {"optimization_level": None}
    key = PlanKey("unet", "ab" * 32, "tensorrt-rtx", "1.7.1", "portable", system(), (row,), settings)
    fusion = FusionReport(
        layers=3, attentions=1, attentions_fused=1, norms=2, norms_fused=1, casts=0, casts_left=0, unfused=("a",)
    )
    built = BuildResult(b"an engine", fusion, seconds=1.25, weights=3, activations=5, timing_cache=None, peak=7)
    made, _ = store.get_or_build(key, "tiny", lambda: built)
    file = made.folder / "plan.json"
    valid = file.read_bytes()

    def attempt(content: bytes) -> None:
        put(file, content)
        plans = store.plans()
        for found in plans:
            plan_details(found)
            json.dumps(plan_json(found), allow_nan=False)
            found.profile_for({"x": (2, 16)})
            found.integrity_error()
        plans_table(plans)
        store.find_unusable(installed_versions())
        if not plans:
            raise CnppError("the record is none")

    return Kind(documents(json.loads(valid)), attempt, difference(encode(json.loads(valid))))


_CONFIG = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False, "prediction_type": "epsilon",
    "timestep_spacing": "leading", "rescale_betas_zero_snr": False, "use_karras_sigmas": False, "solver_order": 2,
    "solver_type": "bh2", "algorithm_type": "dpmsolver++", "lower_order_final": True, "final_sigmas_type": "zero",
    "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "predict_x0": True,
    "disable_corrector": [], "variance_type": "fixed_small", "lambda_min_clipped": -5.1, "sigma_min": None,
    "sigma_max": None, "original_inference_steps": 50, "timestep_scaling": 10.0, "interpolation_type": "linear",
}  # fmt: skip


def scheduler(place: Place) -> Kind:
    names = st.sampled_from([*SCHEDULERS, *SCHEDULERS, "", "DPM++ 2M Karras", "x" * 1_000, "\x1b[31m"])
    steps = (
        st.sampled_from([1, 2, 4, 8, 20, 50]) | st.integers(-1, 1_001) | st.sampled_from([n for n in NUMBERS if n == n])
    )

    def attempt(example: tuple[str, int, int, bytes]) -> None:
        name, n, begin, content = example
        try:
            config = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(config, dict):
            build_table(name, config, n, begin)

    inputs = st.tuples(names, steps, st.sampled_from([0, 0, 0, 1, 3, -1, 10**30]), documents(_CONFIG))
    return Kind(inputs, attempt, difference(encode(_CONFIG)))
