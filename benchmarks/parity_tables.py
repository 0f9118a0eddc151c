"""A parity result as Markdown tables and a verdict."""

import math
from collections.abc import Iterable
from statistics import median

from .graph_parity import NOT_FINITE
from .records import GraphParity, ImageParity, Parity, StepParity

_TITLES = {"half": "PyTorch's own fp16", "lpips": "LPIPS"}


def describe(p: Parity) -> str:
    own = f"{p['backend']} {p['precision']}"
    images = [(own, i) for i in p["images"]] + [("PyTorch fp16", i) for i in p["half"]]
    blocks = [f"{p['model']}: {own} against {p['reference']}", graphs_table(p["graphs"])]
    steps = map(_step_row, p["steps"])
    blocks.append(_table("latents, relative L2 | after step 1 | halfway | at the end | worst step alone", steps))
    blocks.append(images_table(images))
    if p["half"]:
        blocks.append(_against_half(p))
    blocks += [f"without {_TITLES.get(what, what)}: {why}" for what, why in p["unavailable"].items()]
    return "\n\n".join([*blocks, verdict(p["missed"], p["precision"])])


def graphs_table(graphs: Iterable[GraphParity]) -> str:
    return _table("graph | launches | max abs | relative L2 | 1 − cosine | worst", map(_graph_row, graphs))


def images_table(images: Iterable[tuple[str, ImageParity]]) -> str:
    """Args: images: each with the name of the side that drew them."""
    title = "images | side | count | largest difference | PSNR, median, dB | worst | SSIM, worst | LPIPS, worst"
    return _table(title, (_image_row(side, i) for side, i in images))


def verdict(missed: list[str], precision: str) -> str:
    return f"{len(missed)} thresholds of {precision} missed" if missed else f"within every threshold of {precision}"


def _against_half(p: Parity) -> str:
    """The two on the same requests: those that PyTorch drew in fp16."""
    half = worst_psnr(p["half"])
    own = worst_psnr(p["images"], len(p["half"][0]["psnr"]))
    count = sum(len(i["psnr"]) for i in p["half"])
    return (
        f"worst PSNR on the same {count} images: PyTorch's own fp16 {_decibel(half)}, "
        f"{p['backend']} {p['precision']} {_decibel(own)}"
    )


def worst_psnr(images: Iterable[ImageParity], first: int | None = None) -> float:
    """In dB, of the `first` images of each condition; infinite where all are equal."""
    return min((v for i in images for v in i["psnr"][:first] if v is not None), default=math.inf)


def _graph_row(g: GraphParity) -> str:
    return (
        f"`{g['graph']}` | {g['launches']} | {_small(g['max_abs'])} | {_small(g['relative_l2'])} "
        f"| {_small(1 - g['cosine'])} | {g['worst']}"
    )


def _step_row(s: StepParity) -> str:
    free = s["free"]
    after = " | ".join(_small(free[k]) for k in (0, (len(free) - 1) // 2, -1))
    return f"{s['condition']} | {after} | {_small(max(s['forced']))}"


def _image_row(side: str, i: ImageParity) -> str:
    levels = [math.inf if v is None else v for v in i["psnr"]]
    lpips = f"{max(i['lpips']):.4f}" if i["lpips"] else ""
    return (
        f"{i['condition']} | {side} | {len(levels)} | {max(i['max_difference'])} | {_decibel(median(levels))} "
        f"| {_decibel(min(levels))} | {min(i['ssim']):.5f} | {lpips}"
    )


def _small(value: float) -> str:
    return "not finite" if value >= NOT_FINITE else f"{value:.1e}" if value else "0"


def _decibel(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def _table(title: str, rows: Iterable[str]) -> str:
    rule = "|".join("---" for _ in title.split("|"))
    return "\n".join([f"| {title} |", f"|{rule}|", *(f"| {row} |" for row in rows)])
