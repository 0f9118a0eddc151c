"""`manifest.json`: what a bundle holds, as records with closed keys, types and ranges, under a digest of its own."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, TypedDict

from ..schema import Meta, SchemaError, builtins, convert_closed, decode

FORMAT = 7
MAX_BYTES = 16 << 20
"""Of a manifest. SD 1.5's with five conditions has 60 KB."""

# A file of a bundle: relative, with slashes, no part of it hidden or `..`.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
FileName = Annotated[str, Meta(pattern=rf"\A{_PART}(/{_PART}){{0,3}}\Z")]
GraphName = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,64}\Z")]
ConditionName = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,64}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(max_length=4096)]
Digest = Annotated[str, Meta(min_length=1, max_length=128)]
NonNegative = Annotated[float, Meta(ge=0)]
Pixels = Annotated[int, Meta(ge=64, le=2048, multiple_of=8)]
MAX_ELEMENTS = 2**31
"""Of a tensor, its free dimensions counted as one."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: its name in the ONNX graph.
        dtype: NumPy's name.
        shape: sizes; a string names a dimension that is free.
    """

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.]{1,128}\Z")]
    dtype: Annotated[str, Meta(pattern=r"\A(float32|float16|int64|uint8)\Z")]
    shape: Annotated[
        tuple[
            Annotated[int, Meta(ge=1, le=2**20)]
            | Annotated[str, Meta(pattern=r"\A(batch|images|guidance|tokens|prompts|steps)\Z")],
            ...,
        ],
        Meta(max_length=8),
    ]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file of a bundle and how closely it was found to match its PyTorch module.

    Attributes:
        file: path inside the bundle; its weights lie beside it in `<file>.data`.
        max_abs_difference: largest difference to the PyTorch module over all outputs, on random inputs.
        difference: the largest difference by `measure` over all outputs.
        measure: `relative L2`, or for pixels and labels `share of values that differ`.
        tolerance: what `difference` was allowed to be.
    """

    file: FileName
    inputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=256)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=256)]
    max_abs_difference: NonNegative
    difference: NonNegative
    measure: Annotated[str, Meta(max_length=64)]
    tolerance: NonNegative


@dataclass(frozen=True)
class GraphOptions:
    """How the UNet and the ControlNets are divided into graphs. The images are the same.

    Attributes:
        hoist_prompt: keys and values of the prompt are graphs of their own (`text_kv`), which run once for each prompt.
        hoist_time: so is what is made of the time step (`time_embeds`), once for each schedule.
        split_unet: the UNet is two graphs, `unet_encoder` and `unet_decoder`; the first needs no ControlNet.
        deep_cache: with what `cache_interval` of a request needs: `unet_shallow`, and an output more of `unet`.
    """

    hoist_prompt: bool = True
    hoist_time: bool = True
    split_unet: bool = False
    deep_cache: bool = False


class FileRecord(TypedDict):
    """Size in bytes and SHA-256 of a file."""

    size: Annotated[int, Meta(ge=0, le=2**50)]
    sha256: Sha256


class Defaults(TypedDict, total=False):
    """The model's own settings, where it has them."""

    guidance_scale: Annotated[float, Meta(ge=0, le=1000)]
    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)]
    scheduler: Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,64}\Z")]


class TypicalScore(TypedDict):
    """The model's own consistency on fresh conditions: the median, and the 10 % quantile on the worse side."""

    median: float
    low: float


class ConditionRecord(TypedDict, total=False):
    """A condition of a bundle: whose ControlNet it has, and the model's example, where it ships one."""

    controlnet: Digest
    source: Text
    palette: Annotated[str, Meta(pattern=r"\A(ade20k|coco-stuff)\Z")]
    extractor: Text
    image: FileName
    prompt: Annotated[str, Meta(max_length=100_000)]
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    typical_score: TypicalScore


class LoraRecord(TypedDict):
    """A LoRA that was fused: the number of layers it changed, and the keys that match none."""

    source: Text
    sha256: Sha256
    weight: float
    fused: Annotated[int, Meta(ge=0)]
    unmatched: NotRequired[Annotated[list[Text], Meta(max_length=10_000)]]


class QuantizationRecord(TypedDict):
    """How the large networks were brought to fewer bits.

    `data` says in words what the ranges were taken from, `data_sha256` is over all of it. `kept` has the groups of
    layers of each graph that compute in the bundle's own precision, `effects` what each group costs by itself: the mean
    squared error of the images, in levels of 255.
    """

    format: Annotated[str, Meta(pattern=r"\A(int8|fp8)\Z")]
    method: Text
    data: Text
    data_sha256: Sha256
    kept: Annotated[dict[GraphName, Annotated[list[Text], Meta(max_length=100)]], Meta(max_length=100)]
    effects: Annotated[dict[Text, NonNegative], Meta(max_length=1000)]


class RecipeRecord(TypedDict, total=False):
    """The arguments of `Recipe` that were given; a local file or folder by the last part of its path alone."""

    model: Text
    controlnets: dict[ConditionName, Text]
    vae: Text
    loras: list[Text]
    embeddings: list[Text]
    extractors: dict[ConditionName, Text]
    variant: Text
    config: Text


