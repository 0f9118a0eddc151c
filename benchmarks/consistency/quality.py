"""FID and CLIP score, by torchmetrics. The libraries that bring their networks download the weights once."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import CnppError, UserError
from ...install import cannot_import, needs
from ...messages import one_line, printable
from ...runtime.images.image_files import read_image, resize

Picture = NDArray[np.uint8]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
_BATCH = 16


class Fid:
    """Fréchet inception distance to a folder of real images (Heusel et al. 2017).

    It is computed by torchmetrics on torch-fidelity's Inception v3.

    Real images are resized to the generated ones' size, and the network's input is resized as TensorFlow did, so that
    values are those of the original FID; the paper's clean-fid resizes otherwise.

    Args:
        size: (width, height) of the generated images.
        network: takes images uint8 [N,3,H,W] and gives features [N,D]; None is Inception v3, with 2048.

    Raises:
        UserError: the folder holds less than two images.
        CnppError: the message says what is missing.
    """

    def __init__(self, real: Path, size: tuple[int, int], network: nn.Module | None = None) -> None:
        self._files = sorted(p for p in real.rglob("*") if p.suffix.lower() in _SUFFIXES) if real.is_dir() else []
        if len(self._files) < 2:
            raise UserError(f"--fid {printable(real)} holds {len(self._files)} images: give a folder of the real ones")
        self._size = size
        with _packages("FID", "torchmetrics", "torch_fidelity"):
            from torchmetrics.image.fid import FrechetInceptionDistance
        try:
            feature = 2048 if network is None else network
            self._metric: Any = FrechetInceptionDistance(feature, reset_real_features=False)
        except ModuleNotFoundError:
            raise CnppError(needs("FID", "torch_fidelity", "torchmetrics")) from None
        except Exception as e:  # whatever a download fails with
            raise CnppError(
                f"FID needs Inception v3's weights (91 MB), which are downloaded once: {one_line(e)}"
            ) from e
        self._has_real = False

    def __call__(self, groups: Iterable[Iterable[Picture]]) -> float:
        """The mean over groups.

        As in the paper, one group holds one image of every prompt: the distance depends on the number of images.

        Raises:
            UserError: a group holds less than two images.
        """
        if not self._has_real:
            self._update((resize(read_image(path).pixels, *self._size, "lanczos") for path in self._files), real=True)
            self._has_real = True
        distances = []
        for group in groups:
            self._metric.reset()  # the generated ones' features only
            self._update(group, real=False)
            if self._metric.fake_features_num_samples < 2:
                raise UserError("FID needs two prompts or more: leave --fid out")
            distances.append(float(self._metric.compute()))
        return float(np.mean(distances))

    @torch.inference_mode()
    def _update(self, images: Iterable[Picture], real: bool) -> None:
        batch: list[Tensor] = []
        for image in images:
            batch.append(_tensor(image))
            if len(batch) == _BATCH:
                self._metric.update(torch.stack(batch), real=real)
                batch = []
        if batch:
            self._metric.update(torch.stack(batch), real=real)


class ClipScore:
    """100 times the mean cosine between CLIP's embeddings of images and prompts (Hessel et al. 2021), by torchmetrics.

    Args:
        model: a hub id or local folder of a CLIP model, or what gives the model and its processor. The paper's is
            `openai/clip-vit-base-patch16`.

    Raises:
        CnppError: the message says what is missing.
    """

    def __init__(self, model: str | Callable[[], tuple[nn.Module, Any]]) -> None:
        with _packages("CLIP score", "torchmetrics", "transformers", "torchvision"):
            from torchmetrics.multimodal.clip_score import CLIPScore
            from transformers import CLIPModel, CLIPProcessor

        def load() -> tuple[nn.Module, Any]:
            if callable(model):
                loaded, processor = model()
            else:
                loaded, processor = CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)
            return _Features(loaded), processor

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every attempt without a network
        try:
            self._metric: Any = CLIPScore(load)
        except Exception as e:  # whatever a download fails with
            raise CnppError(
                f"CLIP score needs the weights of {model}, which transformers downloads once: {one_line(e)}"
            ) from e

    @torch.inference_mode()
    def __call__(self, images: Iterable[tuple[Sequence[Picture], str]]) -> float:
        """The mean score of images with their prompts.

        Args:
            images: of one prompt, and the prompt.
        """
        self._metric.reset()
        for of_prompt, prompt in images:
            self._metric.update([_tensor(image) for image in of_prompt], [prompt] * len(of_prompt))
        return float(self._metric.compute())


@contextmanager
def _packages(what: str, *modules: str) -> Iterator[None]:
    """Imports in here fail with one line."""
    try:
        yield
    except ImportError as e:
        raise CnppError(cannot_import(what, e, *modules)) from None
    except RuntimeError as e:  # a torchvision that was built for another torch
        raise CnppError(
            f"{what} cannot load {', '.join(modules)} ({one_line(e)}): install the versions of one build"
        ) from e


class _Features(nn.Module):
    """transformers 5 gives outputs of several fields where torchmetrics 1.9 takes features."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip.eval()
        self.config = clip.config

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        return _projected(self.clip.get_image_features(*inputs))  # type: ignore[operator]

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        return _projected(self.clip.get_text_features(*inputs))  # type: ignore[operator]


def _projected(output: Any) -> Tensor:
    features: Tensor = getattr(output, "pooler_output", output)
    return features


def _tensor(image: Picture) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
