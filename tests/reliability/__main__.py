"""Measures the parts that were not measured yet, and writes result and page after each."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnpp_trt.benchmarks.check_records import Reliability, ReliabilityPart
from cnpp_trt.benchmarks.result import BenchmarkResult, read_result
from cnpp_trt.developer.random_models.checkpoint import make_checkpoint
from cnpp_trt.developer.readme_tables import RESULTS
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.files import replace_file
from fixture_cache import exported

from .page import page_of
from .parts import PARTS, Place

ROOT = Path(__file__).parent.parent.parent
RESULT, PAGE = RESULTS / "reliability.json", ROOT / "docs" / "reliability.md"


def main() -> int:
    """Exit status 1 where anything went wrong that must not."""
    options = _options()
    chosen = options.only or list(PARTS)
    known = {p["name"]: p for p in read_result(options.result).data["parts"]} if options.result.exists() else {}
    todo = [name for name in chosen if options.only or options.fresh or not _whole(known.get(name))]
    for name in [name for name in chosen if name not in todo]:
        print(f"{name}: measured on {known[name]['measured']}; again with --only {name} or --fresh", flush=True)
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-reliability-") as folder:
        os.environ["CNPP_TRT_HOME"] = f"{folder}/home"
        place = _place(Path(folder), options)
        for name in todo:
            for part in _measure(name, place, known.get(name)):
                known[name] = part
                data = Reliability(parts=[known[part] for part in PARTS if part in known])
                result = BenchmarkResult.of("reliability", "tiny, random weights", "make reliability", data)
                result.write(options.result)
                replace_file(options.page, page_of(read_result(options.result)))
    wrong = [
        f"{row['what']}: {count} {way}"
        for name in chosen
        for row in known[name]["rows"]
        for way, count in row["wrong"].items()
        if count
    ]
    print("\n".join([*wrong, f"{options.result}\n{options.page}"]))
    return 1 if wrong else 0


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="This part, also where it was measured; repeatable."
    )
    parser.add_argument(
        "--command", action="append", default=[], help="Of the parts that stop commands, only this one; repeatable."
    )
    parser.add_argument("--fresh", action="store_true", help="Every part anew.")
    parser.add_argument("--share", type=float, default=1.0, help="Of the usual counts, as in 0.01 for a try.")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args()


def _whole(part: ReliabilityPart | None) -> bool:
    """Whether a part was measured, all of it."""
    return part is not None and not any(row["reason"] for row in part["rows"])


def _place(folder: Path, options: Any) -> Place:
    checkpoint = make_checkpoint(folder / "checkpoint" / "tiny", tiny=True, conditions=("seg", "depth"))
    bundle = folder / "bundle"
    exported("tiny", bundle, lambda out: export_bundle(Checkpoint(str(checkpoint)), ["seg", "depth"], out))
    return Place(folder, bundle, checkpoint, options.share, tuple(options.command))


def _measure(name: str, place: Place, before: ReliabilityPart | None) -> Iterator[ReliabilityPart]:
    """The part after each of its rows, which takes the place of an earlier one of the same attempts."""
    start = time.perf_counter()
    rows = {row["what"]: row for row in before["rows"]} if before is not None and place.commands else {}
    command = f'make reliability FLAGS="--only {name}' + (f' --share {place.share:g}"' if place.share != 1 else '"')
    for row in PARTS[name].measure(place):
        rows[row["what"]] = row
        said = row["reason"] or ", ".join(f"{n} {way}" for way, n in {**row["outcomes"], **row["wrong"]}.items())
        print(f"{name}: {row['what']}: {row['tried']} in {row['seconds']:.0f} s: {said}", flush=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        yield ReliabilityPart(
            name=name, title=PARTS[name].title, command=command, measured=now, rows=list(rows.values())
        )
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
