"""A document as Markdown, with its figures as files beside it."""

import base64
import binascii
from collections.abc import Iterator

from ...errors import UserError
from .document import Block, Document, Figure, Picture, Pictures, Section, Text
from .table import Table, code, escape

PNG = b"\x89PNG\r\n\x1a\n"


def write_markdown(document: Document) -> tuple[str, dict[str, bytes]]:
    """The text, and the files it links to by their paths relative to it."""
    files: dict[str, bytes] = {}
    parts = [f"# {escape(document.title)}", escape(document.lead)]
    if document.answers:
        answers = (f"- {escape(a.question)} **{escape(a.figure)}**: {escape(a.line)}" for a in document.answers)
        parts.append("\n".join(answers))
    for section in document.sections:
        parts += _section(section, files)
    return "\n\n".join(parts) + "\n", files


def _section(section: Section, files: dict[str, bytes]) -> Iterator[str]:
    yield f"## {escape(section.title)}"
    if section.lead:
        yield escape(section.lead)
    for block in section.blocks:
        yield from _block(block, files)
    if section.command:
        yield f"Again: {code(section.command)}"


def _block(block: Block, files: dict[str, bytes]) -> Iterator[str]:
    if isinstance(block, Text):
        yield escape(block.text)
    elif isinstance(block, Table):
        if block.title:
            yield f"### {escape(block.title)}"
        yield block.markdown()
    elif isinstance(block, Figure):
        files[path := f"figures/{block.name}.svg"] = block.svg.encode(errors="replace")
        yield f"### {escape(block.title)}"
        yield f"![{escape(block.title)}]({path})"
        yield escape(block.caption)
    elif isinstance(block, Pictures):
        yield f"### {escape(block.title)}"
        yield escape(block.caption)
        for picture in block.pictures:
            files[path := f"figures/{picture.name}.png"] = png_bytes(picture)
            yield f"![{escape(picture.caption)}]({path})\n{escape(picture.caption)}"


def png_bytes(picture: Picture) -> bytes:
    """The bytes of an embedded PNG.

    Raises:
        UserError: it is no PNG in base64.
    """
    try:
        content = base64.b64decode(picture.png, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content.startswith(PNG):
        raise UserError(f"the picture {picture.name} is no PNG in base64: measure again")
    return content
