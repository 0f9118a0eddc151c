"""Which files of a folder are a module's weights, as diffusers and transformers choose them.

A folder may hold several sets at once: another variant's, pickles beside safetensors, the shards of an earlier save.
Where there is an index (`<stem>.safetensors.index.json`), it alone says which files belong together.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import UserError
from ..messages import printable
from ..schema import Meta, SchemaError, convert, read_object

Library = Literal["diffusers", "transformers"]

# The endings of files of weights, the safe format first.
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pth", ".pt")
# What the two libraries call a module's weights; the names of the other one follow.
_STEMS: dict[Library, tuple[str, ...]] = {
    "diffusers": ("diffusion_pytorch_model", "model", "pytorch_model"),
    "transformers": ("model", "pytorch_model", "diffusion_pytorch_model"),
}
_MAX_SHARDS = 10_000
_WEIGHT_MAP: Any = Annotated[dict[str, Annotated[str, Meta(min_length=1, max_length=255)]], Meta(min_length=1)]


@dataclass(frozen=True)
class Chosen:
    """What was found in a folder.

    Attributes:
        index: the file that names the others; None where `names` are the files themselves.
    """

    index: str | None
    names: tuple[str, ...] = ()
    there: frozenset[str] = frozenset()

    def files(self, get: Callable[[str], Path], where: str) -> tuple[str, ...]:
        """The names of the files of weights, sorted.

        Args:
            get: fetches a file of the folder; `where` says for messages which that is.

        Raises:
            UserError: the index is damaged, or names a file that is not there.
        """
        if self.index is None:
            return self.names
        names = read_index(get(self.index))
        if missing := [name for name in names if name not in self.there]:
            listed = ", ".join(printable(name, 80) for name in missing[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(f"{where} lacks {listed}, which its {self.index} names: download it again")
        return names


def choose_weights(names: Collection[str], variant: str | None, library: Library) -> Chosen | None:
    """The weights among a folder's files; None where there are none of this variant.

    diffusers looks for an index before a whole file, transformers for a whole file before an index
    (`_fetch_index_file` in diffusers/models/model_loading_utils.py, `_get_resolved_checkpoint_files` in
    transformers/modeling_utils.py). Shards without an index are taken where they are one complete set and no whole
    file is there, which neither library does.

    Raises:
        UserError: shards are missing, or of two sets.
    """
    there = frozenset(names)
    for suffix in SUFFIXES[:2]:
        for stem in _STEMS[library]:
            whole = f"{stem}.{variant}{suffix}" if variant else f"{stem}{suffix}"
            indexes = [index for index in _index_names(stem, suffix, variant) if index in there]
            found = [Chosen(index, there=there) for index in indexes[:1]]
            if whole in there:
                found.insert(0 if library == "transformers" else len(found), Chosen(None, (whole,)))
            if found:
                return found[0]
            if shards := _one_set(there, stem, suffix, variant):
                return Chosen(None, shards)
    return None


def variants_of(names: Collection[str]) -> set[str]:
    """The variants that a folder has weights of."""
    stems = "|".join(_STEMS["diffusers"])
    shard = r"(?:-\d{5}-of-\d{5})?"
    pattern = re.compile(rf"(?:{stems}){shard}\.([\w-]+?){shard}\.(?:safetensors|bin)")
    found = (pattern.fullmatch(name) for name in names)
    return {match[1] for match in found if match}


def read_index(file: Path) -> tuple[str, ...]:
    """The files that an index of shards names, sorted.

    Raises:
        UserError: it is damaged, or a file is not in the index's own folder.
    """
    try:
        weight_map: dict[str, str] = convert(read_object(file).get("weight_map"), _WEIGHT_MAP)
    except SchemaError as e:
        raise UserError(f"the weight_map of {printable(file)} is damaged ({e}): download it again") from None
    names = sorted(set(weight_map.values()))
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise UserError(
                f"{printable(file)} names {printable(repr(name), 80)}, which is no file of its folder: do not use it"
            )
        if not name.endswith(SUFFIXES):
            raise UserError(f"{printable(file)} names {printable(repr(name), 80)}, which is no file of weights")
    return tuple(names)


def _index_names(stem: str, suffix: str, variant: str | None) -> tuple[str, ...]:
    """What an index may be called: today's spelling, the one before it, and that of single files."""
    if not variant:
        return (f"{stem}{suffix}.index.json",)
    return (
        f"{stem}{suffix}.index.{variant}.json",
        f"{stem}{suffix}.{variant}.index.json",
        f"{stem}.{variant}{suffix}.index.json",
    )


def _one_set(there: Collection[str], stem: str, suffix: str, variant: str | None) -> tuple[str, ...]:
    """The shards that are there, sorted; empty where there are none.

    Raises:
        UserError: one is missing, or they are of several sets.
    """
    before, after = (re.escape(f".{variant}") if variant else "", re.escape(suffix))
    # Variants have two spellings: model.fp16-00001-of-00002.bin and, before, model-00001-of-00002.fp16.bin.
    spellings = {rf"{stem}{before}-(\d{{5}})-of-(\d{{5}}){after}", rf"{stem}-(\d{{5}})-of-(\d{{5}}){before}{after}"}
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for spelling in sorted(spellings):
        pattern = re.compile(spelling)
        for name in there:
            if match := pattern.fullmatch(name):
                sets.setdefault((spelling, int(match[2])), {})[int(match[1])] = name
    if not sets:
        return ()
    if len(sets) > 1:
        examples = " and ".join(sorted(min(found.values()) for found in sets.values()))
        raise UserError(
            f"there are shards of {len(sets)} sets ({examples}) and no {stem}{suffix}.index.json that says which "
            "belong together: delete those of the older save"
        )
    ((_, count), found) = sets.popitem()
    wanted = range(1, min(count, _MAX_SHARDS) + 1)
    if missing := [number for number in wanted if number not in found]:
        some = found[min(found)].replace(f"{min(found):05d}-of", f"{missing[0]:05d}-of")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"shards are missing: there is no {some}{more}; download it again")
    if len(found) != count:
        raise UserError(
            f"there are {len(found)} shards of {count}, {min(found.values())} among them: download it again"
        )
    return tuple(found[number] for number in sorted(found))
