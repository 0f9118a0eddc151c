"""Makes an editable install one that type checkers and editors can follow: a path, instead of an import hook."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

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
