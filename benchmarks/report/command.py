"""What `cnpp-trt report` does with its arguments."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...errors import UserError
from ...messages import escaped
from .compare import OTHER_MACHINE, changes, different_machines, environment_differences, make_comparison, require_alike
from .load import Loaded, load_results
from .sections import make_document
from .write import write_document


def run_report(paths: Sequence[Path], out: Path | None, compare: bool | None, as_json: bool) -> None:
    """Prints the paths of what was written, or one JSON object."""
    loaded = load_results(paths)
    if compare and len(loaded) != 2:
        raise UserError(f"--compare takes two results, not {len(loaded)}")
    if compare or (compare is None and _alike(paths, loaded)):
        _compare(loaded[0], loaded[1], out, as_json)
        return
    html, markdown = write_document(make_document(loaded), out, "report")
    if as_json:
        results = [{"name": one.name, "kind": one.result.kind, "title": one.result.title} for one in loaded]
        print(json.dumps({"html": str(html), "markdown": str(markdown), "results": results}))
    else:
        print(escaped(f"{html}\n{markdown}"))


def _alike(paths: Sequence[Path], loaded: Sequence[Loaded]) -> bool:
    """Two files that were given by name, of the same thing: nobody wants those one below the other."""
    if len(loaded) != 2 or len(paths) != 2:
        return False
    one, two = (result.result for result in loaded)
    return (one.kind, one.title) == (two.kind, two.title)


def _compare(before: Loaded, after: Loaded, out: Path | None, as_json: bool) -> None:
    require_alike(before, after)
    differ, found = environment_differences(before.result, after.result), changes(before.result, after.result)
    html, markdown = write_document(make_comparison(before, after, found), out, "comparison")
    moved = [c for c in found if c.moved]
    if as_json:
        print(
            json.dumps(
                {
                    "html": str(html),
                    "markdown": str(markdown),
                    "moved": [{**asdict(c), "moved": c.moved} for c in moved],
                    "timings": len(found),
                    "environment": [dict(zip(("what", "before", "after"), row, strict=True)) for row in differ],
                }
            )
        )
        return
    if different_machines(differ):
        print(OTHER_MACHINE)
    for c in moved:
        interval = f"{c.ratio['low']:.2f}–{c.ratio['high']:.2f}"
        print(escaped(f"{c.moved}: {c.ratio['median']:.2f}x ({interval}) {' · '.join(c.of)}"))
    if found and not moved:
        print(f"nothing moved beyond noise, of {len(found)} timings")
    print(escaped(f"{html}\n{markdown}"))
