"""What kind of file bytes are, by their first ones: to read a picture, or to name what it is instead.

Signatures are those of the formats' own specifications: ISO/IEC 14496-12 for the boxes that HEIC, AVIF and MP4 share,
15444-1 for JPEG 2000, 18181-2 for JPEG XL.
"""

import re

READ = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
"""Signatures of formats that are read, by their Pillow names. WebP and AVIF have theirs further in."""

_OTHERS = {
    b"\0\0\0\x0cjP  \r\n\x87\n": "a JPEG 2000 file",
    b"\xff\x4f\xff\x51": "a JPEG 2000 file",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL file",
    b"\xff\x0a": "a JPEG XL file",
    b"%PDF": "a PDF file",
    b"%!PS": "a PostScript file",
    b"8BPS": "a Photoshop file",
    b"v/1\x01": "an OpenEXR file",
    b"#?RADIANCE": "a Radiance HDR file",
    b"\0\0\1\0": "an icon file",
    b"FUJIFILMCCD-RAW": "a camera's RAW file",
    b"IIU\0": "a camera's RAW file",
    b"IIRO": "a camera's RAW file",
    b"IIRS": "a camera's RAW file",
    b"MMOR": "a camera's RAW file",
    b"\x1aE\xdf\xa3": "a video",
    b"PK\3\4": "a ZIP archive",
    b"\x93NUMPY": "a NumPy array",
}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_RAW_ENDINGS = (".3fr", ".arw", ".cr2", ".dng", ".erf", ".kdc", ".mos", ".nef", ".nrw", ".pef", ".sr2", ".srw")
_SVG = re.compile(rb"(?:<\?xml|<!--|<!DOCTYPE svg|<svg)", re.IGNORECASE)
_HTML = re.compile(rb"<(?:!doctype html|html)\b", re.IGNORECASE)


def format_of(data: bytes) -> str | None:
    """Pillow's name of the format, where it is one that is read."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if brands(data) & _AVIF_BRANDS:
        return "AVIF"
    return next((kind for signature, kind in READ.items() if data.startswith(signature)), None)


def other_kind(data: bytes, name: str) -> str | None:
    """What the file is, as in `a HEIC file`, where that is known and not read.

    Args:
        name: the file's; cameras' RAW files look like TIFF, and their names tell.
    """
    if data[:4] in (b"II*\0", b"MM\0*"):
        ending = name.lower().rstrip("'\"")
        return "a camera's RAW file" if data[8:10] == b"CR" or ending.endswith(_RAW_ENDINGS) else None
    if found := brands(data):
        if found & _AVIF_BRANDS:
            return None
        if found & _HEIC_BRANDS:
            return "a HEIC file"
        return "a camera's RAW file" if b"crx " in found else "a video"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if _SVG.match(start) and b"<svg" in data[:65_536].lower():
        return "an SVG file"
    if _HTML.match(start):
        return "an HTML page"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: the picture itself was not fetched (`git lfs pull`)"
    return next((kind for signature, kind in _OTHERS.items() if data.startswith(signature)), None)


def brands(data: bytes) -> set[bytes]:
    """The brands of an ISO base media file's first box, major one included; none for any other file."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4]), len(data), 256)
    return {data[8:12], *(data[i : i + 4] for i in range(16, end - 3, 4))}


def lossy(data: bytes, kind: str) -> bool:
    """Whether this file's compression alters pixels, which corrupts label maps.

    AVIF's can be lossless, but no encoder's default is, and the file does not say.
    """
    if kind == "WEBP":
        # The first chunk names the codec, or an extended file's later one does.
        return data[12:16] == b"VP8 " or (data[12:16] == b"VP8X" and b"VP8L" not in data)
    return kind in ("JPEG", "AVIF")
