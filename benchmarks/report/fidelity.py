"""Tables of whether it is the same picture and still follows its condition: `parity` and `consistency`."""

from collections.abc import Sequence

from ..records import ConditionScores, Consistency, GraphParity, ImageParity, Interval, PairedDifference, Parity
from . import numbers
from .table import ABSENT, Column, Table, make_table

_DECIMALS = {"SSIM": 4}


def graphs(parity: Parity) -> Table:
    """The table of graphs of a parity result."""
    return graph_table(parity["graphs"])


def graph_table(graphs: Sequence[GraphParity]) -> Table:
    """Each graph on the inputs of the reference's run."""
    columns = (
        Column("graph", "code"),
        Column("launches"),
        Column("largest difference"),
        Column("relative L2"),
        Column("1 − cosine"),
        Column("worst tensor", "code"),
    )
    rows = (
        (
            g["graph"],
            str(g["launches"]),
            numbers.exponent(g["max_abs"]),
            numbers.exponent(g["relative_l2"]),
            numbers.exponent(max(0.0, 1 - g["cosine"])),
            g["worst"],
        )
        for g in graphs
    )
    return make_table(columns, rows, "Graphs, on the inputs of PyTorch's run")


def steps(parity: Parity) -> Table:
    """Latents after the first and the last step against the reference's, relative L2."""
    columns = (
        Column("condition", "text"),
        Column("steps"),
        *(
            Column(f"{kind}, {when}")
            for kind in ("by itself", "each step from PyTorch's")
            for when in ("first", "last")
        ),
    )
    rows = []
    for s in parity["steps"]:
        ends = [numbers.exponent(v[i]) if v else ABSENT for v in (s["free"], s["forced"]) for i in (0, -1)]
        rows.append((s["condition"], str(len(s["free"])), *ends))
    return make_table(columns, rows, "Latents after each step, relative L2")


def images(parity: Parity) -> Table:
    """The table of images of a parity result."""
    return image_table(parity["images"], parity["half"])


def image_table(images: Sequence[ImageParity], half: Sequence[ImageParity] = ()) -> Table:
    """Against PyTorch in fp32, and beside it PyTorch's own fp16 against the same."""
    others = {h["condition"]: h for h in half}
    measures = ("images", "max difference", "PSNR, median", "PSNR, worst", "SSIM, worst", "LPIPS, worst")
    columns = (
        Column("condition", "text"),
        *map(Column, measures),
        *(Column(f"PyTorch fp16: {m}") for m in measures),
    )
    rows = []
    for deployed in images:
        other = others.get(deployed["condition"])
        cells = (ABSENT,) * len(measures) if other is None else _image_cells(other)
        rows.append((deployed["condition"], *_image_cells(deployed), *cells))
    return make_table(columns, rows, "Images against PyTorch in fp32, and PyTorch's own fp16 against the same")


