"""Rows of every format, and what is wrong with those that cannot be drawn."""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Bundle, Control, Pipeline, Request
from cnpp_trt.batch.reading import read_lines
from cnpp_trt.batch.rows import Job, RowReader
from cnpp_trt.errors import UserError
from hints import hint
from PIL import Image

ROW = {"prompt": "a house", "seed": 3, "num_inference_steps": 2, "condition": "seg", "image": "seg.png"}


@pytest.fixture
def reader(lcm: Pipeline, tmp_path: Path) -> RowReader:
    def keep(content: bytes) -> Path:
        path = tmp_path / f"kept-{len(content)}.png"
        path.write_bytes(content)
        return path

    return RowReader(lcm.bundle, keep)


@pytest.fixture
def key(reader: RowReader, here: Path) -> Callable[..., str]:
    """The key of a row; fields that are None are left out."""

    def of(**changes: Any) -> str:
        row = {name: value for name, value in {**ROW, **changes}.items() if value is not None}
        return reader.read(row, here).key

    return of


def read(path: Path) -> list[Any]:
    return list(read_lines(path))


# ---------------------------------------------------------------------------------------------------------- formats


def jobs_of(path: Path, reader: RowReader) -> list[Job]:
    lines = read(path)
    assert not [line.error for line in lines if line.error]
    return [reader.read(line.value, line.folder) for line in lines]


@pytest.fixture
def expected(reader: RowReader, here: Path) -> list[str]:
    """The keys of two rows, which every format here must give."""
    second = {**ROW, "prompt": 'two, "three"\nfour ü', "seed": 4, "guidance_scale": 1.5, "guess_mode": True}
    return [reader.read(row, here).key for row in (ROW, second)]


def second() -> dict[str, Any]:
    return {**ROW, "prompt": 'two, "three"\nfour ü', "seed": 4, "guidance_scale": 1.5, "guess_mode": True}


def test_json_lines(reader: RowReader, here: Path, expected: list[str]) -> None:
    nested = {name: value for name, value in second().items() if name not in ("condition", "image")}
    nested["controls"] = [{"condition": "seg", "image": "./sub/../seg.png"}]
    text = f"\ufeff{json.dumps(ROW)}\r\n\n{json.dumps(nested, ensure_ascii=False)}"
    (here / "jobs.ndjson").write_text(text, "utf-8", newline="")
    assert [job.key for job in jobs_of(here / "jobs.ndjson", reader)] == expected
    assert [line.number for line in read(here / "jobs.ndjson")] == [1, 3]


@pytest.mark.parametrize("name", ["jobs.csv", "jobs.tsv"])
def test_csv(reader: RowReader, here: Path, expected: list[str], name: str) -> None:
    rows = [ROW, second()]
    with (here / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[1]), delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
    assert [job.key for job in jobs_of(here / name, reader)] == expected
    assert [line.number for line in read(here / name)] == [2, 3]  # the second ends in line 4


def test_csv_with_json_in_a_cell(reader: RowReader, here: Path, key: Any) -> None:
    controls = json.dumps([{"condition": "seg", "image": "seg.png"}]).replace('"', '""')
    (here / "jobs.csv").write_text(f'prompt,seed,num_inference_steps,controls\na house,3,2,"{controls}"\n')
    assert [job.key for job in jobs_of(here / "jobs.csv", reader)] == [key()]


