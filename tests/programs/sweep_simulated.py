"""Builder settings measured on the simulated GPU; run by tests/benchmarks/latency/test_sweep.py."""

import shutil
import sys
from pathlib import Path

import fake_tensorrt
from cnpp_trt.benchmarks.latency.sweep import SweepPlan, folder_of, sweep
from cnpp_trt.benchmarks.records import Case
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.plan import BuilderSettings
from cnpp_trt.errors import BackendError

gpu = fake_tensorrt.install()

CHOICES = (BuilderSettings(optimization_level=5), BuilderSettings(tiling_level=2), BuilderSettings(aux_streams=0))


def every_choice_is_measured_or_has_its_reason(bundle_folder: str, plans_folder: str) -> None:
    bundle, plans = Bundle.open(bundle_folder), Path(plans_folder)
    m = bundle.manifest
    built: list[tuple[BuilderSettings, str]] = []

    def build(settings: BuilderSettings, folder: Path) -> None:
        if settings.tiling_level:
            raise BackendError(f"{folder}: no kernel has such tiles")
        built.append((settings, folder.name))
        if not folder.exists():  # what is there from an earlier sweep stays
            fake_tensorrt.make_plans(bundle, folder, images=(1,))

    case = Case(width=m.width, height=m.height, images=1, steps=2, scheduler="ddim", guidance_scale=7.5, base=True)
    found = sweep(SweepPlan(bundle, "seg", case, CHOICES, 3, plans), build)
    assert built == [(settings, folder_of(settings)) for settings in (BuilderSettings(), CHOICES[0], CHOICES[2])], built
    default, level, tiling, aux = found["rows"]
    assert [row["name"] for row in found["rows"]] == [
        *("default", "optimization-level-5", "tiling-level-2", "aux-streams-0")
    ]
    assert "seconds" in default and "ratio" not in default and default["title"] == "TensorRT's defaults"
    for row in (level, aux):
        assert "seconds" in row and len(row["seconds"]["samples"]) == 3
        assert row.get("difference") == 0 and "ratio" in row and row["reason"] == "", row
    assert tiling["reason"] == f"{plans.name}/tiling-level-2: no kernel has such tiles" and "seconds" not in tiling
    # A choice leaves nothing on the device when the next one comes.
    shutil.rmtree(plans / folder_of(CHOICES[2]))
    fake_tensorrt.loaded.clear()
    sweep(SweepPlan(bundle, "seg", case, CHOICES[:1] * 3, 3, plans), build)
    most = gpu.peak_bytes()
    assert most < 3 * fake_tensorrt.WEIGHTS * len(set(fake_tensorrt.loaded)), (most, fake_tensorrt.loaded)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
