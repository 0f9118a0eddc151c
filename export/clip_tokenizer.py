"""CLIP's tokenizer from a checkpoint's files."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import UserError
from ..messages import one_line
from ..schema import read_object
from .sources import Source

_OBJECTS = ("vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(place: Source, model: str) -> Any:
    """transformers' `CLIPTokenizer`.

    Args:
        place: the folder of its files.
        model: whose it is, for messages.

    Raises:
        UserError: files are missing or damaged.
    """
    from transformers import CLIPTokenizer

    if not (place.has("vocab.json") and place.has("merges.txt")) and not place.has("tokenizer.json"):
        raise UserError(f"{model} has no tokenizer: there is no {place.uri}/vocab.json and merges.txt")
    folder = place.local((*_OBJECTS, "merges.txt"))
    for name in _OBJECTS:
        if place.has(name):
            read_object(folder / name)  # bounded, which transformers' reading is not
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as e:  # whatever transformers and tokenizers raise, the user needs one line
        raise UserError(f"the tokenizer {place.uri} cannot be used: {one_line(e)}") from e
    # It would be saved with the tokenizer, and says nothing of it: the same export would differ with HF_HUB_OFFLINE.
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def check_tokenizer(tokenizer: Any, rows: int, what: str) -> None:
    """Whether the runtime can read the tokenizer, and the text encoder has a row for every token.

    Args:
        rows: of the text encoder's table.
        what: whose it is, for messages.

    Raises:
        UserError: the tokenizer cannot be read, or has more tokens than the table has rows.
    """
    from ..runtime.text.tokenizer import Tokenizer
    from ..runtime.text.tokenizer_files import CLIP_LENGTH

    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise UserError(f"{what} has the token {largest}, the text encoder {rows} rows: they do not belong together")
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            length = Tokenizer(Path(folder)).model_max_length
        except Exception as e:  # whatever its files make of it
            raise UserError(f"{what} is none of CLIP's: {one_line(e)}") from e
    if length != CLIP_LENGTH:
        raise UserError(f"{what} has the model_max_length {length}: only {CLIP_LENGTH} can be exported")
