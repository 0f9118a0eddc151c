"""Scheduler configs with anything in them: a finite table, or one line that says what is wrong; never anything else."""

import json
import time
import warnings
from typing import Any

import numpy as np
import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS, build_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow

WRITERS = (
    "DDIM",
    "DDPM",
    "DEISMultistep",
    "DPMSolverMultistep",
    "EulerDiscrete",
    "LCM",
    "LMSDiscrete",
    "UniPCMultistep",
)
# As each class writes its own; what it says of the others' keys is at the end of every config.
CONFIGS = [json.loads(getattr(diffusers, f"{name}Scheduler")().to_json_string()) for name in WRITERS]
KEYS = sorted({key for config in CONFIGS for key in config} | {"sigma_min", "sigma_max", "_use_default_values"})
WORDS = sorted({v for config in CONFIGS for v in config.values() if isinstance(v, str)})

numbers = st.one_of(
    st.integers(-3, 3),
    st.integers(-(10**6), 10**6),
    st.sampled_from([10**9, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0, float("inf"), float("-inf")]),
    st.floats(-2, 2),
    st.floats(),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.text(max_size=20),
    st.sampled_from([*WORDS, "nan", "\x1b[31m", "1000", "true"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
lists = st.builds(lambda value, n: [value] * n, scalars, st.sampled_from([0, 1, 3, 999, 1000, 1001]))
mutations = st.dictionaries(st.sampled_from(KEYS), values | lists, min_size=1, max_size=4)


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def check(scheduler: str, config: dict[str, Any], steps: int, begin: int) -> str:
    """`ran`, or what was refused. Asserts that it was one of these, in seconds of CPU time."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = build_table(scheduler, config, steps, begin)
    except UserError as e:
        message = str(e)
        assert message.isprintable() and 10 < len(message) < 500, message
        assert ".json" not in message or "in the checkpoint and export it again" in message, message
        return message
    finally:
        assert time.process_time() - start < 20
    assert len(table.timesteps) == steps - begin
    for array in (table.timesteps, table.coefficients, table.add_noise, table.input_scale, table.x0_limit):
        assert np.isfinite(np.asarray(array, np.float32)).all()
    return "ran"


def fuzz(count: int, seed: int | None = None) -> dict[str, int]:
    """How many of `count` mutated configs ran, and how many were refused. Anything else is raised.

    Args:
        seed: None: the same examples every time.
    """
    outcomes = {"ran": 0, "refused": 0}

    @settings(
        max_examples=count,
        derandomize=seed is None,
        deadline=None,
        database=None,
        suppress_health_check=list[Any](HealthCheck),
    )
    @given(st.sampled_from(SCHEDULERS), st.sampled_from(CONFIGS), mutations, st.integers(1, 60), st.integers(0, 59))
    def examples(scheduler: str, config: dict[str, Any], changes: dict[str, Any], steps: int, begin: int) -> None:
        found = check(scheduler, {**config, **changes}, steps, begin % steps)
        outcomes["ran" if found == "ran" else "refused"] += 1

    if seed is not None:
        from hypothesis import seed as seeded

        examples = seeded(seed)(examples)
    examples()
    return outcomes


def test_any_value_of_any_key() -> None:
    outcomes = fuzz(400)
    assert outcomes["ran"] > 40 and outcomes["refused"] > 40


ODD = [
    10**9, 10**400, -1, 0, 1, 1.5, 1e308, float("nan"), float("inf"), float("-inf"), True, False, None, "", "1000",
    "\x1b]0;title\x07\n", "x" * 10**6, [], [None], [0.5, float("nan")], [0.1] * 1000, [10**400], {}, {"a": [1]},
    nested(900), nested(20_000),
]  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_key_with_every_kind_of_value(scheduler: str) -> None:
    for key in KEYS:
        for value in ODD:
            for config in CONFIGS[:1] + CONFIGS[3:4]:
                check(scheduler, {**config, key: value}, 4, 0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_longest_training_schedule(scheduler: str) -> None:
    """As many steps as are allowed take a moment, and one more is refused."""
    config = {**CONFIGS[0], "num_train_timesteps": 100_000, "beta_end": 0.0002}
    assert check(scheduler, config, 50, 0) == "ran"
    assert "num_train_timesteps 100001 in" in check(scheduler, {**config, "num_train_timesteps": 100_001}, 50, 0)
