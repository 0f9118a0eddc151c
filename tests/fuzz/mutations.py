"""Changes to valid documents and files, as hypothesis strategies: what a careless or hostile hand makes of them."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# Written as JSON text, where Python's own writer would give up.
_DEEP, _DIGITS = "@deep@", "@digits@"
_TEXTS = {_DEEP: "[" * 100_000 + "]" * 100_000, _DIGITS: "1" + "0" * 5_000}

STRINGS = (
    "", " ", "x", "x" * 300, "x" * 100_000, "\x1b]0;owned\x07\x1b[31m", "a\0b", "a\nb\r",
    "\u202egnp.exe", "\ud800", "\x9b31m", "../../up", "/etc/passwd", "~root", "~nosuchuser/x", "C:\\x",
    "/", ".", "..", "*", "[a-z]*", "{0}", "%s%n", "'; touch owned; '", "$(touch owned)",
    "<script>alert(1)</script>", "模型", "🙂" * 50, "NaN", "-1", "1e999", "１２", "fp16", "seg", "unet",
    "float64", "x/" * 2_000, "(" * 1_000,
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 8, 255, 256, 1000, 65_537, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**9, 10**30,
    10**400, -(2**63) - 1, -0.0, 0.5, 1.5, 1e-300, 1e300, -1e300, math.nan, math.inf, -math.inf,
)  # fmt: skip
CONTAINERS: tuple[Any, ...] = (
    [],
    {},
    [[]],
    [None],
    {"": 0},
    {"a": {"b": {"c": 1}}},
    [0] * 20_000,
    {str(i): i for i in range(2_000)},
)


def values() -> st.SearchStrategy[Any]:
    """Of every kind that JSON has, and some that it has not (NaN, numbers of 5,000 digits)."""
    return st.one_of(
        st.sampled_from([None, True, False]),
        st.sampled_from(NUMBERS),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.sampled_from(STRINGS),
        st.text(max_size=40),
        st.sampled_from(CONTAINERS).map(copy.deepcopy),
        st.sampled_from([_DEEP, _DIGITS]),
    )


@st.composite
def documents(draw: st.DrawFn, document: Any, most: int = 3) -> bytes:
    """The JSON of a document after one to `most` changes somewhere in it; now and then with a byte changed too."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(changed))
        if not places:
            changed = draw(values())
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        _change(draw, container, key)
    content = encode(changed)
    return draw(damaged(content)) if draw(st.integers(0, 7)) == 0 else content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document; of a long list its ends."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value))) if len(value) < 8 else [0, 1, len(value) // 2, len(value) - 1]
    else:
        return
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(draw: st.DrawFn, container: Any, key: Any) -> None:
    kind = draw(st.sampled_from(["replace", "replace", "replace", "similar", "delete", "add", "rename", "repeat"]))
    if kind == "delete":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        container[draw(st.one_of(st.sampled_from(STRINGS), st.sampled_from(sorted(map(str, container)))))] = draw(
            values()
        )
    elif kind == "rename" and isinstance(container, dict):
        container[draw(st.sampled_from(STRINGS))] = container.pop(key)
    elif kind == "repeat" and isinstance(container, list):
        container[key:key] = [copy.deepcopy(container[key])] * draw(st.sampled_from([1, 2, 100]))
    elif kind == "similar" and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        container[key] = draw(
            st.sampled_from([container[key] + 1, -container[key], container[key] * 1000, float(container[key])])
        )
    elif kind == "similar" and isinstance(container[key], str):
        container[key] += draw(st.sampled_from(STRINGS))
    else:
        container[key] = draw(values())


def encode(document: Any) -> bytes:
    """JSON as Python writes it: NaN and Infinity too."""
    text = json.dumps(document)
    for mark, stands_for in _TEXTS.items():
        text = text.replace(f'"{mark}"', stands_for)
    return text.encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's bytes after one to three changes: flipped, cut off, taken out, put in, repeated."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 16, 256, 4096]))
        kind = draw(st.sampled_from(["flip", "flip", "byte", "cut", "remove", "insert", "zeros", "repeat"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and changed:
            changed[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[at:]
        elif kind == "remove":
            del changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(max_size=16))
        elif kind == "zeros":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length] * draw(st.sampled_from([1, 3]))
    return bytes(changed)
