"""A bundle from an address of fsspec (s3://, gs://, hf://, https://, …): fetched once for a machine, and verified.

What is fetched lies under CNPP_TRT_HOME, named by the bundle's digest, and is a bundle like any other.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BundleError, CnppError, UserError
from ..files import exclusive, new_partial_folder, partial_folders, remove_folder
from ..install import cannot_import
from ..messages import one_line, printable
from ..places import MANIFEST, home
from ..schema import SchemaError
from .bundle import Bundle
from .manifest import MAX_BYTES, FileRecord, FormatMismatch, Manifest

_PART = 1 << 20  # bytes read at once


def is_address(text: str) -> bool:
    """Whether it names a place that is fetched from, and no folder."""
    return bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text))


def fetch_bundle(address: str, digest: str | None = None) -> Path:
    """The folder of a bundle that was fetched, now or before.

    Processes that want the same one wait for the first of them.

    Args:
        address: of the bundle's folder.
        digest: that the bundle must have; None takes whichever is there.

    Raises:
        UserError: the address cannot be used, or the disk is full.
        BundleError: there is no bundle, it is another one, or a file is not what its manifest says.
        CnppError: fsspec is not installed, or the connection fails.
    """
    try:
        import fsspec
    except ImportError as e:
        raise CnppError(cannot_import("a bundle's address", e, "fsspec")) from None
    known = None if digest is None else _folder(digest)
    if known is not None and known.is_dir():
        return known
    try:
        files, root = fsspec.core.url_to_fs(address)
    except ImportError as e:  # the package of this kind of address
        raise UserError(f"cannot fetch {printable(address)}: {one_line(e)}") from None
    except Exception as e:  # whatever libraries of file systems raise
        raise UserError(f"cannot read {printable(address)} as an address: {one_line(e)}") from None
    content = _read(files, root, address)
    try:
        manifest = Manifest.loads(content)
    except (SchemaError, FormatMismatch) as e:
        raise BundleError(f"{printable(address)} has a {MANIFEST} that cannot be read: {one_line(e)}") from None
    if digest not in (None, manifest.digest):
        raise BundleError(
            f"{printable(address)} is another bundle than the job's: its digest is {manifest.digest[:16]}"
        )
    folder = _folder(manifest.digest)
    with exclusive(folder.with_name(f".{folder.name}.lock"), folder, option="CNPP_TRT_HOME"):
        for left in partial_folders(folder):
            remove_folder(left)
        if not folder.is_dir():
            partial = new_partial_folder(folder)
            try:
                for name, entry in manifest.files.items():
                    _fetch(files, root, name, entry, partial / name, address)
                (partial / MANIFEST).write_bytes(content)
                Bundle.open(partial)
                partial.rename(folder)
            finally:
                remove_folder(partial)
    return folder


def _folder(digest: str) -> Path:
    return home() / "fetched" / digest[:32]


def _read(files: Any, root: str, address: str) -> bytes:
    """The manifest's bytes."""
    content = b""
    for part in _parts(files, f"{root}/{MANIFEST}", address, MAX_BYTES):
        content += part
    if len(content) > MAX_BYTES:
        raise BundleError(f"{printable(address)} has a {MANIFEST} of more than {MAX_BYTES >> 20} MiB")
    return content


def _fetch(files: Any, root: str, name: str, entry: FileRecord, target: Path, address: str) -> None:
    """Writes a file.

    Raises:
        BundleError: its content is not what the manifest says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as copy:
        for part in _parts(files, f"{root}/{name}", address, entry["size"]):
            size += len(part)
            digest.update(part)
            copy.write(part)
    if size != entry["size"] or digest.hexdigest() != entry["sha256"]:
        raise BundleError(f"{printable(address)} is damaged: {name} is not what its manifest says")


def _parts(files: Any, path: str, address: str, limit: int) -> Iterator[bytes]:
    """A file's bytes in parts, up to the part in which it becomes longer than `limit`."""
    size = 0
    try:
        with files.open(path, "rb") as file:
            while size <= limit and (part := file.read(_PART)):
                size += len(part)
                yield part
    except FileNotFoundError:
        name = path.rpartition("/")[2]
        raise BundleError(f"{printable(address)} is no whole bundle: it has no {printable(name)}") from None
    except Exception as e:  # whatever libraries of file systems raise
        raise CnppError(f"cannot fetch {printable(address)}: {one_line(e)}") from None
