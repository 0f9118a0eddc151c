"""The fusion report: of layer lists written by hand, and of a real UNet against a count of its ONNX graph."""

from collections import Counter
from collections.abc import Sequence

import onnx
import pytest
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.build import Sizes
from cnpp_trt.engines.builder import build_plan
from cnpp_trt.engines.flavor import Flavor
from cnpp_trt.engines.fusion import Fusible, FusionReport, fusion_report, parse_layers
from cnpp_trt.engines.plan import BuilderSettings
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE

TENSOR = "{ Name: __mye1_myl0, Dimensions: [2,8,64], Strides: [512,64,1], Datatype: Half, Format: (Linear) Row major }"


def log(*layers: tuple[str, Sequence[str]], kind: str = "kgen") -> str:
    """A builder's log with these kernels: (name, the ONNX nodes it came from)."""
    lines = [
        f"Name: {name}, LayerType: {kind}, Inputs: [ {TENSOR}, {TENSOR}], Constants: [], Outputs: [ {TENSOR}], "
        f"TacticName: {name}_0x5f, StreamId: 0, Metadata: {''.join(f'[ONNX Layer: {node}]' for node in nodes)}"
        for name, nodes in layers
    ]
    other = " Name: x, IOMode: Input, DataType: Half, Dimensions: [2,8], Location: Device"
    return "\n".join(["Total Activation Memory: 5 bytes", "Layers:", *lines, "", "I/O Tensors:", other])


def report(
    *layers: tuple[str, Sequence[str]],
    attentions: Sequence[str] = (),
    norms: Sequence[str] = (),
    casts: Sequence[str] = (),
    profiles: int = 1,
) -> FusionReport:
    return fusion_report(parse_layers(log(*layers)), Fusible(tuple(attentions), tuple(norms), tuple(casts)), profiles)


def test_layers_are_read_from_the_log() -> None:
    layers = parse_layers(log(("__myl_CastAdd_myl0_3", ["a", "/b/c d"]), ("_gemm_mha_v2_myl0_4", ["s"]), ("conv", [])))
    assert [(x.name, x.kind, set(x.nodes)) for x in layers] == [
        ("__myl_CastAdd_myl0_3", "kgen", {"a", "/b/c d"}),
        ("_gemm_mha_v2_myl0_4", "kgen", {"s"}),
        ("conv", "kgen", set()),
    ]
    assert [x.operations for x in layers] == [{"Cast", "Add"}, set(), set()]
    assert parse_layers("") == parse_layers("Layers:\n\nI/O Tensors:\n") == []


def test_an_attention_in_one_kernel() -> None:
    found = report(("_gemm_mha_v2_myl0_30", ["sdpa", "soft", "qk"]), attentions=["soft"])
    assert (found.layers, found.attentions, found.attentions_fused, found.unfused) == (1, 1, 1, ())
    assert str(found) == "1 kernels, attention 1/1"


def test_an_attention_in_three_kernels() -> None:
    found = report(
        ("gemm_myl0_1", ["qk"]), ("__myl_MaxSubExpSumDivMul_myl0_2", ["soft"]), ("gemm_myl0_3", ["pv"]),
        ("_gemm_mha_v2_myl0_30", ["soft_1", "qk_1"]), attentions=["soft", "soft_1"],
    )  # fmt: skip
    assert (found.layers, found.attentions, found.attentions_fused, found.unfused) == (4, 2, 1, ("soft",))


def test_an_attention_that_was_lost_counts_as_unfused() -> None:
    """Its softmax is in no kernel's list: nothing shows that it was fused."""
    assert report(("_gemm_mha_v2_myl0_30", ["other"]), attentions=["soft"]).unfused == ("soft",)


def test_an_instance_norm_of_its_own() -> None:
    """Scale and shift are another kernel's: memory is read and written once more."""
    found = report(("__myl_Inor_myl0_3", ["norm"]), ("__myl_MulAddSilu_myl0_4", ["scale", "shift"]), norms=["norm"])
    assert (found.norms, found.norms_fused, found.unfused) == (1, 0, ("norm",))


@pytest.mark.parametrize("name", ["__myl_Gnor_myl0_25", "__myl_SiluGnor_myl0_21"])
def test_a_group_norm_with_scale_and_shift(name: str) -> None:
    found = report((name, ["norm", "scale", "shift", "silu"]), norms=["norm"])
    assert (found.norms, found.norms_fused, found.unfused) == (1, 1, ())