def test_parquet(reader: RowReader, here: Path, expected: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame([ROW, second()]).to_parquet(here / "jobs.parquet")
    assert [job.key for job in jobs_of(here / "jobs.parquet", reader)] == expected
    assert [line.number for line in read(here / "jobs.parquet")] == [1, 2]


def test_parquet_with_bytes(reader: RowReader, here: Path, key: Any) -> None:
    """As a binary column, and as the struct that `datasets` makes of its images."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = (here / "seg.png").read_bytes()
    for value in (content, {"bytes": content, "path": None}):
        parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "image": value}]), here / "bytes.parquet")
        assert [job.key for job in jobs_of(here / "bytes.parquet", reader)] == [key()]


def test_a_folder_that_datasets_saved(reader: RowReader, here: Path, expected: list[str]) -> None:
    """Its layout: a state.json, and Arrow's streams."""
    pyarrow = pytest.importorskip("pyarrow")
    folder = here / "saved" / "train"
    folder.mkdir(parents=True)
    rows = [{**row, "image": str(here / "seg.png")} for row in (ROW, second())]
    for i, row in enumerate(rows):
        table = pyarrow.Table.from_pylist([row])
        with pyarrow.ipc.new_stream(str(folder / f"data-0000{i}-of-00002.arrow"), table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert [job.key for job in jobs_of(folder, reader)] == expected
    with pytest.raises(UserError, match=r"several splits: give one of them \(train\)"):
        read(folder.parent)


def test_a_folder_that_datasets_itself_saved(reader: RowReader, here: Path, expected: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "image": str(here / "seg.png")} for row in (ROW, second())]
    datasets.Dataset.from_list(rows).save_to_disk(here / "saved")
    assert [job.key for job in jobs_of(here / "saved", reader)] == expected


def test_a_folder_of_images(reader: RowReader, here: Path, key: Any) -> None:
    row = {name: value for name, value in ROW.items() if name != "image"}
    (here / "metadata.jsonl").write_text(json.dumps({**row, "file_name": "seg.png"}))
    assert [job.key for job in jobs_of(here, reader)] == [key()]


def test_json_with_bytes(key: Any, here: Path) -> None:
    content = base64.b64encode((here / "seg.png").read_bytes()).decode()
    assert key(image={"bytes": content}) == key()


def test_what_is_no_job(tmp_path: Path) -> None:
    for name, message in (
        ("none.jsonl", "there is no file"),
        ("jobs.xlsx", "cannot tell the format"),
        ("empty", "holds no rows"),
        ("bad.parquet", "as Parquet"),
    ):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        elif name != "none.jsonl":
            path.write_bytes(b"PK")
        if name == "bad.parquet":
            pytest.importorskip("pyarrow")
        with pytest.raises(UserError, match=message):
            read(path)


def test_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from cnpp_trt.errors import CnppError

    (tmp_path / "jobs.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CnppError, match=hint("batch")):
        read(tmp_path / "jobs.parquet")


# ------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_of_everything_that_decides_the_images(key: Any, here: Path) -> None:
    Image.open(here / "seg.png").rotate(90).save(here / "other.png")
    Image.open(here / "seg.png").save(here / "same.bmp")
    assert key() == key(image="same.bmp") == key(num_images_per_prompt=1) == key(id="a name") == key(extract=False)
    others: list[dict[str, Any]] = [
        {"prompt": "a barn"}, {"negative_prompt": "x"}, {"seed": 4}, {"num_inference_steps": 3},
        {"guidance_scale": 2.0}, {"scheduler": "ddim"}, {"num_images_per_prompt": 2}, {"strength": 0.5},
        {"init_image": "photo.png"}, {"clip_skip": 1}, {"long_prompt": True}, {"guess_mode": True},
        {"image": "other.png"}, {"extract": True}, {"controlnet_conditioning_scale": 0.5},
        {"control_guidance_start": 0.5}, {"control_guidance_end": 0.5}, {"condition": "canny"}, {"seed": None},
        {"condition": None, "image": None}, {"prompt_weights": True},
    ]  # fmt: skip
    keys = [key(), *(key(**change) for change in others)]
    assert len(set(keys)) == len(keys)


def test_a_key_is_of_the_bundle(key: Any, here: Path, miniature: Any) -> None:
    defaults = {"scheduler": "lcm", "guidance_scale": 1.0}
    other = RowReader(Bundle.open(miniature.bundle), lambda _: here)
    assert other.read({**ROW, **defaults}, here).key != key(**defaults)


def test_a_row_without_a_seed_has_the_same_one_every_time(reader: RowReader, here: Path) -> None:
    row = {name: value for name, value in ROW.items() if name != "seed"}
    first, again = (reader.read(row, here) for _ in range(2))
    other = reader.read({**row, "prompt": "a barn"}, here)
    assert first == again
    assert first.settings["seed"] != other.settings["seed"]
    assert 0 <= first.settings["seed"] < 2**32


def test_a_changed_file_is_another_request(key: Any, here: Path) -> None:
    before = key()
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(here / "seg.png")
    assert key() != before


# ------------------------------------------------------------------------------------------------------- wrong rows


def long_name() -> str:
    return "x" * 300


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{broken", "it is no JSON object"),
    "another JSON": ("[1, 2]", "it is no JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}', "it is no JSON object"),
    "nested": ('{"controls": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is no JSON object: it is nested too deeply"),
    "unknown field": ({**ROW, "prompts": "x"}, "no field 'prompts': did you mean 'prompt'?"),
    "a name": ({**ROW, "id": [1]}, "id must be a text or a whole number"),
    "a prompt that is none": ({**ROW, "prompt": 7}, "prompt must be a string, not int"),
    "steps": ({**ROW, "num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000"),
    "seed": ({**ROW, "seed": -1}, "seed must be a whole number"),
    "seeds": ({**ROW, "seed": [1, 2]}, "2 seeds for 1 images"),
    "scale": ({**ROW, "guidance_scale": "high"}, "guidance_scale must be a number"),
    "scheduler": ({**ROW, "scheduler": "unipcc"}, "unknown scheduler 'unipcc': did you mean 'unipc'?"),
    "many images": ({**ROW, "num_images_per_prompt": 99}, "num_images_per_prompt must be"),
    "strength": ({**ROW, "strength": 0}, "strength must be above 0"),
    "clip skip": ({**ROW, "clip_skip": 99}, "clip_skip must be from 0 to"),
    "a flag": ({**ROW, "guess_mode": "yes"}, "guess_mode must be True or False"),
    "condition": ({**ROW, "condition": "pose"}, "unknown condition 'pose'"),
    "no condition": ({"prompt": "x", "image": "seg.png"}, "a control needs a condition"),
    "no image": ({"prompt": "x", "condition": "seg"}, "the control seg needs an image"),
    "no file": ({**ROW, "image": "none.png"}, "no such file"),
    "no picture": ({**ROW, "image": "jobs.jsonl"}, "is not an image"),
    "a folder": ({**ROW, "image": "."}, "is a directory"),
    "a damaged picture": ({**ROW, "image": "damaged.png"}, "truncated"),
    "a number": ({**ROW, "image": 5}, "the seg image must be the path of a file"),
    "bad base64": ({**ROW, "image": {"bytes": "!!"}}, "the bytes of the seg image are not base64"),
    "NUL in a path": ({**ROW, "image": "a\0b"}, "is not a path"),
    "a long name": ({**ROW, "image": long_name()}, "cannot be read"),
    "extract": ({**ROW, "extract": "yes"}, "extract must be true or false"),
    "range": ({**ROW, "control_guidance_start": 0.9, "control_guidance_end": 0.1}, "must satisfy 0 <= start < end"),
    "both forms": ({**ROW, "controls": []}, "it has controls and condition beside them"),
    "controls": ({"prompt": "x", "controls": 5}, "controls must be a list"),
    "a control": ({"prompt": "x", "controls": ["seg"]}, "a control must be an object"),
    "initial image": ({**ROW, "init_image": "none.png"}, "no such file"),
    "NaN": ('{"prompt": "x", "guidance_scale": NaN}', "it is no JSON object"),
    "infinite": ({**ROW, "guidance_scale": 1e300}, "guidance_scale must be a number from"),
}


def test_every_wrong_row_is_told_with_its_line(batch: Any, here: Path, results: Any) -> None:
    (here / "damaged.png").write_bytes((here / "seg.png").read_bytes()[:300])
    texts = []
    for row, _ in WRONG.values():
        text = row if isinstance(row, str | bytes) else json.dumps(row)
        texts += [text if isinstance(text, bytes) else text.encode(), json.dumps(ROW).encode()]
    (here / "jobs.jsonl").write_bytes(b"\n".join(texts))
    outcome = batch(here / "jobs.jsonl", "--json")
    assert outcome.status == 1
    said = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(said) == len(WRONG)
    for i, (line, (_, message)) in enumerate(zip(said, WRONG.values(), strict=True)):
        assert line.startswith(f"warning: jobs.jsonl, line {2 * i + 1}: "), line
        assert message in line
    summary = json.loads(outcome.out)
    assert (summary["wrong"], summary["requests"], summary["duplicates"]) == (len(WRONG), 1, len(WRONG) - 1)
    failed = [line for line in results() if line["error"]]
    assert [line["line"] for line in failed] == [2 * i + 1 for i in range(len(WRONG))]
    assert all(message in line["error"] for line, (_, message) in zip(failed, WRONG.values(), strict=True))


def test_wrong_rows_of_a_csv(here: Path) -> None:
    rows = [
        "prompt,seed,guess_mode", "one,1,true", "two", 'three,"3', "still three,\",", "four,x,", "five,5,no",
    ]  # fmt: skip
    (here / "jobs.csv").write_bytes("\n".join(rows).encode() + b'\n\xff,6,\nseven,7,False\neight,8\0,\n"nine')
    found = {line.number: line.error or line.value for line in read(here / "jobs.csv")}
    assert found[2] == {"prompt": "one", "seed": 1, "guess_mode": True}
    assert "it has 1 cells, and the first line 3" in found[3]
    assert "seed is neither a number" in found[4]
    assert "seed is neither a number" in found[6]
    assert "guess_mode is neither a number" in found[7]
    assert "prompt is not UTF-8" in found[8]
    assert found[9] == {"prompt": "seven", "seed": 7, "guess_mode": False}
    assert "NUL" in found[10]
    assert "no row of a CSV" in found[11]
    assert len(found) == 9


def test_a_line_that_is_too_long_costs_itself_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnpp_trt.batch.reading.MAX_LINE", 200)
    (here / "jobs.jsonl").write_text('{"prompt": "' + "x" * 1000 + '"}\n{"prompt": "y"}\n')
    found = read(here / "jobs.jsonl")
    assert "more than" in found[0].error
    assert (found[1].number, found[1].value) == (2, {"prompt": "y"})


def test_strict_draws_nothing(batch: Any, written: Any, here: Path) -> None:
    outcome = batch(written([ROW, {**ROW, "seed": -1}]), "--strict")
    assert outcome.status == 2
    told, line = outcome.err.splitlines()
    assert told.startswith("warning: jobs.jsonl, line 2: seed must be")
    assert line.startswith("error: 1 rows of ") and line.endswith("nothing was drawn")
    assert not list((here / "out").rglob("*.png"))


def test_the_request_is_the_rows(lcm: Pipeline, reader: RowReader, here: Path) -> None:
    """Every field arrives, photos are extracted, and transparent pixels are what they are for `cnpp-trt run`."""
    from cnpp_trt.batch.rows import request_of

    buffer = io.BytesIO()
    clear = Image.new("RGBA", (128, 128), (200, 100, 50, 0))
    clear.save(buffer, "PNG")
    (here / "clear.png").write_bytes(buffer.getvalue())
    settings: dict[str, Any] = {
        "prompt": "a", "negative_prompt": "b", "num_inference_steps": 3, "guidance_scale": 2.5, "scheduler": "ddim",
        "seed": [5, 9], "num_images_per_prompt": 2, "strength": 0.5, "clip_skip": 1, "clip_skip_negative": True,
        "long_prompt": True, "prompt_weights": True, "guess_mode": True,
    }  # fmt: skip
    row = {
        **settings,
        "init_image": "clear.png",
        "controls": [
            {"condition": "depth", "image": "clear.png", "controlnet_conditioning_scale": 0.5},
            {"condition": "hed", "image": "photo.png", "extract": True, "control_guidance_end": 0.75},
        ],
    }
    found = request_of(reader.read(row, here), lcm.extract)
    settings["seed"] = (5, 9)
    assert {name: getattr(found, name) for name in settings} == settings
    assert isinstance(found.controls, tuple)
    depth, hed = found.controls
    assert isinstance(depth, Control) and isinstance(hed, Control)
    assert (depth.controlnet_conditioning_scale, depth.control_guidance_end, hed.control_guidance_end) == (0.5, 1, 0.75)
    assert not depth.pixels.any()
    np.testing.assert_array_equal(hed.pixels, lcm.extract("hed", here / "photo.png"))
    assert (np.asarray(found.init_image) == 255).all()
    assert isinstance(found, Request)
