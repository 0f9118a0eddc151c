"""A tokenizer's files in a bundle, as transformers' `CLIPTokenizer.save_pretrained` writes them, checked."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tokenizers

from ...errors import BundleError
from ...messages import one_line, printable
from ...schema import Meta, SchemaError, decode, read_bounded

CLIP_LENGTH = 77
"""Positions of every CLIP text encoder in Stable Diffusion 1.x and 2.x."""

MAX_BYTES = 32 << 20
"""Real ones have some 2.5 MB."""

MAX_TOKENS = 1 << 20

_Id = Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]
_Token = Annotated[str, Meta(max_length=1000)]


class _Content(msgspec.Struct):
    """A token as an object: `AddedToken`."""

    content: _Token


class _Config(msgspec.Struct):
    """What is read of tokenizer_config.json; other keys say how transformers loads it."""

    pad_token: _Token | _Content | None = None
    model_max_length: int | float | None = None


class _Model(msgspec.Struct):
    """The byte pair encoding. With dropout it would draw anew at every call."""

    type: str
    vocab: Annotated[dict[str, _Id], Meta(min_length=1)]
    merges: Annotated[list[Any], Meta(max_length=MAX_TOKENS)]
    dropout: None = None


class _Added(msgspec.Struct):
    id: _Id
    content: _Token


class _Tokenizer(msgspec.Struct):
    """What is checked of tokenizer.json before the library reads it; the rest the library checks."""

    model: _Model
    added_tokens: list[_Added] = msgspec.field(default_factory=list)
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


@dataclass(frozen=True)
class Config:
    """What a prompt is padded with, and to how many ids."""

    pad_token: str
    model_max_length: int


def read_config(path: Path) -> Config:
    """Of `tokenizer_config.json`.

    Raises:
        BundleError: the message says what is wrong and what to do.
    """
    try:
        # transformers may write a number that JSON has not; none of those that are read here.
        config = decode(_content(path), _Config)
    except SchemaError as error:
        raise BundleError(f"{path} cannot be read ({error}): export the bundle anew") from None
    pad = config.pad_token.content if isinstance(config.pad_token, _Content) else config.pad_token
    length = CLIP_LENGTH if config.model_max_length is None else config.model_max_length
    if length <= 2:
        raise BundleError(f"{path} leaves no room for a prompt (model_max_length {length}): export the bundle anew")
    # transformers writes 10**30 for "no limit", as a float or an int: the text encoder has one nevertheless.
    return Config(pad or "<|endoftext|>", int(length) if length < 10**6 else CLIP_LENGTH)


def read_tokenizer(path: Path, vocabulary: int | None = None) -> tokenizers.Tokenizer:
    """Of `tokenizer.json`, without the length and padding that it was last called with.

    Args:
        vocabulary: rows of the text encoder's table, which every id must be below; None if that is not known.

    Raises:
        BundleError: the message says what is wrong and what to do.
    """
    content = _content(path)
    try:
        found = decode(content, _Tokenizer)
        if found.model.type != "BPE":
            raise SchemaError(f"its model is {printable(found.model.type, 40)}, not BPE")
        _check_patterns([found.normalizer, found.pre_tokenizer, found.post_processor, found.decoder])
    except SchemaError as error:
        raise BundleError(f"{path} is not a tokenizer ({error}): export the bundle anew") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The library gives added tokens ids of its own where those in the file do not follow the vocabulary's.
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        highest = max(*found.model.vocab.values(), *added.values(), *tokenizer.encode("").ids, 0)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises Exception itself, and Rust panics are no Exception
        raise BundleError(f"{path} is not a tokenizer ({one_line(error)}): export the bundle anew") from None
    if moved := [token.content for token in found.added_tokens if added.get(token.content) != token.id]:
        raise BundleError(f"{path} has no such id for {printable(repr(moved[0]), 60)}: export the bundle anew")
    if vocabulary is not None and highest >= vocabulary:
        raise BundleError(
            f"{path} has the id {highest}, but the text encoder knows {vocabulary} tokens: export the bundle anew"
        )
    return tokenizer


def _content(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: export the bundle anew") from None
    except (OSError, SchemaError) as error:
        raise BundleError(f"{path} cannot be read ({one_line(error)}): export the bundle anew") from None


# A repeated group, `(a*)*`, can take the library's regular expressions exponential time; CLIP's have none.
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+?{]")
_MAX_PATTERN = 10_000


def _check_patterns(value: Any) -> None:
    """Checks that regular expressions in the tokenizer's steps are of CLIP's simple kind.

    Raises:
        SchemaError: one is not.
    """
    if isinstance(value, dict):
        pattern = value.get("Regex")
        if isinstance(pattern, str) and (len(pattern) > _MAX_PATTERN or _REPEATED_GROUP.search(pattern)):
            raise SchemaError(f"its pattern {printable(repr(pattern), 60)} is not one of CLIP's")
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        _check_patterns(part)
