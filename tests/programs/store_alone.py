"""What finding plans loads, which is no TensorRT; run by tests/engines/test_flavor.py.

Prints the installed flavors' versions and the heavy modules that were loaded, as JSON.
"""

import json
import sys

import cnpp_trt.engines.build
import cnpp_trt.engines.builder
import cnpp_trt.engines.describe  # noqa: F401 -- imported for what they load
from cnpp_trt.engines.store import PlanStore, installed_versions

if __name__ == "__main__":
    store = PlanStore()
    versions = installed_versions()
    store.find_unusable(versions)
    print(json.dumps([versions, sorted(m for m in sys.modules if "tensorrt" in m or m in ("torch", "onnx"))]))
