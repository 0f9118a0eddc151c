"""Emphasis as AUTOMATIC1111's web UI reads and applies it, and that reading it takes linear time.

`emphasis_published.json` holds what the published implementation answered: `parse_prompt_attention` of the web UI's
modules/prompt_parser.py, and `EmphasisOriginal` of its modules/sd_emphasis.py on small tensors, in PyTorch 2.13.
"""

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.text.emphasis import (
    MAX_NESTING,
    emphasize,
    extra_network,
    literal_emphasis,
    parse,
    split_at_breaks,
)
from hypothesis import given, settings
from hypothesis import strategies as st

PUBLISHED = json.loads((Path(__file__).parent / "emphasis_published.json").read_text(encoding="utf-8"))


def divided(spans: list[list[Any]]) -> list[list[tuple[str, float]]]:
    """What the published function says, in the parts between its marks ["BREAK", -1], without empty texts."""
    parts: list[list[tuple[str, float]]] = [[]]
    for text, weight in spans:
        if (text, weight) == ("BREAK", -1):
            parts.append([])
        elif text:
            parts[-1].append((text, weight))
    return parts


@pytest.mark.parametrize(("text", "spans"), PUBLISHED["parsed"], ids=range(len(PUBLISHED["parsed"])))
def test_prompts_are_read_as_published(text, spans):
    assert parse(text, breaks=True) == divided(spans)


def test_break_inside_brackets_divides():
    assert parse("(a BREAK b:1.5)", breaks=True) == [[("a", 1.5)], [("b", 1.5)]]
    assert parse("(a BREAK b:1.5)", breaks=False) == [[("a BREAK b", 1.5)]]


@settings(max_examples=300, deadline=None)
@given(text=st.text("()[]:\\.19+- BREAK", max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parts = parse(text, breaks=True)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return
    assert all(math.isfinite(weight) for part in parts for _, weight in part)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(red:1000)", "the weight 1000 in the prompt must be a number from -100 to 100"),
        ("(red:1.2.3)", r"the weight 1\.2\.3 in the prompt must be a number"),
        ("(red:.)", r"the weight \. in the prompt must be a number"),
        ("(red:" + "9" * 90_000 + ")", "must be a number"),
        ("((red:50):50)", "brackets give 'red' in the prompt the weight 2500: at most 100"),
        ("(" * 60 + "red", "brackets give 'red' in the prompt the weight 304"),
        ("([" * 50_000, f"more than {MAX_NESTING} brackets open at character 64"),
    ],
)
def test_weights_and_nesting_are_bounded(text, message):
    with pytest.raises(UserError, match=message) as refused:
        parse(text, breaks=False)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("case", PUBLISHED["applied"], ids=lambda case: case["dtype"])
def test_weights_are_applied_as_published(case):
    z, expected = np.array(case["z"], case["dtype"]), np.array(case["result"], case["dtype"])
    found = emphasize(z, np.array(case["weights"], np.float32))
    assert found.dtype == z.dtype
    # The published one rounds each product to half precision.
    np.testing.assert_allclose(found, expected, rtol=1e-5 if z.dtype == np.float32 else 3e-3)


def test_every_row_has_its_own_mean_and_rows_without_weights_stay_as_they_are():
    z = np.random.default_rng(0).normal(0.4, 1, (3, 77, 8)).astype(np.float32)
    weights = np.ones((3, 77), np.float32)
    weights[0, 3:5], weights[2, 1] = 1.4, 0.5
    found = emphasize(z, weights)
    np.testing.assert_allclose(found.mean((1, 2)), z.mean((1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(found[1], z[1])
    np.testing.assert_allclose(found[0, 3] / found[0, 0] * z[0, 0] / z[0, 3], 1.4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_mean_of_nothing_but_rounding_is_not_restored(dtype):
    """That of a final layer norm that learned no bias: its factor would be noise, or not finite."""
    z = np.random.default_rng(0).normal(0, 1, (1, 77, 32))
    z = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)).astype(dtype)
    weights = np.ones((1, 77), np.float32)
    weights[0, 5] = 1.5
    found = emphasize(z, weights)
    np.testing.assert_array_equal(np.delete(found, 5, 1), np.delete(z, 5, 1))
    np.testing.assert_allclose(found[0, 5], z[0, 5] * np.array(1.5, dtype), rtol=1e-3)


def test_weights_that_cancel_each_other_are_refused():
    with pytest.raises(UserError, match="cancel each other"):
        emphasize(np.ones((1, 2, 4), np.float16), np.array([[1, -1]], np.float32))


@pytest.fixture
def seconds() -> Iterator[None]:
    """What takes a quadratic algorithm minutes must end: 20 s are a hundred times what a linear one takes."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


LONG = [
    " " * 100_000,
    "a" + " " * 99_998 + "b",
    "BREAK" * 20_000,
    " BREAK " * 14_000,
    ":" * 100_000,
    "(" + ":1" * 49_000,
    "(: " + " " * 99_990,
    "(:" + "1" * 99_990,
    "(a)" * 33_000,
    "(a:1.1)" * 14_000,
    ")" * 100_000,
    "\\" * 100_000,
    "(((a)))[[b]]" * 8_000,
    "<lora:" * 16_000,
    ("(" * 60 + ")" * 60) * 800,
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_time_is_linear(seconds, text):
    parse(text, breaks=True)
    split_at_breaks(text)
    literal_emphasis(text)
    extra_network(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a (red:1.4) house", "(red:1.4)"),
        ("a ((red)) house", "((red))"),
        ("[[red]]", "[[red]]"),
        ("a (red) house [blue]", ""),
        ("ratio 16:9) (", ""),
        ("", ""),
    ],
)
def test_emphasis_in_plain_prompts(text, found):
    assert literal_emphasis(text) == found


def test_loras_in_prompts():
    assert extra_network("a <LoRA:pixel:0.8> house") == "<LoRA:pixel:0.8>"
    assert extra_network("<hypernet:x") == "<hypernet:x"
    assert extra_network("a <house>") == ""
