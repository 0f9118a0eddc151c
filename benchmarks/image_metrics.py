"""How far two pictures are apart, and where. Pictures are uint8 [H,W,3]."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from ..errors import CnppError
from ..install import cannot_import, found, needs
from ..messages import one_line

Picture = NDArray[np.uint8]


def max_difference(reference: Picture, found: Picture) -> int:
    """The largest difference of any value, in levels of 255."""
    return int(np.abs(reference.astype(np.int16) - found).max())


def psnr(reference: Picture, found: Picture) -> float | None:
    """Peak signal-to-noise ratio, 10 log10(255² / mean squared difference), in dB; None where the two are equal."""
    error = float(np.mean(np.square(reference.astype(np.float64) - found)))
    return 10 * float(np.log10(255**2 / error)) if error else None


def ssim(reference: Picture, found: Picture) -> float:
    """Structural similarity, -1 to 1: scikit-image's, of each channel in windows of 7 by 7, averaged."""
    # Annotated are also the tuples that it returns when asked for more.
    similarity: Any = structural_similarity(reference, found, channel_axis=-1, data_range=255)
    return float(similarity)


# As torchvision names them and finds them again.
_ALEXNET = "alexnet-owt-7be5be79.pth"
_FETCH = """python -c "import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""""


class Lpips:
    """Learned perceptual image patch similarity (Zhang et al., CVPR 2018) on AlexNet, by torchmetrics; 0 is the same.

    Raises:
        CnppError: the message says what is missing.
    """

    def __init__(self) -> None:
        if not found("torchvision"):
            raise CnppError(needs("LPIPS", "torchvision", "torchmetrics"))
        try:
            from torch.hub import get_dir
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            file = Path(get_dir(), "checkpoints", _ALEXNET)
            if not file.is_file():  # nobody asked for a download
                raise CnppError(f"LPIPS needs AlexNet's weights in {file}: fetch them once with `{_FETCH}`")
            self._metric: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except ImportError as e:
            raise CnppError(cannot_import("LPIPS", e, "torchmetrics", "torchvision")) from None
        except CnppError:
            raise
        except Exception as e:  # a torchvision of another torch
            raise CnppError(f"LPIPS cannot load torchvision or AlexNet's weights: {one_line(e)}") from e

    def __call__(self, reference: Picture, found: Picture) -> float:
        """The distance of two images, uint8 [H,W,3] each; 0 where they are the same."""
        import torch

        def scaled(picture: Picture) -> Any:
            return torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]

        with torch.inference_mode():
            return float(self._metric(scaled(reference), scaled(found)))


def difference_map(reference: Picture, found: Picture) -> tuple[Picture, int]:
    """Where two pictures differ: the largest difference of a pixel's channels, on a ramp from black to white.

    The ramp is that of a glowing body: a third of it from black to red, one to yellow, one to white.

    Returns:
        The map, and how many levels of 255 are white: the largest difference, at least 1.
    """
    levels = np.abs(reference.astype(np.int16) - found).max(-1)
    scale = max(int(levels.max()), 1)
    share = levels[..., None] / scale
    ramp = np.clip(3 * share - np.arange(3), 0, 1)  # red rises in the first third, then green, then blue
    return (255 * ramp).round().astype(np.uint8), scale


def png(picture: Picture) -> str:
    """As a PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
