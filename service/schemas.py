"""What the OpenAPI document says of bodies: made from the records that read them."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..schema import Record

_PREFIX = "#/components/schemas/{name}"


def json_body(name: str) -> dict[str, Any]:
    """The part of an operation that takes a record of this name as JSON."""
    content = {"application/json": {"schema": {"$ref": _PREFIX.format(name=name)}}}
    return {"requestBody": {"required": True, "content": content}}


def form_body(name: str) -> dict[str, Any]:
    """The part of an operation that takes a form of this name (`components` makes it) as multipart/form-data."""
    content = {"multipart/form-data": {"schema": {"$ref": _PREFIX.format(name=name)}}}
    return {"requestBody": {"required": True, "content": content}}


def components(kinds: Sequence[type[Record]], forms: Mapping[str, tuple[type[Record], str]]) -> dict[str, Any]:
    """The schemas of records by their names, and of forms: a record with a file of this name beside its fields."""
    _, found = msgspec.json.schema_components(kinds, ref_template=_PREFIX)
    for name, (kind, file) in forms.items():
        own = found[kind.__name__]
        binary = {"type": "string", "format": "binary"}
        found[name] = {**own, "title": name, "properties": {file: binary, **own["properties"]}}
    return found
