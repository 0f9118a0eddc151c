"""Manifests as somebody writes them who knows how their own digest is made."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def signed(content: dict[str, Any]) -> str:
    """The text of a manifest whose digest is right: SHA-256 of the JSON without it and the format, in shortest form."""
    body = {key: value for key, value in content.items() if key not in ("format", "digest")}
    text = json.dumps(body, separators=(",", ":"))
    return json.dumps({**content, "digest": hashlib.sha256(text.encode()).hexdigest()})


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a bundle's manifest says, and its digest with it: what is refused then is what it says."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(signed(content))
