"""The fuzzers' worker with a kind that computes for ever on one of its inputs; run by tests/fuzz/test_judges.py.

Arguments: the worker's own, of which the kind is "loop".
"""

from typing import Any

from fuzz import worker
from fuzz.kind import Kind
from hypothesis import strategies as st

patched: Any = worker  # whose limit and kinds are replaced


def attempt(value: bool) -> None:
    while value:
        pass


if __name__ == "__main__":
    patched.LIMIT = 0.5
    patched.KINDS = {"loop": lambda place: Kind(st.booleans(), attempt)}
    worker.main()
