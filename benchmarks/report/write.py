"""A document on disk."""

from pathlib import Path

from ...errors import UserError
from ...files import replace_file
from ...messages import printable
from ...places import results
from .document import Document
from .markdown import write_markdown
from .page import write_page


def write_document(document: Document, out: Path | None, name: str) -> tuple[Path, Path]:
    """DIR/NAME.html and DIR/NAME.md, with the latter's figures in DIR/figures; replaces those that are there.

    Args:
        document: to write.
        out: DIR; None for the default one.
        name: NAME.

    Raises:
        UserError: DIR cannot be written.
    """
    folder = results() / "report" if out is None else out
    page = write_page(document)
    text, files = write_markdown(document)
    html, markdown = folder / f"{name}.html", folder / f"{name}.md"
    for path, content in files.items():
        write_whole(folder / path, content)
    write_whole(markdown, text.encode(errors="replace"))
    write_whole(html, page.encode(errors="replace"))
    return html, markdown


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file, or leaves it as it was.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as e:
        raise UserError(f"cannot write {printable(path)}: {e.strerror or e}") from None
