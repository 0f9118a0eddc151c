"""What TensorRT fused, read from the layer list that its builder logs: no GPU and no deserialized plan is needed.

The list has a line for each final layer (a kernel) with the ONNX nodes it came from:

    Name: _gemm_mha_v2_myl0_210, LayerType: kgen, Inputs: …, Metadata: [ONNX Layer: node_Softmax_1546][ONNX Layer: …]

What there was to fuse is counted in the parsed network, so that nothing can be lost on the way.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"^Name: (?P<name>[^,]+), LayerType: (?P<kind>[^,]+),.*?Metadata: (?P<metadata>.*)$", re.MULTILINE)
_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)")
# A generated kernel is named after its operations, four letters each: __myl_CastMove_myl0_3.
_OPERATIONS = re.compile(r"__myl_((?:[A-Z][a-z]+)+)_myl")
_MOVES = {"Move", "Resh", "Tran", "Conc", "Slic"}


@dataclass(frozen=True)
class Layer:
    """A final layer.

    Attributes:
        nodes: names of the ONNX nodes that it computes, whole or in part.
    """

    name: str
    kind: str
    nodes: frozenset[str]

    @property
    def operations(self) -> frozenset[str]:
        """Of a generated kernel; empty where the name does not tell."""
        match = _OPERATIONS.search(self.name)
        return frozenset(re.findall(r"[A-Z][a-z]+", match[1])) if match else frozenset()


@dataclass(frozen=True)
class Fusible:
    """What the network has before fusion, by ONNX node name."""

    attentions: tuple[str, ...]  # the softmax of each
    norms: tuple[str, ...]
    casts: tuple[str, ...]


@dataclass(frozen=True)
class FusionReport:
    """What TensorRT fused.

    Attributes:
        layers: kernels in the plan.
    attentions_fused: those whose softmax and matrix products are one kernel.
    norms_fused: those that one kernel computes, together with what surrounds them (scale and shift at least).
    casts_left: kernels that do nothing but cast (and move).
    unfused: the ONNX nodes of the attentions and norms that were not fused.
    """

    layers: int
    attentions: int
    attentions_fused: int
    norms: int
    norms_fused: int
    casts: int
    casts_left: int
    unfused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.layers} kernels"]
        if self.attentions:
            parts.append(f"attention {self.attentions_fused}/{self.attentions}")
        if self.norms:
            parts.append(f"norms {self.norms_fused}/{self.norms}")
        if self.casts:
            parts.append(f"casts left {self.casts_left}/{self.casts}")
        return ", ".join(parts)


def parse_layers(log: str) -> list[Layer]:
    """The final layers from a builder's verbose log, built with detailed profiling verbosity."""
    return [Layer(m["name"], m["kind"], frozenset(_NODE.findall(m["metadata"]))) for m in _LAYER.finditer(log)]


def fusion_report(layers: Sequence[Layer], fusible: Fusible, profiles: int = 1) -> FusionReport:
    """Compares the kernels of a plan with what there was to fuse.

    Args:
        layers: the final layers.
        fusible: what the network has before fusion.
        profiles: the number of the plan's profiles; each has its own kernels, and a node counts as fused where the
            kernels of every profile fuse it.
    """
    attentions = [
        node for node in fusible.attentions if sum("mha" in x.name for x in layers if node in x.nodes) < profiles
    ]
    norms = [node for node in fusible.norms if not _norm_is_fused(node, layers, profiles)]
    casts = [x for x in layers if "Cast" in x.operations and x.operations <= _MOVES | {"Cast"}]
    return FusionReport(
        layers=len(layers),
        attentions=len(fusible.attentions),
        attentions_fused=len(fusible.attentions) - len(attentions),
        norms=len(fusible.norms),
        norms_fused=len(fusible.norms) - len(norms),
        casts=len(fusible.casts),
        casts_left=len(casts),
        unfused=(*attentions, *norms),
    )


def _norm_is_fused(node: str, layers: Sequence[Layer], profiles: int) -> bool:
    computing = [x for x in layers if node in x.nodes and not (x.operations and x.operations <= _MOVES)]
    # A kernel of its own (Inor) leaves scale and shift to the next one.
    return len(computing) == profiles and all(len(x.nodes) > 1 or "Mul" in x.operations for x in computing)
