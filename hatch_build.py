"""Hooks of the build: an editable install that type checkers and editors can follow, and links of a package's page."""

import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

FOLDER = ".editable"
"""As in pyproject.toml, `dev-mode-dirs`."""


class EditableLink(BuildHookInterface):  # type: ignore[type-arg]
    """The repository's root is the package, whatever the folder of the checkout is called: the link has its name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        folder = Path(self.root) / FOLDER
        folder.mkdir(exist_ok=True)
        link = folder / "cnpp_trt"
        if not link.is_symlink():
            link.symlink_to("..", target_is_directory=True)


class Links(MetadataHookInterface):
    """README's links made absolute, and the project's, where the checkout says which repository it is a clone of."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text("utf-8")
        address = repository(self.root)
        if address:
            metadata["urls"] = {
                "Source": address,
                "Changelog": f"{address}/blob/main/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
            text = absolute(text, address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def repository(root: str) -> str | None:
    """The web address of `origin`; None in a folder without one, or where it is a folder itself."""
    line = ["git", "-C", root, "config", "--get", "remote.origin.url"]
    try:
        origin = subprocess.run(line, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return None
    found = re.fullmatch(r"(?:https://(?:[^@/]+@)?|ssh://git@|git@)([\w.-]+)[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?", origin)
    return f"https://{found[1]}/{found[2]}" if found else None


def absolute(text: str, address: str) -> str:
    """Markdown whose relative links and images lead into the repository at `address`."""

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match[1] == "!" else "blob"
        return f"{match[1]}[{match[2]}]({address}/{kind}/main/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", link, text)
