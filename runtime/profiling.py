"""Ranges in the timelines of NVIDIA's profilers (NVTX), where CNPP_TRT_NVTX=1 is set."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from ..install import install_command

logger = logging.getLogger(__name__)

VARIABLE = "CNPP_TRT_NVTX"
DOMAIN = "cnpp-trt"
_NOTHING: AbstractContextManager[Any] = nullcontext()


def profiled(name: str) -> AbstractContextManager[Any]:
    """A range of the domain `cnpp-trt` around what the host launches, under which a profiler lists the GPU's work.

    Args:
        name: of the stage, as in a result's timings.
    """
    nvtx = _nvtx()
    return _NOTHING if nvtx is None else nvtx.annotate(name, domain=DOMAIN)


@cache
def _nvtx() -> Any:
    if os.environ.get(VARIABLE) != "1":
        return None
    try:
        import nvtx
    except ImportError:
        logger.warning(f"{VARIABLE}=1 needs the package nvtx, which is not installed: {install_command('profile')}")
        return None
    return nvtx
