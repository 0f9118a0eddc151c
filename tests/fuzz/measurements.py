"""The benchmarks' files: results, records of studies, data sets, thresholds."""

import json
import zlib
from typing import Any

import numpy as np
from cnpp_trt.benchmarks import records as schema
from cnpp_trt.benchmarks.consistency.dataset import open_data
from cnpp_trt.benchmarks.consistency.scores import score_systems
from cnpp_trt.benchmarks.consistency.shards import Shard, appending, read_records
from cnpp_trt.benchmarks.parity.thresholds import read_thresholds
from cnpp_trt.benchmarks.report.compare import changes, make_comparison, require_alike
from cnpp_trt.benchmarks.report.load import load
from cnpp_trt.benchmarks.report.sections import make_document
from cnpp_trt.benchmarks.report.tables import markdown_of
from cnpp_trt.benchmarks.report.write import write_document
from cnpp_trt.developer.readme_tables import RESULTS
from cnpp_trt.runtime.pipeline import Pipeline
from hypothesis import strategies as st
from PIL import Image

from .kind import Kind, Place, put
from .mutations import STRINGS, damaged, documents, encode, values


def result(place: Place) -> Kind:
    """Committed results, changed, and a report of each."""
    file, out = place.folder / "result.json", place.folder / "out"
    loaded = {path.stem: load(path) for path in sorted(RESULTS.glob("*.json"))}
    valid = {path.stem: json.loads(path.read_bytes()) for path in sorted(RESULTS.glob("*.json"))}
    # What is long and alike is tried as well in a short form: changes then reach everything else.
    inputs = [st.tuples(st.just(name), documents(_short(document))) for name, document in valid.items()]

    def attempt(example: tuple[str, bytes]) -> None:
        name, content = example
        found = load(put(file, content))
        markdown_of(found.result)
        require_alike(found, loaded[name])
        make_comparison(found, loaded[name], changes(found.result, loaded[name].result)[:3])
        write_document(make_document([found]), out, "report")

    return Kind(st.one_of(inputs), attempt, lambda e: f"{e[0]} {e[1][:60]!r}… {_changed(valid, e)}")


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(inner) for inner in value[:3]]
    return {key: _short(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _changed(valid: dict[str, Any], example: tuple[str, bytes]) -> str:
    before = encode(_short(valid[example[0]]))
    at = next((i for i, (a, b) in enumerate(zip(before, example[1], strict=False)) if a != b), 0)
    return f"from byte {at}: {example[1][max(0, at - 80) : at + 160]!r}"


_LABELS = {"classes": [1, 2], "intersection": [5, 6], "union": [9, 9]}
_EDGES = {"hits": [3], "marked": [4]}
_RECORD: dict[str, Any] = {
    "id": "1",
    "seeds": [0, 1],
    "scores": [0.5, 0.25],
    "counts": {**_LABELS, **_EDGES},
    "pixels": ["ab" * 32] * 2,
}


def records(place: Place) -> Kind:
    """A study's lines, with the right checksum or not."""
    header = {"system": "deployed", "steps": 2}
    file = place.folder / Shard().file

    def attempt(example: tuple[bytes, bool, str]) -> None:
        content, sealed, metric = example
        file.unlink(missing_ok=True)
        with appending(place.folder, Shard(), header) as append:
            append(_RECORD)
        with file.open("ab") as lines:
            lines.write((_with_checksum(content) if sealed else content).replace(b"\n", b" ") + b"\n")
        found = list(read_records(place.folder, header, schema.PromptRecord).values())
        usable = [
            r
            for r in found
            if {n: len(v) for n, v in r["counts"].items()} == {n: len(v) for n, v in _RECORD["counts"].items()}
        ]
        if usable:
            score_systems(metric, {"deployed": usable, "reference": usable[::-1]})

    metrics = st.sampled_from(["mIoU", "F1", "SSIM", "RMSE"])
    return Kind(st.tuples(documents(_RECORD), st.booleans(), metrics), attempt)


def _with_checksum(content: bytes) -> bytes:
    try:
        document = json.loads(content)
        digest = zlib.crc32(json.dumps(document, allow_nan=False).encode())
    except (ValueError, RecursionError):
        return content
    return json.dumps({**document, "crc32": digest}).encode() if isinstance(document, dict) else content


def dataset(place: Place) -> Kind:
    """`prompts.jsonl` of a user's folder, and the pictures that it names."""
    pipeline = Pipeline.open(place.bundle, "onnxruntime-cpu", threads=1)
    labels = np.zeros((64, 64), np.uint8)
    labels[20:] = 3
    Image.fromarray(labels).save(place.folder / "labels.png")
    picture = (place.folder / "labels.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(place.folder / "photo.jpg")
    lines = [
        {"id": "17", "prompt": "a house by a lake", "condition": "labels.png"},
        {"prompt": "a house by a lake", "condition": "labels.png"},
        {"prompt": "a house by a lake", "image": "photo.jpg"},
    ]
    names = st.sampled_from([*STRINGS, "changed.png", "/dev/zero", "/dev/stdin", "labels.png/", "x" * 5_000])

    def attempt(example: tuple[bytes, bytes, bytes, bytes]) -> None:
        first, second, between, changed = example
        put(place.folder / "changed.png", changed)
        put(place.folder / "prompts.jsonl", first + between + second + b"\n")
        data = open_data(pipeline, ["seg"], place.folder, None)
        for index in range(min(3, len(data.ids))):
            data.prompt(index)
            data.control(index, "seg")

    named = st.tuples(st.sampled_from(["condition", "image"]), names).map(
        lambda pair: encode({"prompt": "x", pair[0]: pair[1]})
    )
    whole = st.sampled_from([encode(line) for line in lines[:2]])
    line = st.one_of(*map(documents, lines), whole, whole, named)
    inputs = st.tuples(
        st.one_of(whole, line),
        line,
        st.sampled_from([b"\n", b"\n\n", b"\r\n", b""]),
        st.one_of(st.just(picture), damaged(picture)),
    )
    return Kind(inputs, attempt)


_THRESHOLDS = b"[fp32]\ngraph_relative_l2 = 1e-5\nimage_psnr = 35\n\n[fp16]\nimage_ssim = 0.9\n"


def thresholds(place: Place) -> Kind:
    file = place.folder / "thresholds.toml"
    value = st.one_of(
        values().map(lambda v: json.dumps(v) if not isinstance(v, float) else repr(v)),
        st.sampled_from(
            ["2026-01-01", "inf", "-nan", "[" * 20_000, "{a=1}", "0x" + "f" * 400, "'''x'''", "1_000", "true", "1e999"]
        ),
    )
    key = st.sampled_from(
        ["image_psnr", "image_lpips", "forced_relative_l2", "x", '"\\u001b[31m"', "a.b", '""', "x" * 5_000]
    )
    table = st.sampled_from(
        ["[fp32]", "[fp16]", "[fp64]", "[[fp32]]", '["\\u202e"]', "", "[fp32.image_psnr]", "[a.b.c]"]
    )
    written = st.lists(st.tuples(table, key, value), min_size=1, max_size=3).map(
        lambda rows: "\n".join(f"{t}\n{k} = {v}" for t, k, v in rows).encode("utf-8", "surrogatepass")
    )

    def attempt(content: bytes) -> None:
        read_thresholds("fp32", put(file, content))

    return Kind(st.one_of(damaged(_THRESHOLDS), written, written), attempt)
