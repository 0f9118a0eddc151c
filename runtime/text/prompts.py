"""A request's prompts → what the text encoder reads, and what is said about them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...messages import printable, some
from ..settings.request import ResolvedRequest
from .emphasis import extra_network, literal_emphasis
from .tokenizer import Reading, Tokenizer

MAX_CHUNKS = 100
"""Of one prompt: 7,500 tokens, with which attention takes a hundred times as long as with one chunk."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """The rows of one call of the text encoder: with guidance the negative prompt's first, each for every image.

    P = rows · chunks; a row's chunks follow each other.

    Attributes:
        input_ids: int64 [P,77].
        clip_skip: int64 [P], the layers that are left out.
        weights: float32 [P,77], of emphasis; None where there is none.
        chunks: of each row.
    """

    input_ids: NDArray[np.int64]
    clip_skip: NDArray[np.int64]
    weights: NDArray[np.float32] | None
    chunks: int


def join(prompts: Sequence[Prompts], sides: int) -> Prompts:
    """The prompts of several requests as those of one batch: for each side of the guidance, every request's rows.

    Args:
        prompts: of one number of chunks.
        sides: 2 with classifier-free guidance, else 1.
    """

    def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        by_side = [array.reshape(sides, -1, *array.shape[1:]) for array in arrays]
        return np.concatenate(by_side, 1).reshape(-1, *arrays[0].shape[1:])

    weighted = any(p.weights is not None for p in prompts)
    weights = [np.ones(p.input_ids.shape, np.float32) if p.weights is None else p.weights for p in prompts]
    return Prompts(
        input_ids=joined([p.input_ids for p in prompts]),
        clip_skip=joined([p.clip_skip for p in prompts]),
        weights=joined(weights) if weighted else None,
        chunks=prompts[0].chunks,
    )


def read_prompts(tokenizer: Tokenizer, request: ResolvedRequest, guided: bool) -> tuple[Prompts, list[str]]:
    """The prompts of a request, and notes on what was dropped from them or may have been meant otherwise.

    With `long_prompt` all of each prompt is read, and the shorter one filled up with empty chunks.

    `clip_skip` is the prompt's alone, as in diffusers' pipelines (`encode_prompt`), and the negative prompt's too with
    `clip_skip_negative`, as in AUTOMATIC1111's web UI.

    Raises:
        UserError: a prompt cannot be read, or is too long.
    """
    notes: list[str] = []
    prompts = {"prompt": request.prompt}
    skips = [request.clip_skip]
    if guided:
        prompts = {"negative prompt": request.negative_prompt, **prompts}
        skips = [request.clip_skip if request.clip_skip_negative else 0, *skips]
    readings = {}
    for which, text in prompts.items():
        reading = tokenizer.read(text, long=request.long_prompt, weighted=request.prompt_weights)
        if len(reading.ids) > MAX_CHUNKS:
            raise UserError(
                f"the {which} takes {len(reading.ids)} chunks of tokens, more than {MAX_CHUNKS}: shorten it"
            )
        readings[which] = reading
        notes += _remarks(which, text, reading, request)
    notes += _embeddings(readings, tokenizer.embeddings)
    chunks = max(len(reading.ids) for reading in readings.values())
    images = request.num_images_per_prompt
    ids = _filled([r.ids for r in readings.values()], tokenizer.empty, chunks, images)
    weights = _filled([r.weights for r in readings.values()], np.ones(ids.shape[1], np.float32), chunks, images)
    read = Prompts(
        input_ids=ids,
        clip_skip=np.repeat(np.array(skips, np.int64), images * chunks),
        weights=weights if (weights != 1).any() else None,
        chunks=chunks,
    )
    return read, notes


def _filled(rows: Iterable[NDArray[Any]], empty: NDArray[Any], chunks: int, images: int) -> NDArray[Any]:
    """Every row [its chunks,T] filled up with `empty` to `chunks`, once for each image: [rows·images·chunks,T]."""
    filled = np.stack([np.stack([*row, *[empty] * (chunks - len(row))]) for row in rows])
    return np.repeat(filled, images, 0).reshape(-1, filled.shape[-1])


def _remarks(which: str, text: str, reading: Reading, request: ResolvedRequest) -> list[str]:
    """What of a prompt is dropped, or is read otherwise than its author may have meant."""
    said = []
    if reading.dropped:
        said.append(
            f"the {which} is longer than {reading.ids.shape[-1]} tokens; dropped: {_quoted(reading.dropped, 300)} "
            "(--long-prompt reads all of it)"
        )
    if tag := extra_network(text):
        said.append(f"{_quoted(tag)} in the {which} is read literally: a LoRA is put into a bundle by export --lora")
    if not request.prompt_weights and (found := literal_emphasis(text)):
        said.append(f"{_quoted(found)} in the {which} is read literally: --prompt-weights reads it as emphasis")
    return said


def _embeddings(readings: dict[str, Reading], known: dict[str, int]) -> list[str]:
    """Which embeddings are in the prompts, and the words of those that are not."""
    said = []
    used = set()
    for which, reading in readings.items():
        words = [f"{_quoted(w)} ({known[w]} vector{'s' * (known[w] > 1)})" for w in reading.embeddings]
        used |= {*reading.embeddings}
        if words:
            said.append(f"embeddings in the {which}: {', '.join(words)}")
    if unused := known.keys() - used:
        said.append(f"embeddings in no prompt: {some(map(repr, unused), 5)}")
    return said


def _quoted(text: str, limit: int = 60) -> str:
    return printable(repr(text), limit)
