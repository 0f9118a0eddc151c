"""`cnpp-trt consistency` as a function: generate, score, write the result."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import CnppError, UserError
from ...files import require_writable
from ...install import cannot_import
from ...places import bundle_at, results
from ...runtime.pipeline import Pipeline
from ..result import BenchmarkResult, default_path
from ..systems import other_systems, subject_system, title_of
from .dataset import open_data
from .generating import Generator, generate
from .scores import measure_quality, summarize
from .shards import Shard
from .study import Study, command_of, sampling_config, start_again


@dataclass(frozen=True)
class ConsistencySettings:
    """What a study generates and scores, and where it goes.

    Attributes:
        conditions: to measure; empty takes all of the bundle's.
        against: systems to compare with: `pytorch`, `pytorch-fp16`, a bundle's folder, or a model that has a bundle.
        data: a folder with `prompts.jsonl`; None takes fresh scenes of the embedded models.
        prompts: number of prompts; None takes all of `data`, or 64 scenes.
        images: per prompt.
        negative_prompt: None takes the paper's, or none for an embedded model.
        num_inference_steps: None takes an embedded model's, or the paper's 20.
        guidance_scale: None takes an embedded model's, or the paper's 7.5.
        scheduler: None takes the model's.
        shard: the part of the prompts that this process generates.
        fresh: remove earlier records instead of resuming.
        fid: a folder of real images, for the FID; None leaves it out.
        clip_score: a CLIP model, for the CLIP score; None leaves it out.
        threads: of PyTorch on a CPU; None leaves them as they are.
        model: the checkpoint that the bundle was exported from, for `pytorch`; None takes the one that it names.
        controlnets: ControlNet sources by condition, as they were exported.
        out: the folder of records and result; None takes the default one.

    Raises:
        UserError: `fresh` is set for one shard of several.
    """

    conditions: Sequence[str] = ()
    against: Sequence[str] = ()
    data: Path | None = None
    prompts: int | None = None
    images: int = 4
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    shard: Shard = field(default_factory=Shard)
    fresh: bool = False
    fid: Path | None = None
    clip_score: str | None = None
    threads: int | None = None
    model: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.fresh and self.shard.of > 1:
            raise UserError("--fresh would remove what other shards generate: choose a new folder with --out instead")


def measure_consistency(
    deployed: Pipeline,
    settings: ConsistencySettings,
    open_pipeline: Callable[[Path], Pipeline] = Pipeline.open,
    workers: Callable[[ConsistencySettings], AbstractContextManager[Generator]] | None = None,
) -> tuple[BenchmarkResult, Path]:
    """Generates what is missing of a study, scores every record, and writes the result.

    Interrupted, a second call with the same settings resumes.

    Args:
        deployed: the pipeline under test; its extractors judge every system.
        settings: what is generated and scored.
        open_pipeline: opens the bundles of `settings.against`.
        workers: makes what generates, from the settings with all folders in full; None: this process.

    Returns:
        The result, whose data is a `records.Consistency`, and its file.

    Raises:
        UserError: a setting, the prompts, earlier records or the folder cannot be used.
        CnppError: a system failed, or a package is missing.
    """
    require_writable(settings.out or results())
    own = settings.out
    m, name = deployed.bundle.manifest, f"{deployed.bundle.folder.resolve().name}-{deployed.backend.name}"
    fid, clip_score = None, None
    if settings.fid is not None or settings.clip_score is not None:  # before anything is generated: see what is missing
        try:
            from .quality import ClipScore, Fid
        except ModuleNotFoundError as e:
            raise CnppError(cannot_import("FID and CLIP score", e, "torchmetrics", "torch_fidelity")) from None
        fid = Fid(settings.fid, (m.width, m.height)) if settings.fid is not None else None
        clip_score = ClipScore(settings.clip_score) if settings.clip_score is not None else None
    settings = replace(settings, out=settings.out or results() / "consistency" / name)
    study = study_of(deployed, settings, open_pipeline)
    if settings.fresh:
        start_again(study)
    if workers is None:
        generate(study, settings.shard)
    else:
        with workers(in_full(settings)) as generator:
            generate(study, settings.shard, generator)
    data = summarize(study)
    data["quality"] = measure_quality(study, fid, clip_score)
    result = BenchmarkResult.of(
        "consistency", title_of(deployed), command_of(study, settings.data), data, settings.threads
    )
    path = default_path("consistency", name)
    path = path if own is None else own / path.name
    result.write(path)
    return result, path


def study_of(
    deployed: Pipeline, settings: ConsistencySettings, open_pipeline: Callable[[Path], Pipeline] = Pipeline.open
) -> Study:
    """The study of these settings, whose folder is `settings.out`.

    Raises:
        UserError, CnppError: as `measure_consistency`.
    """
    assert settings.out is not None
    m = deployed.bundle.manifest
    conditions = list(settings.conditions or m.conditions)
    others = other_systems(
        settings.against, deployed, open_pipeline, settings.model, settings.controlnets, settings.threads
    )
    return Study(
        deployed,
        [subject_system(deployed), *others],
        open_data(deployed, conditions, settings.data, settings.prompts),
        conditions,
        sampling_config(
            m,
            settings.images,
            settings.negative_prompt,
            settings.num_inference_steps,
            settings.guidance_scale,
            settings.scheduler,
        ),
        settings.out,
        keep_pictures=settings.fid is not None or settings.clip_score is not None,
    )


def in_full(settings: ConsistencySettings) -> ConsistencySettings:
    """The settings with folders as another process understands them, whatever folder it is in."""

    def absolute(given: str) -> str:
        folder = bundle_at(given)
        return given if folder is None else str(folder.absolute())

    return replace(
        settings,
        out=None if settings.out is None else settings.out.absolute(),
        data=None if settings.data is None else settings.data.absolute(),
        against=[absolute(name) for name in settings.against],
    )