@dataclass
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        model: the name the bundle was exported under (bundles/library.py).
        base: SHA-256 over the weights that all conditions share, what was fused into them included.
        precision: of weights and activations.
        width, height: of the images, in pixels.
        vae_scale_factor: pixels per latent in each direction.
        text_encoder_layers: of which `clip_skip` may leave out all but one.
        vocabulary: rows of the text encoder's table, which every token's id is below; 0 if that is not known.
        scheduler_config: the checkpoint's `scheduler_config.json`; its keys are diffusers'.
        defaults: the model's own settings, where it has them.
        recipe: what the export was asked for.
        options: how the networks are divided into graphs.
        identity: SHA-256 of which model that is: of its path where it is a local one (`library`); empty where the
            bundle is of no recipe.
        sources: where each component came from (`unet`, `vae`, …): a hub repository with its commit, or the last part
            of a path.
        loras: what was fused.
        embeddings: textual inversions: the number of vectors of each token.
        graphs: by name.
        conditions: by name, in the order in which they were exported: the first is the default of `run`.
        files: every file that is ever read.
        exported_with: versions of the packages that made it.
        quantization: of the large networks, where there is one; `precision` is that of everything else then.
    """

    model: Annotated[str, Meta(min_length=1, max_length=255)]
    base: Digest
    precision: Annotated[str, Meta(pattern=r"\A(fp32|fp16)\Z")]
    width: Pixels
    height: Pixels
    latent_channels: Annotated[int, Meta(ge=1, le=64)]
    vae_scale_factor: Annotated[int, Meta(ge=1, le=64)]
    text_encoder_layers: Annotated[int, Meta(ge=1, le=256)]
    scheduler_config: Annotated[dict[str, Any], Meta(max_length=256)]
    vocabulary: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    defaults: Defaults = field(default_factory=lambda: Defaults())
    recipe: RecipeRecord = field(default_factory=lambda: RecipeRecord())
    options: GraphOptions = field(default_factory=GraphOptions)
    identity: Annotated[str, Meta(max_length=64)] = ""
    sources: Annotated[dict[Text, Text], Meta(max_length=64)] = field(default_factory=dict)
    loras: Annotated[list[LoraRecord], Meta(max_length=256)] = field(default_factory=list)
    embeddings: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=256)], Annotated[int, Meta(ge=1, le=1024)]],
        Meta(max_length=1024),
    ] = field(default_factory=dict)
    graphs: Annotated[dict[GraphName, GraphSpec], Meta(max_length=1000)] = field(default_factory=dict)
    conditions: Annotated[dict[ConditionName, ConditionRecord], Meta(max_length=256)] = field(default_factory=dict)
    files: Annotated[dict[FileName, FileRecord], Meta(max_length=5000)] = field(default_factory=dict)
    exported_with: Annotated[dict[Text, Text], Meta(max_length=64)] = field(default_factory=dict)
    quantization: QuantizationRecord | None = None

    @property
    def number_format(self) -> str:
        """What the large networks compute in: that of the quantization, else `precision`."""
        return self.quantization["format"] if self.quantization else self.precision

    @property
    def digest(self) -> str:
        """SHA-256 over everything that the manifest holds, the digests of all files included.

        Raises:
            SchemaError: it holds what no manifest can.
        """
        return _digest(self._content())

    def dumps(self) -> str:
        """The text of `manifest.json`.

        Raises:
            SchemaError: it holds what no manifest can.
        """
        content = self._content()
        # Unsorted: conditions stay in the order in which they were exported.
        return json.dumps({"format": FORMAT, "digest": _digest(content), **content}, indent=1, allow_nan=False) + "\n"

    def require_valid(self) -> None:
        """Checks the whole content.

        Raises:
            SchemaError: it holds what no manifest can.
        """
        self._content()

    @classmethod
    def loads(cls, text: str | bytes) -> "Manifest":
        """Reads the text of a manifest.

        Raises:
            FormatMismatch: the manifest has another format version.
            SchemaError: the text is not a manifest that was written whole.
        """
        content = decode(text, dict[str, Any])
        if "format" not in content:
            raise SchemaError("it says no format")
        if (found := content.pop("format")) != FORMAT or isinstance(found, bool | float):
            raise FormatMismatch(found)
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise SchemaError("it was changed since the export: its content is not that of its digest")
        return cls._checked(content)

    def _content(self) -> dict[str, Any]:
        # There and back: a number that is whole is written as its type has it, so that what is read has this digest.
        content = builtins(self)
        config = content["scheduler_config"]
        if config.get("lambda_min_clipped") == -math.inf:
            # DPMSolverMultistepScheduler's default, which clips nothing. JSON has no such number.
            content["scheduler_config"] = {key: config[key] for key in config if key != "lambda_min_clipped"}
        checked: dict[str, Any] = builtins(Manifest._checked(content))
        return checked

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> "Manifest":
        manifest = convert_closed(content, cls)
        # What the manifest points at must be listed too: nothing else is ever read.
        examples = {c["image"] for c in manifest.conditions.values() if "image" in c}
        missing = ({g.file for g in manifest.graphs.values()} | examples) - manifest.files.keys()
        if missing:
            raise SchemaError(f"not listed in files: {', '.join(sorted(missing)[:3])}")
        for name, graph in manifest.graphs.items():
            for tensor in (*graph.inputs, *graph.outputs):
                if math.prod(size for size in tensor.shape if isinstance(size, int)) > MAX_ELEMENTS:
                    raise SchemaError(f"{tensor.name} of {name} has more than {MAX_ELEMENTS:,} elements")
        if manifest.width % manifest.vae_scale_factor or manifest.height % manifest.vae_scale_factor:
            raise SchemaError(f"its size is no multiple of vae_scale_factor, {manifest.vae_scale_factor}")
        return manifest


class FormatMismatch(SchemaError):
    """The manifest is of another format version."""


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of the JSON in its shortest form, keys in their order: which condition is the first has a meaning."""
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None
    except ValueError:
        raise SchemaError("it holds a number that JSON has not") from None
    return hashlib.sha256(text.encode()).hexdigest()
