"""`cnpp-trt report`: tables, the page and its twin, from made-up results of every kind; bad input of every kind."""

import base64
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import sample_results as sample
from cnpp_trt.benchmarks import records
from cnpp_trt.benchmarks.report import fidelity, numbers, speed, tables
from cnpp_trt.benchmarks.report.document import Bars
from cnpp_trt.benchmarks.report.load import load, load_results
from cnpp_trt.benchmarks.report.sections import make_document
from cnpp_trt.benchmarks.report.table import Column, make_table
from cnpp_trt.benchmarks.report.tables import markdown_of
from cnpp_trt.benchmarks.result import RECORDS
from cnpp_trt.benchmarks.statistics import summarize
from hints import hint
from markdown_it import MarkdownIt
from PIL import Image

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script> | [x](javascript:y) `$x^2$` ../../up"
KINDS = tuple(RECORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of every kind."""
    made: Path = tmp_path_factory.mktemp("results")
    for result in sample.make_all():
        result.write(made / f"{result.kind}-sample.json")
    return made


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of them, by the installed command."""
    out = tmp_path_factory.mktemp("report")
    script = Path(sys.executable).parent / "cnpp-trt"
    line: list[Any] = [script, "report", folder, "--out", out]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [str(out / "report.html"), str(out / "report.md")]
    return out


class Page(HTMLParser):
    """What a test asks of a page: tables as rows of cells, ids, links, and everything that would be loaded."""

    VOID = frozenset(("meta", "img", "br", "hr", "link", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        self._take(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, dict(attrs))

    def _take(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.ids += [value for key, value in attributes.items() if key == "id" and value]
        self.loads += [v for k, v in attributes.items() if k in ("src", "srcset", "data", "action") and v]
        self.links += [v for k, v in attributes.items() if k in ("href", "xlink:href") and v]
        self.scripts += tag == "script" or any(key.startswith("on") for key in attributes)
        if tag == "link":
            self.loads.append(attributes.get("href") or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """By an independent reader of Markdown, to HTML and back to cells."""
    return Page(MarkdownIt("gfm-like", {"linkify": False}).render(text).replace("<br />", "<br>")).tables


# ------------------------------------------------------------------------------------------------------- the samples


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_records_shapes(kind: str, folder: Path) -> None:
    """`load` refuses a key that `records` has not and misses one that it has."""
    result = load(folder / f"{kind}-sample.json").result

    assert result.kind == kind
    if kind == "bench":
        assert set(result.data["cases"][0]["runs"]["openvino"]) == set(records.Timed.__annotations__)


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (6.0712, "6.07"), (0.0123456, "0.0123"), (131.4, "131"), (5766.2, "5766"), (9.999, "10.0"),
     (2.34e-6, "2.3e-6"), (0.00999, "0.00999")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert numbers.number(value) == text


def test_units() -> None:
    assert [numbers.duration(s) for s in (221.3, 6.07, 0.99999, 0.0451, 3.2e-5)] == [
        "221 s", "6.07 s", "1.00 s", "45.1 ms", "32.0 µs"
    ]  # fmt: skip
    assert numbers.durations(0.98, 1.02) == "0.980–1.02 s"
    assert numbers.memory(160 * 2**20) == "160 MiB"
    assert numbers.memory(7.2 * 2**30) == "7.20 GiB"
    assert [numbers.signed(v, 2) for v in (0.0, 0.123, -0.123, -3.1e-6)] == ["0", "+0.12", "−0.12", "−3.1e-6"]
    assert [numbers.percent(f) for f in (0.62, 0.031, 1.0)] == ["62 %", "3.1 %", "100 %"]
    assert [numbers.exponent(v) for v in (2.34e-6, 1.0, 0)] == ["2.3e-6", "1.00", "0"]


def test_speed_table_is_what_the_samples_say() -> None:
    bench = sample.make_bench()
    by_header = [
        dict(zip([c.header for c in speed.speed(bench).columns], row, strict=True)) for row in speed.speed(bench).rows
    ]
    base = bench["cases"][0]["runs"]
    ours = next(row for row in by_header if "cnpp-trt, onnxruntime-cpu, fp32" in row.values())
    median = sorted(base["onnxruntime-cpu"]["whole"]["samples"])[4]  # of nine
    assert ours["median"] == f"{median:.3g} s"
    assert float(ours["images/s"]) == pytest.approx(1 / median, rel=5e-3)
    assert float(ours["it/s"]) == pytest.approx(20 / median, rel=5e-3)
    assert "ratio" in base["onnxruntime-cpu"]
    assert ours["faster by (range)"].startswith(f"{base['onnxruntime-cpu']['ratio']['median']:.2f}x (")
    refused = next(row for row in by_header if row["did not run"])
    assert refused["median"] == "–"
    assert refused["did not run"] == "no NVIDIA GPU here: libcuda was not found"


def test_share_of_the_floor_is_the_rooflines() -> None:
    """One stage by hand: 20 launches of max(flop / rate, bytes / bandwidth), over what they took."""
    bench = sample.make_bench()
    floor, took = bench["roofline"], bench["cases"][0]["runs"]["openvino"]["stages"]
    assert floor is not None
    for stage, bound in (("unet", "compute"), ("update", "memory")):
        work = floor["op_counts"][stage]
        compute, memory = work["flop"] / floor["flop_per_second"]["fp32"], work["bytes"] / floor["bytes_per_second"]
        assert (compute > memory) == (bound == "compute")
        contender = next(c for c in bench["contenders"] if c["name"] == "openvino")
        expected = 20 * max(compute, memory) / took[stage]["median"]
        assert speed.share_of_roofline(bench, contender, stage) == pytest.approx(expected)


def test_int8_with_a_bfloat16_rest_is_held_against_what_int8_could_do() -> None:
    bench = sample.make_bench()
    assert bench["roofline"] is not None
    assert speed.roofline_seconds(bench, "unet", "int8-bf16") is None  # older results have no such rate
    bench["roofline"]["flop_per_second"]["int8"] = 1.8e12
    least = bench["roofline"]["op_counts"]["unet"]["flop"] / 1.8e12
    assert speed.roofline_seconds(bench, "unet", "int8-bf16") == pytest.approx(20 * least)


def test_waterfall_steps_multiply_to_the_whole() -> None:
    waterfall = sample.make_waterfall()
    steps = [step for _, step in speed.steps_of(waterfall) if step is not None]
    medians = [t["seconds"]["median"] for t in waterfall["optimizations"] if "seconds" in t]
    product = 1.0
    for step in steps:
        product *= step
    assert len(steps) == 3
    assert product == pytest.approx(medians[0] / medians[-1])
    assert [row[-1] for row in speed.waterfall(waterfall).rows[-3:]] == [
        "no NVIDIA GPU here: libcuda was not found"
    ] * 3


def test_verdicts_know_which_way_is_better() -> None:
    consistency = sample.make_consistency()
    depth = consistency["conditions"][-1]
    assert depth["metric"] == "RMSE" and not depth["higher_is_better"]
    same, tuned = depth["differences"]
    assert (fidelity.verdict(same, depth), fidelity.verdict(tuned, depth)) == ("no difference", "better")
    worse = tuned.copy()
    worse.update({"value": 0.5, "low": 0.1, "high": 0.9})
    assert fidelity.verdict(worse, depth) == "worse"


def test_plans_that_are_alike_share_a_row() -> None:
    rows = {row[0]: row[1:] for row in tables.make("plans", sample.make_result("plans", sample.make_plans())).rows}
    assert rows["controlnet_…, each of 5"] == ("3.6–7.6", "699", "257", "14/14", "34/48")
    assert rows["unet"] == ("17.5", "1659", "545", "32/32", "77/109")
    assert rows["all 13"][:2] == ("67", str(1659 + 1 + 98 + 5 * 3 + 5 * 699))


def test_markdown_cells_are_plain_text() -> None:
    table = make_table(
        (Column("a", "text"), Column("b", "code"), Column("empty")), [(EVIL, EVIL, ""), ("x_y", "", "–")]
    )
    assert [c.header for c in table.columns] == ["a", "b"]  # the column in which no row says anything is gone
    (cells,) = markdown_tables(table.markdown())
    assert cells == [["a", "b"], [EVIL, EVIL.replace("`", "'")], ["x_y", ""]]


# -------------------------------------------------------------------------------------------------- page and its twin


def test_page_needs_nothing_else(written: Path) -> None:
    page = Page((written / "report.html").read_text("utf-8"))
    assert page.scripts == 0
    assert page.loads and all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", (written / "report.html").read_text("utf-8"))
    for source in page.loads:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)


def test_page_and_twin_have_the_same_tables(written: Path) -> None:
    page = Page((written / "report.html").read_text("utf-8"))
    twin = markdown_tables((written / "report.md").read_text("utf-8"))
    assert len(twin) >= 16
    assert page.tables == twin


def test_twins_figures_lie_beside_it(written: Path) -> None:
    text = (written / "report.md").read_text("utf-8")
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text))
    assert linked == {p.relative_to(written).as_posix() for p in (written / "figures").iterdir()}
    for path in linked:
        if path.endswith(".svg"):
            assert ElementTree.parse(written / path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            Image.open(written / path).verify()


def test_every_reason_is_gathered(written: Path) -> None:
    gathered = next(
        t for t in Page((written / "report.html").read_text("utf-8")).tables if t[0] == ["what", "why", "of"]
    )
    assert [row[0] for row in gathered[1:]] == [
        "cnpp-trt, TensorRT plans, fp16", "CUDA graph per engine", "whole loop as one CUDA graph", "TensorRT plans",
        "tiling level 3", "lpips", "libraries", "SIGKILL",
    ]  # fmt: skip


def test_glance_says_which_is_fast_and_the_same(folder: Path) -> None:
    fast, same, follows = make_document(load_results([folder])).answers
    assert fast.figure == "1.91x" and "cnpp-trt, openvino, fp32 takes" in fast.line
    assert "Faster, with another picture: cnpp-trt, openvino bf16" in fast.line  # 24 levels off
    assert (same.figure, same.good) == ("yes", True) and "difference 1 of 255, worst PSNR 63.7 dB, in 80" in same.line
    assert (follows.figure, follows.good) == ("yes", True)


def test_another_picture_within_its_thresholds_is_close_and_no_more(tmp_path: Path) -> None:
    parity = sample.make_parity()
    parity["images"][1]["max_difference"][3] = 133
    sample.make_result("parity", parity).write(tmp_path / "a.json")
    parity["images"] = []
    sample.make_result("parity", parity).write(tmp_path / "b.json")
    close, none = make_document(load_results([tmp_path])).answers
    assert (close.figure, close.good) == ("close", None) and "largest difference 133 of 255" in close.line
    assert "PyTorch's own fp16: largest difference 9 of 255, worst PSNR 53.4 dB, in 32 images." in close.line
    assert (none.figure, none.good) == ("not measured", None)


def test_noisy_runs_are_said_to_be(tmp_path: Path) -> None:
    """A machine that did something else meanwhile: the figures are shown, and not trusted."""
    bench = sample.make_bench()
    whole = bench["cases"][0]["runs"]["pytorch"]["whole"]
    whole |= summarize([*whole["samples"][:-2], *(20 * s for s in whole["samples"][-2:])])
    sample.make_result("bench", bench).write(tmp_path / "a.json")
    loaded = load_results([tmp_path])
    document = make_document(loaded)
    said = "Not to be trusted: the runs of PyTorch eager (diffusers), fp32 vary widely"
    assert said in markdown_of(loaded[0].result).splitlines()[-1]  # what `bench` prints
    assert said in document.answers[0].line
    bars = next(b for b in document.sections[0].blocks if isinstance(b, Bars))
    assert said in bars.caption
    assert all(0 <= bar.low <= bar.share <= bar.high <= 1 for bar in bars.bars if bar.share is not None)
    assert max(bar.share for bar in bars.bars if bar.share is not None) > 0.7  # one bad run does not shrink them all


def test_what_is_exact_comes_first(tmp_path: Path) -> None:
    for precision in ("bf16", "fp16", "fp32"):
        data = {**sample.make_parity(), "precision": precision}
        sample.make_result("parity", data, f"miniature, {precision}").write(tmp_path / f"{precision}.json")
    sample.make_result("bench", sample.make_bench()).write(tmp_path / "last.json")
    titles = [section.title for section in make_document(load_results([tmp_path])).sections[:4]]
    assert [t.partition(":")[0] for t in titles] == ["Speed", "Parity", "Parity", "Parity"]
    assert titles[1].endswith("fp32")


def test_a_missed_threshold_is_a_no(tmp_path: Path) -> None:
    sample.make_result("parity", sample.make_parity(passed=False)).write(tmp_path / "a.json")
    (answer,) = make_document(load_results([tmp_path])).answers
    assert (answer.figure, answer.good) == ("no", False)
    assert "3 of 255 for depth" in answer.line


def test_same_results_give_the_same_bytes(folder: Path, written: Path, tmp_path: Path, command: Any) -> None:
    assert command("report", folder, "--out", tmp_path).status == 0
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_several_of_one_kind_are_sections_of_their_own(folder: Path, tmp_path: Path, command: Any) -> None:
    for i, title in enumerate(("512, seg", "768, seg", "768, seg")):
        sample.make_result("bench", sample.make_bench(i), title).write(tmp_path / f"bench-{i}.json")
    found = json.loads(command("report", tmp_path, "--out", tmp_path / "out", "--json").out)
    assert [one["title"] for one in found["results"]] == ["512, seg", "768, seg", "768, seg"]
    page = Page(Path(found["html"]).read_text("utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert {"#bench-512-seg", "#bench-768-seg", "#bench-768-seg-2"} <= set(page.links)


def test_text_from_a_result_stays_text(tmp_path: Path, command: Any) -> None:
    """Names, titles, reasons, paths: whatever a result says is never a tag, a link or a path."""
    bench, parity, consistency = sample.make_bench(), sample.make_parity(passed=False), sample.make_consistency()
    bench["contenders"][0]["title"] = bench["contenders"][1]["reason"] = bench["cases"][0]["case"]["scheduler"] = EVIL
    bench["cases"][1]["case"]["scheduler"] = EVIL
    parity["missed"], parity["graphs"][0]["worst"], parity["steps"][0]["condition"] = [EVIL], EVIL, EVIL
    parity["heatmaps"][0]["condition"] = EVIL
    consistency["systems"]["deployed"], consistency["conditions"][0]["condition"] = EVIL, EVIL
    for kind, data in (("bench", bench), ("parity", parity), ("consistency", consistency)):
        environment = {**sample.ENVIRONMENT, "cpu": EVIL, EVIL: EVIL}
        sample.make_result(kind, data, EVIL, command=EVIL, environment=environment).write(tmp_path / f"{kind}.json")
    out = tmp_path / "out"
    outcome = command("report", tmp_path, "--out", out)
    assert (outcome.status, outcome.err) == (0, "")
    page = Page((out / "report.html").read_text("utf-8"))
    assert page.scripts == 0 and page.tables
    assert "".join(page.text).count("<script>alert(1)</script>") > 15
    twin = MarkdownIt("gfm-like", {"linkify": False}).render((out / "report.md").read_text("utf-8"))
    assert "<script" not in twin and 'href="javascript' not in twin
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "parity.json", "consistency.json", "out"}
    for figure in (out / "figures").glob("*.svg"):
        assert not ElementTree.parse(figure).getroot().findall(".//{*}script")


def test_a_sparse_result_is_a_page_too(tmp_path: Path, command: Any) -> None:
    """Nothing but the baseline ran, nothing was drawn, nothing compared."""
    bench, parity, consistency = sample.make_bench(), sample.make_parity(), sample.make_consistency()
    base = bench["cases"][0]
    base["runs"] = {"pytorch": {**base["runs"]["pytorch"], "stages": {}}}
    bench |= {
        "cases": [base],
        "cold": {},
        "roofline": None,
        "roofline_reason": "no time",
        "contenders": bench["contenders"][:1],
    }
    parity |= {"graphs": [], "steps": [], "images": [], "half": [], "heatmaps": [], "thresholds": {}, "unavailable": {}}
    consistency |= {"conditions": [], "sheets": []}
    for kind, data in (("bench", bench), ("parity", parity), ("consistency", consistency)):
        sample.make_result(kind, data).write(tmp_path / f"{kind}.json")
    outcome = command("report", tmp_path, "--out", tmp_path / "out")
    assert (outcome.status, outcome.err) == (0, "")
    assert "no time" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_equal_latents_and_images(tmp_path: Path, command: Any) -> None:
    """A logarithmic axis has no 0, and no PSNR is infinite."""
    parity = sample.make_parity()
    for steps in parity["steps"]:
        steps["free"], steps["forced"] = [0.0] * 20, [0.0] * 20
    for images in parity["images"]:
        images["psnr"], images["max_difference"] = [None] * 16, [0] * 16
    sample.make_result("parity", parity).write(tmp_path / "a.json")
    outcome = command("report", tmp_path / "a.json", "--out", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "to the bit, after every step" in text and "| 0 of 255 | equal | equal |" in text


# --------------------------------------------------------------------------------------------------------- bad input


def test_no_results_yet(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused("report")
    assert said.startswith("no results yet") and "cnpp-trt bench" in said
    assert refused("report", tmp_path).startswith(f"no results in {tmp_path}: measure with")
    assert refused("report", tmp_path / "a.json").startswith(f"there is no {tmp_path / 'a.json'}")


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _without(*path: Any) -> Callable[[str], str]:
    def change(text: str) -> str:
        content = json.loads(text)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return json.dumps(content)

    return change


def _with(value: Any, *path: Any) -> Callable[[str], str]:
    def change(text: str) -> str:
        content = json.loads(text)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("kind", "damage", "expected"),
    [
        ("plans", _cut, "cannot read"),
        ("plans", lambda _: "", "cannot read"),
        ("plans", lambda _: "[1]", "is no result of cnpp-trt"),
        ("plans", _with(7, "format"), "is a result of format 7, not 1: measure again"),
        ("plans", _with("weather", "kind"), "is a result of unknown kind 'weather'"),
        ("plans", _with(1, "more"), "Object contains unknown field `more`"),
        ("plans", _without("title"), "Object missing required field `title`"),
        ("plans", _with(None, "command"), "Expected `str`, got `null` - at `$.command`"),
        ("plans", _without("data", "peak_bytes"), "Object missing required field `peak_bytes`: measure again"),
        ("plans", _with("much", "data", "peak_bytes"), "Expected `int`, got `str` - at `data.peak_bytes`"),
        ("bench", _without("data", "cases", 0, "case", "width"),
         "Object missing required field `width` - at `data.cases[0].case`"),
        ("bench", _without("data", "cases", 2, "runs", "openvino", "whole", "p99"),
         "Object missing required field `p99` - at `data.cases[2].runs[...].whole`"),
        ("bench", _with(-1.0, "data", "cases", 0, "runs", "openvino", "whole", "median"),
         "data.cases[0].runs.openvino.whole holds a time that is not above 0"),
        ("bench", _with([], "data", "contenders"), "lack the base case or the baseline"),
        ("bench", _with("tpu", "data", "device"), "Invalid enum value 'tpu' - at `data.device`"),
        ("bench", _with(float("nan"), "data", "roofline", "bytes_per_second"), "cannot read"),
        ("parity", _with("yes", "data", "passed"), "Expected `bool`, got `str` - at `data.passed`"),
        ("parity", _with("not base64!", "data", "heatmaps", 0, "difference"), "is no PNG in base64"),
        ("consistency", _without("data", "conditions", 1, "differences", 0, "low"),
         "Object missing required field `low` - at `data.conditions[1].differences[0]`"),
    ],
)  # fmt: skip
def test_damaged_results(
    kind: str, damage: Callable[[str], str], expected: str, folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(damage((folder / f"{kind}-sample.json").read_text("utf-8")), "utf-8")
    said = refused("report", damaged, "--out", tmp_path / "out")
    assert expected in said
    assert "damaged" in said or "picture" in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_result(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Endless, waiting, huge or deep: refused at once, before it is in memory."""
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 36)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "digits.json").write_text('{"format": 1' + "0" * 10_000 + "}")
    (tmp_path / "folder.json").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, expected in (
        ("/dev/zero", "it is not a regular file"),
        ("pipe.json", "it is not a regular file"),
        ("huge.json", "it has 68,719,476,736 bytes, more than"),
        ("deep.json", "it is nested too deeply"),
        ("digits.json", "cannot read"),
    ):
        assert expected in refused("report", tmp_path / name, "--out", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("bench", _with(10**15, "data", "cases", 0, "case", "width")),
        ("bench", _with(1e300, "data", "cases", 0, "runs", "openvino", "whole", "p99")),
        ("bench", _with(3, "data", "cases", 0, "case", "more")),
        ("plans", _with(-1, "data", "plans", 0, "bytes")),
        ("plans", _with("x" * 3000, "title")),
        ("parity", _with(256, "data", "images", 0, "max_difference", 0)),
        ("waterfall", _with(True, "data", "case", "steps")),
        ("end_to_end", _with({"deep": {"deep": {"deep": 1}}}, "environment", "gpu")),
    ],
)
def test_values_out_of_range(
    kind: str, damage: Callable[[str], str], folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(damage((folder / f"{kind}-sample.json").read_text("utf-8")), "utf-8")
    said = refused("report", damaged, "--out", tmp_path / "out")
    assert said.startswith(f"{damaged} is no whole result: ") and said.endswith(": measure again with this version")


def test_terminal_escapes_in_a_result_are_shown_and_not_obeyed(tmp_path: Path, command: Any) -> None:
    """In the page, its twin, and on the console, where a comparison names what moved."""
    escape = "\x1b]0;owned\x07\u202e\x9b31m\nline"
    for name, slower in (("a", 1.0), ("b", 3.0)):
        bench = sample.make_bench(slower={"openvino": slower})
        for contender in bench["contenders"]:
            contender["title"] += escape
        environment = {**sample.ENVIRONMENT, "cpu": escape, escape: escape}
        sample.make_result("bench", bench, escape, command=escape, environment=environment).write(
            tmp_path / f"{name}.json"
        )
    printed = [
        command("report", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "out").out,
        command("report", tmp_path / "a.json", "--out", tmp_path / "out").out,
    ]
    assert "\\x1b]0;owned" in printed[0]
    pages = [path.read_text("utf-8") for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".png"]
    assert len(pages) > 4
    for text in (*printed, *pages):
        assert not {c for c in text if not c.isprintable() and c != "\n"}


def test_three_processes_write_one_report(folder: Path, tmp_path: Path) -> None:
    """Each replaces the files whole: none finds its own gone, and what stays is one of theirs."""
    (tmp_path / "umask").touch()
    line: list[Any] = [
        Path(sys.executable).parent / "cnpp-trt",
        "report",
        folder / "plans-sample.json",
        "--out",
        tmp_path / "out",
    ]
    for _ in range(3):
        started = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
        assert [(err, status) for _, err, status in ended] == [("", 0)] * 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md"}
    Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    mode = (tmp_path / "umask").stat().st_mode
    assert (tmp_path / "out" / "report.html").stat().st_mode == mode


def test_a_flipped_byte_is_a_line_or_a_page(folder: Path, tmp_path: Path, command: Any) -> None:
    """Anywhere in the file: never a traceback."""
    whole = (folder / "waterfall-sample.json").read_bytes()
    statuses = set()
    for position in range(0, len(whole), len(whole) // 60):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "flipped.json").write_bytes(bytes(flipped))
        outcome = command("report", tmp_path / "flipped.json", "--out", tmp_path / "out")
        statuses.add(outcome.status)
        assert outcome.status == 0 or (outcome.status == 2 and len(outcome.err.splitlines()) == 1), outcome.err
    assert statuses == {0, 2}


def test_out_that_cannot_be_written(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused("report", folder / "plans-sample.json", "--out", tmp_path / "file")
    assert said.startswith("cannot write") and str(tmp_path / "file") in said
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    """As a limit on the size of files: what was there stays, and nothing else is left."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    limit = "import resource, signal, sys, cnpp_trt.cli as c; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); c.main()"
    line: list[Any] = [sys.executable, "-c", limit, "report", folder / "plans-sample.json", "--out", tmp_path / "out"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr == f"error: cannot write {tmp_path / 'out' / 'report.html'}: File too large\n"
    assert (tmp_path / "out" / "report.html").read_text() == "mine"
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"report.html", "report.md", "figures"}


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_an_optional_package(missing: str, folder: Path, tmp_path: Path) -> None:
    """One line that says what to install; a table in a terminal needs neither."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
sys.argv[0] = "cnpp-trt"
from cnpp_trt.cli import main
main()
"""
    line: list[Any] = [sys.executable, "-c", code, "report", str(folder), "--out", str(tmp_path / "out")]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert ended.returncode == 1
    said = f"error: a report needs {missing}, which is not installed: {hint('bench')}\n"
    assert re.fullmatch(said, ended.stderr), ended.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_no_sideways_scrolling_on_a_phone(written: Path, tmp_path: Path) -> None:
    """In a frame of a phone's width, the page is no wider than the frame."""
    page = (written / "report.html").read_text("utf-8")
    (tmp_path / "page.html").write_text(re.sub(r"<meta http-equiv=[^>]*>", "", page), "utf-8")
    (tmp_path / "frame.html").write_text(
        '<iframe src="page.html" width="360" height="800" style="border:0" id="f"></iframe><script>f.onload = () => {'
        "const d = f.contentDocument.documentElement; document.title = d.scrollWidth + ' of ' + d.clientWidth}</script>"
    )
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
            (tmp_path / "frame.html").as_uri()]  # fmt: skip
    drawn = subprocess.run(line, capture_output=True, text=True, timeout=90)
    title = re.search(r"<title>(\d+) of (\d+)</title>", drawn.stdout)
    assert title is not None, drawn.stdout[:500]
    assert 300 < int(title[1]) <= int(title[2]) <= 360
