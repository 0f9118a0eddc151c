"""CLIP's tokenizer through the `tokenizers` library alone: prompt → token ids, as diffusers' pipelines ask for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from ..errors import BundleError, UserError

CLIP_LENGTH = 77
"""Positions of every CLIP text encoder in Stable Diffusion 1.x and 2.x."""


class Tokenizer:
    """The tokenizer that transformers' `CLIPTokenizer.save_pretrained` wrote.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.

    Attributes:
        model_max_length: ids per prompt, 77 unless tokenizer_config.json gives another length.

    Raises:
        BundleError: a file is missing or cannot be read as what it should be.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_config(folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        length = config.get("model_max_length", CLIP_LENGTH)
        # transformers writes 10**30 for "no limit", as a float or an int: the text encoder has one nevertheless.
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not 2 < length < 10**6:
            length = CLIP_LENGTH
        self.model_max_length = int(length)
        pad = config.get("pad_token") or "<|endoftext|>"
        pad_token = str(pad["content"] if isinstance(pad, dict) else pad)
        pad_id = self._tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise BundleError(f"pad token {pad_token!r} is not in {folder / 'tokenizer.json'}: export the bundle anew")
        # tokenizer.json keeps whatever length and padding it was last called with: set, not inherited.
        self._tokenizer.enable_truncation(self.model_max_length)
        self._tokenizer.enable_padding(length=self.model_max_length, pad_id=pad_id, pad_token=pad_token)

    def encode(self, text: str) -> tuple[npt.NDArray[np.int64], str]:
        """Ids as `CLIPTokenizer(text, padding="max_length", truncation=True)` gives them, and what did not fit.

        Args:
            text: the prompt, of any length.

        Returns:
            ids: int64 [model_max_length], start token, text, end token, padding.
            dropped: the text beyond, as the tokens spell it (lower case, spaces between words); empty if all fitted.

        Raises:
            UserError: the text is not valid Unicode (it holds half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode at character {error.start}: retype it there") from None
        encoding = self._tokenizer.encode(text)
        # The parts that overflow come framed by start and end tokens, and the last one padded, like the first.
        tail = [
            token
            for part in encoding.overflowing
            for token, special in zip(part.ids, part.special_tokens_mask, strict=True)
            if not special
        ]
        dropped = str(self._tokenizer.decode(tail, skip_special_tokens=False)) if tail else ""
        return np.array(encoding.ids, np.int64), dropped.replace("</w>", " ").strip()


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