def test_a_layer_norm_in_one_or_two_kernels() -> None:
    found = report(
        ("__myl_MeanSubMulMeanAddSqrtDivMulMulAdd_myl0_7", ["whole"]),
        ("__myl_TranReshCastMeanSubMulMean_myl0_27", ["halves"]),
        ("__myl_AddSqrtDivMulCastMulAdd_myl0_28", ["halves"]),
        norms=["whole", "halves"],
    )
    assert (found.norms, found.norms_fused, found.unfused) == (2, 1, ("halves",))
    assert str(found) == "3 kernels, norms 1/2"


def test_moving_a_norms_tensors_is_no_kernel_of_the_norm() -> None:
    found = report(("__myl_ReshTran_myl0_1", ["norm"]), ("__myl_SiluGnor_myl0_2", ["norm", "scale"]), norms=["norm"])
    assert found.norms_fused == 1


def test_casts_that_are_left() -> None:
    found = report(
        ("__myl_Cast_myl0_1", ["c1"]),
        ("__myl_CastMove_myl0_2", ["c2"]),
        ("__myl_ReshTranCast_myl0_3", ["c3", "r"]),
        ("__myl_CastAddCast_myl0_4", ["c4", "a", "c5"]),
        ("__myl_MoveConc_myl0_5", ["m"]),
        ("_gemm_myl0_6", ["c6", "g"]),
        casts=["c1", "c2", "c3", "c4", "c5", "c6"],
    )
    assert (found.layers, found.casts, found.casts_left, found.unfused) == (6, 6, 3, ())
    assert str(found) == "6 kernels, casts left 3/6"


def test_two_profiles_have_kernels_of_their_own() -> None:
    """Fused for one size and not for the other is not fused."""
    first = [("_gemm_mha_v2_myl0_1", ["soft"]), ("__myl_SiluGnor_myl0_2", ["norm", "scale"])]
    both = [*first, ("_gemm_mha_v2_myl1_1", ["soft"]), ("__myl_SiluGnor_myl1_2", ["norm", "scale"])]
    good = report(*both, attentions=["soft"], norms=["norm"], profiles=2)
    assert (good.layers, good.attentions_fused, good.norms_fused, good.unfused) == (4, 1, 1, ())
    worse = [*first, ("__myl_MaxSubExpSumDiv_myl1_1", ["soft"])]
    worse += [("__myl_Inor_myl1_2", ["norm"]), ("__myl_MulAdd_myl1_3", ["scale"])]
    bad = report(*worse, attentions=["soft"], norms=["norm"], profiles=2)
    assert (bad.layers, bad.attentions_fused, bad.norms_fused, bad.unfused) == (5, 0, 0, ("soft", "norm"))


def test_nothing_to_fuse() -> None:
    found = report(("gemm", ["a"]))
    assert found == FusionReport(1, 0, 0, 0, 0, 0, 0, ())
    assert str(found) == "1 kernels"


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "sizes"), [("unet", Sizes()), ("controlnet_seg", Sizes((1, 2)))])
def test_a_real_model(real: Bundle, rtx: Flavor, graph: str, sizes: Sizes) -> None:
    """Every attention and every norm of the graph is accounted for, and all attentions are fused."""
    if not (MINIATURE / "unet" / "config.json").is_file():
        pytest.skip("the miniature's weights are not in this checkout (miniature/model)")
    spec = real.graph(graph)
    nodes = onnx.load(real.folder / spec.file, load_external_data=False).graph.node
    there = Counter(node.op_type for node in nodes)
    found = build_plan(rtx, real.folder / spec.file, sizes.profiles(spec), BuilderSettings()).fusion
    assert found.attentions == there["Softmax"] > 5
    assert found.attentions_fused == found.attentions
    assert there["InstanceNormalization"] > 5
    assert there["LayerNormalization"] > 5
    assert found.norms == there["InstanceNormalization"] + there["LayerNormalization"]
    assert 0 < found.norms_fused <= found.norms
    assert len(found.unfused) == found.norms - found.norms_fused
    norms = {node.name for node in nodes if node.op_type.endswith("Normalization")}
    assert set(found.unfused) <= norms
    # TensorRT leaves out what it can prove superfluous, so casts may be fewer, but none is a kernel of its own.
    assert found.casts_left == 0
    assert found.casts > 0 or not there["Cast"]
    assert found.layers > found.attentions + found.norms_fused
