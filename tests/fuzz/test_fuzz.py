"""Every kind of fuzzed input, with a fixed seed: a few hundred of each here, more with `make fuzz`."""

import os
from typing import Any

import pytest

from fuzz.kinds import KINDS
from fuzz.run import fuzz

pytestmark = pytest.mark.slow

# How often the usual number; `make fuzz` sets it, and another seed.
FACTOR = float(os.environ.get("CNPP_TRT_FUZZ", "1"))
SEED = int(os.environ.get("CNPP_TRT_FUZZ_SEED", "0"))
# One that takes long for an input has fewer of them.
COUNTS = {"command": 20, "config": 120, "weights": 120, "adapter": 120, "result": 100}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_success_or_one_line(kind: str, tiny: Any) -> None:
    outcome = fuzz(kind, SEED, max(1, int(COUNTS.get(kind, 200) * FACTOR)), tiny.bundle, tiny.checkpoint)
    assert not outcome.failures, outcome.text()
    assert outcome.inputs >= min(20, COUNTS.get(kind, 200) * FACTOR)
    assert outcome.refused > 0
