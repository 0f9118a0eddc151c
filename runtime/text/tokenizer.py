"""CLIP's tokenizer through the `tokenizers` library alone: prompt → token ids, as diffusers' pipelines ask for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import BundleError, UserError
from ...messages import one_line, printable
from .emphasis import parse, split_at_breaks
from .tokenizer_files import read_config, read_tokenizer

COMMA_PADDING_BACKTRACK = 20
"""How many tokens before a full chunk's end AUTOMATIC1111's web UI looks for a comma to end it at (its default)."""

T = TypeVar("T")
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Tokens that stay together, with their weight: one, or all vectors of an embedding."""

    ids: tuple[int, ...]
    weight: float


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt as the text encoder reads it.

    Attributes:
        ids: int64 [chunks, model_max_length], each chunk with its own start, end and padding.
        weights: float32 [chunks, model_max_length], of emphasis; 1 where there is none.
        dropped: the text that did not fit, as the tokens spell it (lower case, spaces between words); empty if all did.
        embeddings: the textual inversions' words in the prompt, each once.
    """

    ids: Ids
    weights: npt.NDArray[np.float32]
    dropped: str
    embeddings: tuple[str, ...]


class Tokenizer:
    """The tokenizer that transformers' `CLIPTokenizer.save_pretrained` wrote.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.
        embeddings: the textual inversions' words that were added to it, with the number of their vectors.
        vocabulary: rows of the text encoder's table, which every id must be below; None if that is not known.

    Attributes:
        model_max_length: ids per prompt, 77 unless tokenizer_config.json gives another length.
        embeddings: the number of vectors of each word.
        empty: int64 [model_max_length], the ids of no prompt.

    Raises:
        BundleError: a file is missing or cannot be read as what it should be.
    """

    def __init__(
        self, folder: Path, embeddings: Mapping[str, int] | None = None, vocabulary: int | None = None
    ) -> None:
        self._file = folder / "tokenizer.json"
        config = read_config(folder / "tokenizer_config.json")
        self._tokenizer = read_tokenizer(self._file, vocabulary)
        self.model_max_length = config.model_max_length
        self._pad = self._id(config.pad_token, "pad token")
        frame = self._ask(lambda: self._tokenizer.encode("").ids)
        if len(frame) != 2:
            raise BundleError(f"{self._file} adds no start and end to a prompt: export the bundle anew")
        self._start, self._end = frame
        self._comma = self._tokenizer.token_to_id(",</w>")
        self.embeddings = dict(embeddings or {})
        self._words: dict[int, tuple[str, tuple[int, ...]]] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        for word, vectors in self.embeddings.items():
            if not 1 <= vectors <= self.model_max_length - 2:
                raise BundleError(f"{printable(repr(word))} has {vectors} vectors: export the bundle anew")
            ids = tuple(self._id(t, "embedding") for t in vector_tokens(word, vectors))
            if not added.keys() >= {*ids}:
                raise BundleError(f"{self._file} knows {printable(repr(word))} as no embedding: export the bundle anew")
            self._words[ids[0]] = word, ids
        self.empty = self._framed([])

    def read(self, text: str, *, long: bool = False, weighted: bool = False) -> Reading:
        """A prompt's tokens.

        An embedding's word stands for all of its vectors, wherever the tokenizer finds it: the first one in the text
        and of those the longest, in letters of either case. So `bad_prompt` is not found in `bad_prompt_version2` where
        both are embeddings. diffusers (`TextualInversionLoaderMixin.maybe_convert_prompt`) replaces text instead, which
        gives the same ids where no word is part of another or of a vector's name, and letters are the word's own.

        Args:
            text: the prompt, of any length.
            long: all of it is read, divided as AUTOMATIC1111's web UI divides it (`tokenize_line` in
                `modules/sd_hijack_clip.py`): a chunk holds 75 tokens; one that is full ends at its last comma if that
                is among its last 20 tokens, and what follows the comma goes into the next. `BREAK` begins a new chunk.
                An embedding's vectors stay together. Else it is cut off after one chunk.
            weighted: emphasis, `(word:1.4)`, is read; else brackets and numbers are text, as they are to diffusers.

        Raises:
            UserError: the text is not valid Unicode (it holds half a surrogate pair), or its emphasis cannot be read.
            BundleError: the tokenizer fails on it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode at character {error.start}: retype it there") from None
        if weighted:
            parts = parse(text, breaks=long)
        else:
            parts = [[(part, 1.0)] for part in (split_at_breaks(text) if long else [text])]
        used: dict[str, None] = {}
        groups = [self._groups(part, used) for part in parts]
        dropped = ""
        if long:
            chunks = [chunk for part in groups for chunk in self._chunks(part)]
            if len(chunks) > 1 and not chunks[-1]:
                chunks.pop()  # nothing follows the last BREAK
        else:
            tokens = [(i, g.weight) for part in groups for g in part for i in g.ids]
            room = self.model_max_length - 2
            chunks = [tokens[:room]]
            if beyond := [i for i, _ in tokens[room:]]:
                dropped = str(self._ask(lambda: self._tokenizer.decode(beyond, skip_special_tokens=False)))
        return Reading(
            ids=np.stack([self._framed([i for i, _ in chunk]) for chunk in chunks]),
            weights=np.stack([self._weights([w for _, w in chunk]) for chunk in chunks]),
            dropped=dropped.replace("</w>", " ").strip(),
            embeddings=tuple(used),
        )

    def encode(self, text: str) -> tuple[Ids, str]:
        """Ids as `CLIPTokenizer(text, padding="max_length", truncation=True)` gives them, and what did not fit.

        Returns:
            ids: int64 [model_max_length].
            dropped: as `Reading.dropped`.

        Raises:
            UserError, BundleError: as `read`.
        """
        reading = self.read(text)
        return reading.ids[0], reading.dropped

    def encode_long(self, text: str) -> Ids:
        """All of a prompt, int64 [chunks, model_max_length], at least one.

        Raises:
            UserError, BundleError: as `read`.
        """
        return self.read(text, long=True).ids

    def _groups(self, part: Iterable[tuple[str, float]], used: dict[str, None]) -> list[Group]:
        """The tokens of texts with their weights; the words of embeddings that they hold are noted in `used`."""
        groups = []
        for text, weight in part:
            for i in self._ids(text):
                word, ids = self._words.get(i, ("", (i,)))
                if word:
                    used[word] = None
                groups.append(Group(ids, weight))
        return groups

    def _ids(self, text: str) -> list[int]:
        """Without start and end, an embedding's word as its first vector."""
        ids: list[int] = self._ask(lambda: self._tokenizer.encode(text, add_special_tokens=False).ids)
        return ids

    def _chunks(self, groups: Iterable[Group]) -> list[list[tuple[int, float]]]:
        """Ids and weights divided into one or more chunks; all but the last are followed by more."""
        room = self.model_max_length - 2
        chunks: list[list[tuple[int, float]]] = [[]]
        for group in groups:
            chunk = chunks[-1]
            if len(chunk) == room and group.ids != (self._comma,):
                near = [i for i, _ in chunk[-COMMA_PADDING_BACKTRACK:]]
                if self._comma in near:
                    end = room - near[::-1].index(self._comma)
                    chunks[-1:] = [chunk[:end], chunk[end:]]
            if len(chunks[-1]) + len(group.ids) > room:
                chunks.append([])
            chunks[-1].extend((i, group.weight) for i in group.ids)
        return chunks

    def _framed(self, ids: Sequence[int]) -> Ids:
        return np.array([self._start, *ids, self._end, *[self._pad] * (self.model_max_length - 2 - len(ids))], np.int64)

    def _weights(self, weights: Sequence[float]) -> npt.NDArray[np.float32]:
        """Start, end and padding have weight 1."""
        framed = np.ones(self.model_max_length, np.float32)
        framed[1 : 1 + len(weights)] = weights
        return framed

    def _id(self, token: str, what: str) -> int:
        found: int | None = self._ask(lambda: self._tokenizer.token_to_id(token))
        if found is None:
            raise BundleError(f"{what} {printable(repr(token))} is not in {self._file}: export the bundle anew")
        return found

    def _ask(self, question: Callable[[], T]) -> T:
        """What the library answers. Where its file is damaged it raises anything, a Rust panic included."""
        try:
            return question()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise BundleError(
                f"{self._file} does not work as a tokenizer ({one_line(error)}): export the bundle anew"
            ) from None


def vector_tokens(word: str, vectors: int) -> list[str]:
    """What the tokenizer calls an embedding's vectors, as diffusers has it: `word`, `word_1` and so on."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]
