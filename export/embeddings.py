"""Textual inversion (arXiv 2208.01618): learned vectors, put into tokenizer and text encoder under a new word."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..messages import printable, some
from .weights import check_finite, read_pickle, read_weights, require_plain

MAX_VECTORS = 75
"""What a prompt of CLIP's 77 tokens holds between its start and end."""
MAX_WORD = 200
"""Characters of an embedding's word."""


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors, float [n,D].

    Attributes:
        named_by: where the word is from, for messages.
    """

    token: str
    vectors: Tensor
    named_by: str = "the command"

    @property
    def tokens(self) -> list[str]:
        """What the tokenizer calls the vectors, as diffusers has it: `token`, `token_1` and so on."""
        return [self.token, *(f"{self.token}_{i}" for i in range(1, len(self.vectors)))]


def read_embedding(file: Path, token: str | None = None) -> Embedding:
    """The vectors in a textual inversion file and the word for them.

    Read are diffusers' `learned_embeds.safetensors` and `.bin` ({word: vectors}), AUTOMATIC1111's `.pt`
    (`string_to_param`), and `.safetensors` with `emb_params`.

    Args:
        token: the word; None takes the one in the file, or the file's name without its suffix.

    Raises:
        UserError: the file cannot be read, holds something else, or too many vectors.
    """
    content: dict[str, Any] = dict(read_weights([file])) if file.suffix == ".safetensors" else _unpickle(file)
    if {"clip_l", "clip_g"} & content.keys():
        raise UserError(
            f"{printable(file)} is an embedding for SDXL or SD 3 ({some(map(str, content))}): only SD 1.x's can be used"
        )
    name: Any = None
    if isinstance(parameters := content.get("string_to_param"), dict):
        vectors, name = next(iter(parameters.values()), None), content.get("name")
    elif "emb_params" in content:
        vectors = content["emb_params"]
    elif len(content) == 1:
        name, vectors = next(iter(content.items()))
    else:
        vectors = None
    fits = isinstance(vectors, Tensor) and vectors.ndim in (1, 2) and vectors.is_floating_point()
    if not isinstance(vectors, Tensor) or not fits or not vectors.numel():
        raise UserError(f"{printable(file)} is no textual inversion embedding: it should hold the vectors of one word")
    require_plain(vectors, "its vectors", file)
    vectors = vectors.detach().reshape(-1, vectors.shape[-1])
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise UserError(f"{printable(file)} holds {len(vectors)} vectors: a prompt has room for {MAX_VECTORS}")
    check_finite({"its vectors": vectors}, f"the embedding {printable(file)}")
    if token:
        word, named_by = token, "the command"
    elif isinstance(name, str) and name:
        word, named_by = name, f"inside {printable(file)}"
    else:
        word, named_by = file.stem, f"the name of {printable(file)}"
    if word.split() != [word] or not word.isprintable() or len(word) > MAX_WORD:
        shown = printable(repr(word), 80)
        raise UserError(
            f"{printable(file)} is for {shown}, which is not one word: write SOURCE:word to give it another"
        )
    return Embedding(word, vectors, named_by)


def check_width(embeddings: Sequence[Embedding], width: int) -> None:
    """Checks that embeddings are for a text encoder of this width.

    Raises:
        UserError: the vectors of an embedding have another width.
    """
    for embedding in embeddings:
        if embedding.vectors.shape[1] != width:
            raise UserError(
                f"the embedding {embedding.token!r} has vectors of width {embedding.vectors.shape[1]}, this text "
                f"encoder's are {width} wide: it is for another model (768: SD 1.x; 1024: SD 2)"
            )


def add_tokens(tokenizer: Any, embeddings: Sequence[Embedding]) -> None:
    """Adds the embeddings' tokens to a transformers `CLIPTokenizer`.

    Which ids a prompt has must not depend on the order of the embeddings: two tokens that the tokenizer does not tell
    apart in a text (it makes letters small, and accents part of their letters) are refused.

    Raises:
        UserError: the tokenizer knows a word already, or another embedding has it for a vector.
    """
    vocabulary = tokenizer.get_vocab().keys()
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    owners: dict[str, Embedding] = {}
    for embedding in embeddings:
        if known := vocabulary & {*embedding.tokens}:
            raise UserError(
                f"the tokenizer knows {printable(repr(min(known)))} already: give the embedding "
                f"{printable(repr(embedding.token))} another word, SOURCE:word"
            )
        for token in map(normalize, embedding.tokens):
            if (other := owners.setdefault(token, embedding)) is not embedding:
                first, second = map(printable, sorted(map(repr, (other.token, embedding.token))))
                raise UserError(
                    f"the embeddings {first} and {second} cannot be told apart in a prompt, where both have "
                    f"{printable(repr(token))}: give one of them another word, SOURCE:word"
                )
    for embedding in embeddings:
        tokenizer.add_tokens(embedding.tokens)


def add_embeddings(tokenizer: Any, text_encoder: nn.Module, embeddings: Sequence[Embedding]) -> None:
    """Adds the tokens, and their vectors to the text encoder's table, in its type.

    Args:
        tokenizer: transformers' `CLIPTokenizer`, without the tokens.
        text_encoder: transformers' `CLIPTextModel`.

    Raises:
        UserError: the vectors have another width, or as `add_tokens`.
    """
    table: nn.Embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
    check_width(embeddings, table.embedding_dim)
    add_tokens(tokenizer, embeddings)
    old = table.weight
    # A table may have more rows than the tokenizer has words.
    weight = torch.zeros(max(len(tokenizer), len(old)), table.embedding_dim, dtype=old.dtype)
    weight[: len(old)] = old.data
    for embedding in embeddings:
        weight[tokenizer.convert_tokens_to_ids(embedding.tokens)] = embedding.vectors.to(old.dtype)
    table.weight = nn.Parameter(weight, requires_grad=False)
    table.num_embeddings = len(weight)
    text_encoder.config.vocab_size = len(weight)  # type: ignore[union-attr]


def _unpickle(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"there is no {printable(file)}: check the path, or download it again")
    # What the first files of the method's authors keep their vectors in.
    with torch.serialization.safe_globals([nn.ParameterDict]):
        content = read_pickle(file)
    if not isinstance(content, dict):
        raise UserError(f"{printable(file)} is no textual inversion embedding: it should hold the vectors of one word")
    parameters = content.get("string_to_param")
    return {**content, "string_to_param": dict(parameters)} if isinstance(parameters, nn.ParameterDict) else content
