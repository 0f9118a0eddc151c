"""Presets: how a model draws one condition faster at a known price, as `cnpp-trt tune` found it; one JSON file each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeAlias

from ...bundles.bundle import Bundle
from ...bundles.defaults import SamplingDefaults
from ...bundles.manifest import Manifest
from ...conditions import CONDITIONS
from ...errors import UserError
from ...messages import printable, unknown_choice
from ...miniature import PRESETS
from ...schema import FrozenRecord, Meta, SchemaError, decode, read_bounded
from ..sampling.scheduler_config import TIMESTEP_SPACINGS
from ..sampling.schedulers import SCHEDULERS
from .request import MAX_STEPS, Control, Request, ResolvedRequest

FORMAT = 1
SHIPPED = "shipped"
"""In place of a file: every preset that comes with an embedded model."""
MAX_BYTES = 1 << 20

_Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
_Interval: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_STEPS)]
_Text: TypeAlias = Annotated[str, Meta(max_length=2_000)]
_Digest: TypeAlias = Annotated[str, Meta(max_length=128)]


class Levers(FrozenRecord, frozen=True):
    """What a preset sets: fields of `Request`, and the shares of the steps of its control."""

    num_inference_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)]
    scheduler: str
    timestep_spacing: str | None = None
    guidance_start: _Share = 0.0
    guidance_end: _Share = 1.0
    control_guidance_start: _Share = 0.0
    control_guidance_end: _Share = 1.0
    guidance_interval: _Interval = 1
    controlnet_interval: _Interval = 1
    cache_interval: _Interval = 1

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise unknown_choice("scheduler", self.scheduler, SCHEDULERS)
        if self.timestep_spacing is not None and self.timestep_spacing not in TIMESTEP_SPACINGS:
            raise unknown_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        for name in ("guidance", "control_guidance"):
            if not getattr(self, f"{name}_start") < getattr(self, f"{name}_end"):
                raise ValueError(f"{name}_start must be below {name}_end")

    def apply(self, request: Request, defaults: SamplingDefaults) -> ResolvedRequest:
        """The request with what it leaves open decided by these levers; the rest is the model's.

        A control that applies at every step, which is what it says where it says nothing, gets the levers' shares.
        """
        own = {name: getattr(self, name) for name in self.__struct_fields__ if hasattr(defaults, name)}
        return replace(request, controls=self._controls(request)).resolve(replace(defaults, **own))

    def _controls(self, request: Request) -> tuple[Control, ...]:
        start, end = self.control_guidance_start, self.control_guidance_end
        return tuple(
            replace(c, control_guidance_start=start, control_guidance_end=end)
            if (c.control_guidance_start, c.control_guidance_end) == (0, 1)
            else c
            for c in controls_of(request)
        )


def controls_of(request: Request) -> tuple[Control, ...]:
    """The controls of a request, which may have been given one alone."""
    return (request.controls,) if isinstance(request.controls, Control) else tuple(request.controls)


class TunedModel(FrozenRecord, frozen=True):
    """Which weights a preset was found with, at which size and precision; bundles of another export are the same model.

    Attributes:
        base, controlnet: as in the manifest.
        bundle: the digest of the bundle.
    """

    name: _Text
    base: _Digest
    controlnet: _Digest
    precision: _Text
    width: Annotated[int, Meta(ge=8, le=16_384)]
    height: Annotated[int, Meta(ge=8, le=16_384)]
    bundle: _Digest

    @classmethod
    def of(cls, bundle: Bundle, condition: str) -> "TunedModel":
        """The model of a bundle, with the ControlNet of a condition that it has."""
        m = bundle.manifest
        controlnet = _controlnet(m, condition)
        return cls(
            name=m.model,
            base=m.base,
            controlnet=controlnet,
            precision=m.precision,
            width=m.width,
            height=m.height,
            bundle=bundle.digest,
        )

    def difference(self, manifest: Manifest, condition: str) -> str:
        """What a bundle has that is another; empty where a preset of this model is one of that bundle."""
        if condition not in manifest.conditions:
            return f"no {condition}"
        if (manifest.base, _controlnet(manifest, condition)) != (self.base, self.controlnet):
            return "other weights"
        if manifest.precision != self.precision:
            return f"the precision {manifest.precision} instead of {self.precision}"
        if (manifest.width, manifest.height) != (self.width, self.height):
            return f"{manifest.width}x{manifest.height} pixels instead of {self.width}x{self.height}"
        return ""


def _controlnet(manifest: Manifest, condition: str) -> str:
    return str(manifest.conditions[condition].get("controlnet", ""))


class Span(FrozenRecord, frozen=True):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Evidence(FrozenRecord, frozen=True):
    """What was measured of a preset, on prompts that the search had not seen.

    Attributes:
        budget: points that it was allowed to lose.
        metric: of the condition.
        loss: points of the metric that it loses against the exact setting, with the paired 95 % interval.
        exact, tuned: both settings' scores over the prompts, in the metric's own unit.
        prompts: one image each.
        psnr: dB between both settings' images, the median; None where all are equal.
        speedup: how many times faster a request was, in turn with the exact setting: the median, lowest and highest.
        predicted_speedup: by the cost model.
        backend: where times were taken, as it calls itself.
        exact_levers: the setting that it was compared with.
        exact_bundle: whose setting that is; empty for the preset's own model.
        command: that found it.
    """

    budget: float
    metric: _Text
    loss: Span
    exact: float
    tuned: float
    prompts: Annotated[int, Meta(ge=1)]
    psnr: float | None
    speedup: Span
    predicted_speedup: float
    backend: _Text
    exact_levers: Levers
    command: _Text
    exact_bundle: _Text = ""


class Preset(FrozenRecord, frozen=True):
    """The content of a preset file."""

    version: _Text
    model: TunedModel
    condition: str
    levers: Levers
    evidence: Evidence
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"it has the format {self.format}, not {FORMAT}: tune again with this version")
        if self.condition not in CONDITIONS:
            raise unknown_choice("condition", self.condition, CONDITIONS)

    def require_fits(self, bundle: Bundle) -> None:
        """Checks that the preset is of the bundle's model.

        Raises:
            UserError: it is of another one.
        """
        if found := self.model.difference(bundle.manifest, self.condition):
            raise UserError(
                f"the preset for {self.condition} is of {printable(self.model.name)}, and the bundle "
                f"{printable(bundle.folder)} has {found}: find one for it with `cnpp-trt tune`"
            )


def read_presets(names: Sequence[Path | str], bundle: Bundle | None = None) -> tuple[Preset, ...]:
    """The presets of files.

    Args:
        names: paths; `shipped` stands for those of the embedded model.
        bundle: that `shipped` is looked up for; None takes those of every embedded model.

    Raises:
        UserError: a file is missing or no preset, or two are of one model and condition.
    """
    found: list[Preset] = []
    for name in names:
        if str(name) == SHIPPED:
            shipped = [read_preset(path) for path in sorted(PRESETS.glob("*.json"))]
            fitting = [p for p in shipped if bundle is None or not p.model.difference(bundle.manifest, p.condition)]
            if not fitting:
                raise UserError(
                    f"no preset is shipped for {printable(bundle and bundle.folder)}: find one with `cnpp-trt tune`"
                )
            found += fitting
        else:
            found.append(read_preset(Path(name)))
    taken = [(p.model.base, p.model.precision, p.model.width, p.model.height, p.condition) for p in found]
    for preset, key in zip(found, taken, strict=True):
        if taken.count(key) > 1:
            raise UserError(f"two presets are for {preset.condition} of {printable(preset.model.name)}: give one")
    return tuple(found)


def read_preset(path: Path) -> Preset:
    """The preset of a file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    shown = printable(path)
    try:
        return decode(read_bounded(path, MAX_BYTES), Preset)
    except FileNotFoundError:
        raise UserError(f"there is no preset {shown}: find one with `cnpp-trt tune`, or give `{SHIPPED}`") from None
    except OSError as e:
        raise UserError(f"cannot read {shown}: {e.strerror or e}") from None
    except SchemaError as e:
        raise UserError(f"{shown} is no preset: {e}") from None


def by_condition(presets: Sequence[Preset], bundle: Bundle) -> dict[str, Preset]:
    """Presets of a bundle by their conditions.

    Raises:
        UserError: one is of another bundle.
    """
    for preset in presets:
        preset.require_fits(bundle)
    return {preset.condition: preset for preset in presets}


def resolve(request: Request, presets: Mapping[str, Preset], defaults: SamplingDefaults) -> ResolvedRequest:
    """The request with every setting decided: by the preset of its one control's condition, where there is one.

    Args:
        request: with one control, or it is exact: a preset is known for its own condition alone.
        presets: by condition.
        defaults: the model's.
    """
    controls = controls_of(request)
    preset = presets.get(controls[0].condition) if len(controls) == 1 else None
    return request.resolve(defaults) if preset is None else preset.levers.apply(request, defaults)
