"""Preset files, up to the plan of a request that they decide."""

import json

import numpy as np
from cnpp_trt import Control, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.runtime.planning import open_tokenizer, plan_request
from cnpp_trt.runtime.settings.preset import (
    Evidence,
    Levers,
    Preset,
    Span,
    TunedModel,
    by_condition,
    read_preset,
    resolve,
)
from cnpp_trt.schema import to_json

from .kind import Kind, Place, difference, put
from .mutations import documents


def preset(place: Place) -> Kind:
    bundle, file = Bundle.open(place.bundle), place.folder / "preset.json"
    tokenizer, span = open_tokenizer(bundle), Span(value=0.5, low=0.1, high=0.9)
    levers = Levers(num_inference_steps=6, scheduler="dpmpp_2m", timestep_spacing="ays", guidance_end=0.5)
    evidence = Evidence(
        budget=1.0,
        metric="mIoU",
        loss=span,
        exact=90.0,
        tuned=89.5,
        prompts=96,
        psnr=None,
        speedup=span,
        predicted_speedup=3.0,
        backend="onnxruntime-cpu",
        exact_levers=levers,
        command="cnpp-trt tune",
    )
    valid = to_json(
        Preset(version="0", model=TunedModel.of(bundle, "seg"), condition="seg", levers=levers, evidence=evidence)
    )
    defaults = SamplingDefaults.of(bundle.manifest)
    request = Request("a", controls=Control("seg", np.zeros((16, 16, 3), np.uint8)), seed=0)

    def attempt(content: bytes) -> None:
        found = by_condition([read_preset(put(file, content))], bundle)
        plan_request(bundle, tokenizer, resolve(request, found, defaults))

    return Kind(documents(json.loads(valid)), attempt, difference(valid.encode()))
