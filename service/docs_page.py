"""`/docs`: the OpenAPI document as one page, without scripts and without anything from elsewhere."""

from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
code { font-size: .9em }
section { border-top: 1px solid #8886; padding: .5rem 0 }
td { vertical-align: top; padding: .1rem .8rem .1rem 0 }
summary { cursor: pointer }
"""


def docs_page(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document: its operations, and the fields of what they take."""
    title = escape(document["info"]["title"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title} {escape(document['info']['version'])}</h1>",
        f"<p>{escape(document['info'].get('description', ''))} As JSON: <a href='openapi.json'>openapi.json</a>.</p>",
    ]
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["Other"])[0]
            groups.setdefault(tag, []).append(_operation(method, path, operation))
    for tag, found in groups.items():
        parts += [f"<h2>{escape(tag)}</h2>", *found]
    parts.append("<h2>Bodies</h2>")
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        if "properties" in schema:
            parts.append(_schema(name, schema))
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    takes = ""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        takes += f" Takes <a href='#{escape(name)}'>{escape(name)}</a> as <code>{escape(kind)}</code>."
    text = escape(operation.get("description", ""))
    return f"<section><code><b>{method.upper()}</b> {escape(path)}</code><br>{text}{takes}</section>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' (needed)' if field in required else ''}</td>"
        f"<td>{escape(_kind(kind))}</td></tr>"
        for field, kind in schema["properties"].items()
    )
    text = escape(schema.get("description", ""))
    return (
        f"<section id='{escape(name)}'><details><summary><b>{escape(name)}</b></summary><p>{text}</p>"
        f"<table>{rows}</table></details></section>"
    )


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("format") or schema.get("type", "anything"))
