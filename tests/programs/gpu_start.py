"""What starting takes on a GPU, and what it loads; run by tests/gpu/test_backends.py.

Arguments: bundle, backend, and the plans' folder or nothing. Prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.runtime.backends.cuda import Cuda


def main(bundle: str, name: str, plans: str) -> None:
    probe = Cuda()
    before = probe.free_memory()
    start = time.perf_counter()
    pipeline = Pipeline.open(bundle, name, plans=Path(plans) if plans else None)
    backend: Any = pipeline.backend
    m = pipeline.bundle.manifest
    control = Control("seg", np.zeros((m.height, m.width, 3), np.uint8))
    request = Request("a house", controls=[control], num_inference_steps=4, guidance_scale=4.0, seed=1)
    pipeline.prepare(request)
    backend.synchronize()
    prepared = time.perf_counter() - start
    engines = getattr(backend, "_engines", {}).values()
    cached = {engine.plan.key.graph: len(engine._cached) for engine in engines}
    start = time.perf_counter()
    for _ in range(2):
        pipeline(request)
    drawn = time.perf_counter() - start
    heavy = [module for module in ("torch", "diffusers", "transformers", "onnx") if module in sys.modules]
    taken = before - probe.free_memory()
    told = {"parts": backend.memory(), "taken": taken, "modules": heavy, "found": cached, "prepared": prepared}
    print(json.dumps({**told, "drawn": drawn}))


if __name__ == "__main__":
    main(*sys.argv[1:])
