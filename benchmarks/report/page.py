"""A document as one HTML page that needs nothing else."""

from pathlib import Path

from ...errors import CnppError
from ...install import REPORT_MODULES, cannot_import
from .document import Document
from .figures import themed

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(document: Document) -> str:
    """The document as HTML.

    Raises:
        CnppError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as e:
        raise CnppError(cannot_import("a report", e, *REPORT_MODULES)) from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # The figures' own text was escaped when they were drawn.
    environment.filters["themed"] = lambda svg: Markup(themed(svg))
    environment.filters["percent"] = lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}%"
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(document=document)
