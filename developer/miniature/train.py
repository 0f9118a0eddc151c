"""Trains the miniature from nothing.

    python -m cnpp_trt.developer.miniature.train --work DIR [--threads N] [STAGE …]

Each stage reads what earlier ones left in DIR and may be run alone, so independent ones (`reward:seg`, `reward:depth`)
can run side by side. Without stages all run, in order. `package` writes `DIR/model`, `picture` `DIR/miniature.png`.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...conditions import CONDITIONS

# Three trainings of the second stage where ControlNet++ claims a gain, one for the others.
TRAININGS = {"seg": 3, "depth": 3, "canny": 1, "hed": 1, "lineart": 1}
STAGES = [
    "extractors",
    "vae",
    "diffusion",
    "decoder",
    *(f"{kind}:{condition}" for kind in ("plain", "reward", "evaluate") for condition in CONDITIONS),
    "few-steps",
    "package",
    "picture",
]


def run_stage(stage: str, work: Path) -> None:
    """Trains one stage.

    Raises:
        typer.BadParameter: there is no such stage.
    """
    kind, _, condition = stage.partition(":")
    if stage not in STAGES:
        raise typer.BadParameter(f"unknown stage {stage!r}: choose from {', '.join(STAGES)}")
    if kind == "extractors":
        from .extractor_training import train_extractor

        for role in ("reward", "scoring"):
            for which in ("seg", "depth"):
                train_extractor(work, which, role)
    elif kind == "vae":
        from .vae import train_vae

        train_vae(work)
    elif kind == "decoder":
        from .vae import refine_decoder

        refine_decoder(work)
    elif kind == "diffusion":
        from .diffusion import train_diffusion

        train_diffusion(work)
    elif kind == "plain":
        from .controlnet import train_plain

        train_plain(work, condition)
    elif kind == "reward":
        from .controlnet import train_on

        for seed in range(TRAININGS[condition]):
            train_on(work, condition, seed, reward=True)
            train_on(work, condition, seed, reward=False)
    elif kind == "evaluate":
        from .evaluate import evaluate, table

        evaluate(work, condition)
        found = {c: work / "results" / f"{c}.json" for c in CONDITIONS}
        print(table({c: json.loads(p.read_text("utf-8")) for c, p in found.items() if p.is_file()}))
    elif kind == "few-steps":
        from .few_steps import compare, distill, extract_lora, table

        distill(work)
        extract_lora(work)
        print(table(compare(work)))
    elif kind == "picture":
        from .picture import draw_picture

        print(draw_picture(work, work / "miniature.png"))
    else:
        from .package import package

        print(package(work, work / "model"))


def main(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages to run; default all, in order.")] = None,
    work: Annotated[Path, typer.Option(help="Where everything trained is kept.")] = Path("artifacts/miniature"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Trains the stages in their order; a stage that is there is not trained again."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    for stage in stages or STAGES:
        print(f"== {stage}", flush=True)
        run_stage(stage, work)


if __name__ == "__main__":
    typer.run(main)