def _image_cells(compared: ImageParity) -> tuple[str, ...]:
    if not compared["max_difference"]:
        return ("0", *(ABSENT,) * 5)
    psnr = sorted(float("inf") if p is None else p for p in compared["psnr"])
    lpips = compared["lpips"]
    return (
        str(len(compared["max_difference"])),
        f"{max(compared['max_difference'])} of 255",
        _psnr_text(psnr[len(psnr) // 2]),
        _psnr_text(psnr[0]),
        f"{min(compared['ssim']):.6f}" if compared["ssim"] else ABSENT,
        numbers.exponent(max(lpips)) if lpips else ABSENT,
    )


def _psnr_text(value: float) -> str:
    return "equal" if value == float("inf") else f"{value:.1f} dB"


def largest_difference(images: Sequence[ImageParity]) -> int:
    """In levels of 255."""
    return max((d for i in images for d in i["max_difference"]), default=0)


def worst_psnr(images: Sequence[ImageParity], first: int | None = None) -> float:
    """In dB, of the `first` images of each condition; infinite where all are equal."""
    return min((p for i in images for p in i["psnr"][:first] if p is not None), default=float("inf"))


def images_text(images: Sequence[ImageParity]) -> str:
    """All conditions in one line, by their worst."""
    psnr = worst_psnr(images)
    count = numbers.plural(sum(len(i["max_difference"]) for i in images), "image")
    return f"largest difference {largest_difference(images)} of 255, worst PSNR {_psnr_text(psnr)}, in {count}"


def conclusion(p: Parity) -> str:
    """What the tables do not say: both precisions on the same images, what was not computed, the verdict."""
    titles = {"half": "PyTorch's own fp16", "lpips": "LPIPS"}
    lines = [f"without {titles.get(what, what)}: {why}" for what, why in p["unavailable"].items()]
    if p["half"]:
        own, half = worst_psnr(p["images"], len(p["half"][0]["psnr"])), worst_psnr(p["half"])
        count = numbers.plural(sum(len(i["psnr"]) for i in p["half"]), "image")
        lines.insert(
            0,
            f"worst PSNR on the same {count}: PyTorch's own fp16 {_psnr_text(half)}, "
            f"{p['backend']} {p['precision']} {_psnr_text(own)}",
        )
    return "\n\n".join([*lines, verdict_text(p["missed"], p["precision"])])


def verdict_text(missed: Sequence[str], precision: str) -> str:
    """The verdict in a few words."""
    return f"{len(missed)} thresholds of {precision} missed" if missed else f"within every threshold of {precision}"


def parity(result: Parity) -> Table:
    """The verdict: every threshold, and what was missed."""
    rows = [
        (name.replace("_", " ").replace(" l2", " L2"), numbers.exponent(limit))
        for name, limit in result["thresholds"].items()
    ]
    verdict = "met" if result["passed"] else numbers.plural(len(result["missed"]), "missed", "missed")
    return make_table(
        (Column("threshold", "text"), Column("limit")), [*rows, ("all of them", verdict)], "Verdict", total=True
    )


def consistency(result: Consistency) -> Table:
    """A row for each condition: every system's score with its 95 % interval."""
    systems = result["systems"]
    columns = [Column("condition", "text"), Column("metric", "text"), Column("prompts"), Column("images")]
    rows = [
        (
            c["condition"],
            metric_text(c),
            str(c["prompts"]),
            str(c["images"]),
            *(interval_text(c["scores"].get(name), c["metric"]) for name in systems),
        )
        for c in result["conditions"]
    ]
    return make_table([*columns, *map(Column, systems.values())], rows, "Scores (95 % interval)")


def differences(result: Consistency) -> Table:
    """A row for each condition: the first system minus each of the others, paired, with its 95 % interval."""
    minus = compared(result)
    columns = [Column(f"{next(iter(result['systems'].values()), '')} minus", "text")]
    for name in minus:
        columns += [Column(result["systems"].get(name, name)), Column("that is", "text")]
    rows = []
    for c in result["conditions"] if minus else ():
        cells = [f"{c['condition']}, {metric_text(c)}"]
        for name in minus:
            found = next((d for d in c["differences"] if d["minus"] == name), None)
            cells += [difference_text(found, c["metric"]), verdict(found, c) if found else ABSENT]
        rows.append(cells)
    return make_table(columns, rows, "Paired differences (95 % interval)")


def metric_text(scores: ConditionScores) -> str:
    """With the direction that is better: mIoU ↑."""
    return f"{scores['metric']} {'↑' if scores['higher_is_better'] else '↓'}"


def compared(result: Consistency) -> list[str]:
    """The systems that the first one was compared with."""
    return list(dict.fromkeys(d["minus"] for c in result["conditions"] for d in c["differences"]))


def interval_text(interval: Interval | None, metric: str) -> str:
    """An interval with the metric's decimals, or a dash."""
    if interval is None:
        return ABSENT
    decimals = _DECIMALS.get(metric, 2)
    value, low, high = (f"{v:.{decimals}f}" for v in (interval["value"], interval["low"], interval["high"]))
    return f"{value} ({low}–{high})"


def difference_text(difference: PairedDifference | None, metric: str) -> str:
    """A paired difference with its interval, or a dash."""
    if difference is None:
        return ABSENT
    decimals = _DECIMALS.get(metric, 2)
    value, low, high = (
        numbers.signed(v, decimals) for v in (difference["value"], difference["low"], difference["high"])
    )
    return f"{value} ({low} to {high})"


def verdict(difference: PairedDifference, scores: ConditionScores) -> str:
    """`no difference` where the interval holds 0, else `better` or `worse`."""
    if difference["low"] <= 0 <= difference["high"]:
        return "no difference"
    return "better" if (difference["value"] > 0) == scores["higher_is_better"] else "worse"


def quality(result: Consistency) -> Table:
    """FID and CLIP scores by system."""
    names = list(dict.fromkeys(name for values in result["quality"].values() for name in values))
    rows = [
        (result["systems"].get(system, system), *(numbers.number(values[n]) if n in values else ABSENT for n in names))
        for system, values in result["quality"].items()
    ]
    return make_table([Column("system", "text"), *map(Column, names)], rows, "Quality")


def listed(words: Sequence[str]) -> str:
    """Words as in `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""
