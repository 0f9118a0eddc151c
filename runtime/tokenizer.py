"""CLIP's tokenizer through the `tokenizers` library alone: prompt → token ids, as diffusers' pipelines ask for them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from ..errors import BundleError, UserError

CLIP_LENGTH = 77
"""Positions of every CLIP text encoder in Stable Diffusion 1.x and 2.x."""

COMMA_PADDING_BACKTRACK = 20
"""How many tokens before a full chunk's end AUTOMATIC1111's web UI looks for a comma to end it at (its default)."""

_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Tokenizer:
    """The tokenizer that transformers' `CLIPTokenizer.save_pretrained` wrote.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.
        embeddings: the textual inversions' tokens that were added to it, with the number of their vectors.

    Attributes:
        model_max_length: ids per prompt, 77 unless tokenizer_config.json gives another length.
        empty: int64 [model_max_length], the ids of no prompt.

    Raises:
        BundleError: a file is missing or cannot be read as what it should be.
    """

    def __init__(self, folder: Path, embeddings: Mapping[str, int] | None = None) -> None:
        config = _read_config(folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        length = config.get("model_max_length", CLIP_LENGTH)
        # transformers writes 10**30 for "no limit", as a float or an int: the text encoder has one nevertheless.
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not 2 < length < 10**6:
            length = CLIP_LENGTH
        self.model_max_length = int(length)
        # tokenizer.json keeps whatever length and padding it was last called with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        pad = config.get("pad_token") or "<|endoftext|>"
        self._pad = self._id(str(pad["content"] if isinstance(pad, dict) else pad), "pad token", folder)
        frame = self._tokenizer.encode("").ids
        if len(frame) != 2:
            raise BundleError(f"{folder / 'tokenizer.json'} adds no start and end to a prompt: export the bundle anew")
        self._start, self._end = frame
        self._comma = self._tokenizer.token_to_id(",</w>")
        self._embeddings: dict[str, list[str]] = {}
        self._groups: dict[int, list[int]] = {}
        for token, vectors in (embeddings or {}).items():
            tokens = [token, *(f"{token}_{i}" for i in range(1, vectors))]
            ids = [self._id(t, "embedding", folder) for t in tokens]
            self._embeddings[token], self._groups[ids[0]] = tokens, ids
        self.empty = self._framed([])

    def encode(self, text: str) -> tuple[npt.NDArray[np.int64], str]:
        """Ids as `CLIPTokenizer(text, padding="max_length", truncation=True)` gives them, and what did not fit.

        The word of an embedding with several vectors stands for all of them, as in diffusers' pipelines
        (`TextualInversionLoaderMixin.maybe_convert_prompt`).

        Args:
            text: the prompt, of any length.

        Returns:
            ids: int64 [model_max_length], start token, text, end token, padding.
            dropped: the text beyond, as the tokens spell it (lower case, spaces between words); empty if all fitted.

        Raises:
            UserError: the text is not valid Unicode (it holds half a surrogate pair).
        """
        ids = self._ids(self._converted(text))
        room = self.model_max_length - 2
        dropped = str(self._tokenizer.decode(ids[room:], skip_special_tokens=False)) if len(ids) > room else ""
        return self._framed(ids[:room]), dropped.replace("</w>", " ").strip()

    def encode_long(self, text: str) -> npt.NDArray[np.int64]:
        """All of a prompt, in as many chunks as it takes, divided as AUTOMATIC1111's web UI divides it.

        (`modules/sd_hijack_clip.py`, `tokenize_line`.) A chunk holds 75 tokens; one that is full ends at its last comma
        if that is among its last 20 tokens, and what follows the comma goes into the next. `BREAK` begins a new chunk.
        An embedding's vectors stay together. Emphasis, `(word:1.2)`, is not read: brackets and numbers are text
        here, as they are to diffusers.

        Returns:
            int64 [chunks, model_max_length], at least one; each with its own start, end and padding. The text
            encoder reads them one by one, and the UNet the embeddings of all in a row.

        Raises:
            UserError: as `encode`.
        """
        chunks: list[list[int]] = []
        for part in _BREAK.split(self._converted(text)):
            chunks += self._chunks(self._ids(part))
        if len(chunks) > 1 and not chunks[-1]:
            chunks.pop()  # nothing follows the last BREAK
        return np.stack([self._framed(chunk) for chunk in chunks])

    def _converted(self, text: str) -> str:
        """The prompt with every embedding of several vectors written out: "cat" becomes "cat cat_1 …"."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode at character {error.start}: retype it there") from None
        if self._embeddings:
            found = set(self._tokenizer.encode(text, add_special_tokens=False).tokens)
            for token, tokens in self._embeddings.items():
                if token in found:
                    text = text.replace(token, " ".join(tokens))
        return text

    def _ids(self, text: str) -> list[int]:
        """Without start and end."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _chunks(self, ids: list[int]) -> list[list[int]]:
        """Divided into one or more; all but the last are followed by more."""
        room = self.model_max_length - 2
        chunks: list[list[int]] = [[]]
        for group in self._grouped(ids):
            chunk = chunks[-1]
            near = chunk[-COMMA_PADDING_BACKTRACK:]
            if len(chunk) == room and self._comma in near and group != [self._comma]:
                end = room - near[::-1].index(self._comma)
                chunks[-1:] = [chunk[:end], chunk[end:]]
            if len(chunks[-1]) + len(group) > room:
                chunks.append([])
            chunks[-1].extend(group)
        return chunks

    def _grouped(self, ids: list[int]) -> Iterator[list[int]]:
        """One by one, but the vectors of an embedding together."""
        position = 0
        while position < len(ids):
            group = self._groups.get(ids[position], ids[position : position + 1])
            # In other letters than its own an embedding's word stands for its first vector only, as in diffusers.
            if ids[position : position + len(group)] != group:
                group = ids[position : position + 1]
            yield group
            position += len(group)

    def _framed(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        padding = self.model_max_length - 2 - len(ids)
        return np.array([self._start, *ids, self._end, *[self._pad] * padding], np.int64)

    def _id(self, token: str, what: str, folder: Path) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"{what} {token!r} is not in {folder / 'tokenizer.json'}: export the bundle anew")
        return found


def prompt_ids(
    tokenizer: Tokenizer, prompts: Sequence[str], long_prompt: bool, notes: list[str]
) -> tuple[npt.NDArray[np.int64], int]:
    """The ids of several prompts, int64 [prompts, chunks, length], and the number of chunks.

    Args:
        long_prompt: all of every prompt is read, the shorter ones filled up with empty chunks; else each is cut off
            after one chunk, and a note says so.
    """
    if long_prompt:
        read = [tokenizer.encode_long(prompt) for prompt in prompts]
        chunks = max(map(len, read))
        return np.stack([np.stack([*ids, *[tokenizer.empty] * (chunks - len(ids))]) for ids in read]), chunks
    rows = []
    for prompt in prompts:
        ids, dropped = tokenizer.encode(prompt)
        if dropped:
            notes.append(
                f"the prompt is longer than {len(ids)} tokens; dropped: {dropped!r} (--long-prompt reads all of it)"
            )
        rows.append(ids)
    return np.stack(rows)[:, None], 1


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: export the bundle anew") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}): export the bundle anew") from None
    if not isinstance(config, dict):
        raise BundleError(f"{path} does not hold a JSON object: export the bundle anew")
    return config


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise BundleError(f"{path} is missing: export the bundle anew")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise BundleError(f"{path} is not a tokenizer ({error}): export the bundle anew") from None
