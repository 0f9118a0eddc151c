"""Measures what scores the miniature's pictures get, so that a run can say whether one of its own is good.

    python -m cnpp_trt.developer.miniature.typical_scores BUNDLE

generates one image of each of 64 fresh scenes for every condition, at the model's defaults and through the runtime,
scores it as `cnpp-trt run` does, and writes `typical_scores.json` here and the medians into `examples.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ...conditions import CONDITIONS
from ...runtime.control.consistency import score
from ...runtime.pipeline import Pipeline
from ...runtime.settings.request import Control, Request
from .data import TEST, Conditions, make_scenes
from .diffusion import write_json
from .evaluate import GUIDANCE, STEPS

ROOM = Path(__file__).parent
EXAMPLES = ROOM / "model" / "examples" / "examples.json"
SCENES = 64


def measure(pipeline: Pipeline) -> dict[str, list[float]]:
    """The score of each image, by condition; the image of scene i has seed i and its own caption."""
    scenes = make_scenes(range(TEST.start, TEST.start + SCENES))
    conditions = Conditions()
    measured: dict[str, list[float]] = {}
    for condition in CONDITIONS:
        controls = (conditions(condition, scenes, slice(None)) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        measured[condition] = []
        for i, (control, prompt) in enumerate(zip(controls, scenes.captions, strict=True)):
            given = np.ascontiguousarray(control)
            request = Request(
                prompt,
                controls=(Control(condition, given),),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                seed=i,
            )
            image = pipeline(request).images[0]
            measured[condition].append(score(condition, given, pipeline.extract(condition, image)).value)
        print(condition, typical(condition, measured[condition]), flush=True)
    return measured


def typical(condition: str, values: list[float]) -> dict[str, float]:
    """The median, and what nine of ten images reach: the 10 % quantile, from above where lower is better."""
    share = 10 if CONDITIONS[condition].higher_is_better else 90
    digits = 4 if CONDITIONS[condition].metric == "SSIM" else 2
    return {
        "median": round(float(np.median(values)), digits),
        "low": round(float(np.percentile(values, share)), digits),
    }


def main() -> None:
    """Measures a bundle's scores and writes them."""
    measured = measure(Pipeline.open(Path(sys.argv[1]), "onnxruntime-cpu"))
    write_json(ROOM / "typical_scores.json", {c: [round(v, 4) for v in values] for c, values in measured.items()})
    content: dict[str, Any] = json.loads(EXAMPLES.read_text())
    for condition, values in measured.items():
        content["examples"][condition]["typical_score"] = typical(condition, values)
    write_json(EXAMPLES, content)


if __name__ == "__main__":
    main()
