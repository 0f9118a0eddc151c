"""What runs where some packages cannot be imported; run by test_light_imports.py and test_without_pytorch.py.

Arguments: the blocked packages with commas between them, the function, and its own. Functions import what they need, as
the package may be imported only after the block.
"""

import importlib
import pkgutil
import sys


class Blocker:
    """A finder before all others, for which the packages are not installed."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)


def imports(module: str) -> None:
    importlib.import_module(module)


def every_module_of_runtime_and_engines_imports() -> None:
    for package in ("engines", "runtime", "bundles"):
        path = importlib.import_module(f"cnpp_trt.{package}").__path__
        for module in pkgutil.walk_packages(path, f"cnpp_trt.{package}."):
            importlib.import_module(module.name)
            print(module.name)
    for name in ("cli", "conditions", "doctor", "errors", "gpu"):
        importlib.import_module(f"cnpp_trt.{name}")
    assert not {"tensorrt", "tensorrt_rtx", "cuda", "onnxruntime", "openvino"} & sys.modules.keys()


def images_without_pytorch_are_the_same_bytes(bundle: str, folder: str) -> None:
    import numpy as np
    from cnpp_trt import Control, Pipeline, Request

    control = Control("seg", np.load(folder + "/control.npy"))
    result = Pipeline.open(bundle, threads=1)(Request("a house", "", [control], 3, scheduler="lcm", seed=7))
    np.savez(folder + "/drawn.npz", images=result.images, latents=result.latents)
    assert not [m for m in ("torch", "diffusers", "transformers") if m in sys.modules]


def command(*arguments: str) -> None:
    """The command line `cnpp-trt`."""
    sys.argv = ["cnpp-trt", *arguments]
    from cnpp_trt.cli import main

    main()


def command_says_its_status(*arguments: str) -> None:
    """Prints what the command exits with."""
    try:
        command(*arguments)
    except SystemExit as e:
        print(e.code)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker(sys.argv[1].split(",")))
    globals()[sys.argv[2]](*sys.argv[3:])
