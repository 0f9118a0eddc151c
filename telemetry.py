"""What dependencies would send, look up or write behind the user's back, switched off before they are imported.

Importing `cnpp_trt` switches off what is sent; the command also keeps caches inside of CNPP_TRT_HOME. A variable that
the user has set, to whatever value, stays as it is.
"""

import os
import sys
from types import ModuleType

# Read by each library when it is imported or first used.
_OFF = {
    # Version 1.29 and later on Linux: a device's id and a queue of events under ~/.cache/Microsoft, sent over HTTPS.
    "ORT_DISABLE_TELEMETRY": "1",
    # What huggingface_hub, diffusers and transformers tell of the machine in the headers of every request.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Asks a service on the hub to convert a repository that has no safetensors, in a thread of its own.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    # Of no dependency, but often in one process with this package.
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Folders that are written in the user's home otherwise, each with its name under CNPP_TRT_HOME/cache.
_CACHES = {
    "CUDA_CACHE_PATH": "cuda",  # the driver's, of kernels that it compiled
    "MPLCONFIGDIR": "matplotlib",  # the list of fonts
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
}


def switch_off() -> None:
    """Sets the environment variables that switch telemetry off, where they are not set."""
    for name, value in _OFF.items():
        os.environ.setdefault(name, value)


def keep_caches_at_home() -> None:
    """Has libraries cache under `home()`, for a process that is this command's alone.

    Raises:
        UserError: As `home`.
    """
    from .places import home  # pathlib and more, which `import cnpp_trt` does without

    for name, folder in _CACHES.items():
        os.environ.setdefault(name, str(home() / "cache" / folder))


def import_openvino() -> ModuleType:
    """The module openvino, without its telemetry, for which there is no variable.

    Importing it sends an event to Google Analytics and leaves an id in `~/intel` where the package openvino_telemetry,
    on which it depends, can be imported; where not, it takes a stub.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    name = "openvino_telemetry"
    if name in sys.modules or "openvino" in sys.modules:
        import openvino
    else:
        sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
        try:
            import openvino
        finally:
            del sys.modules[name]
    module: ModuleType = openvino
    return module
