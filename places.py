"""Where the commands find and leave their things when nothing else is said.

Bundles and plans are costly and belong to no project: they go to `home()`, whatever the current folder is. What a
command was run for (pictures, results, reports) goes to a folder of the current one.
"""

import os
from pathlib import Path

from .errors import UserError

VARIABLE = "CNPP_TRT_HOME"
MANIFEST = "manifest.json"
"""What makes a folder a bundle."""


def bundle_at(given: str) -> Path | None:
    """The folder that this names, where it holds a bundle; None for the name of a model."""
    folder = Path(given)
    return folder if (folder / MANIFEST).is_file() else None


def home() -> Path:
    """`CNPP_TRT_HOME`, by default the platform's cache folder, as in `~/.cache/cnpp-trt`.

    Raises:
        UserError: the variable begins with `~` and a user that does not exist.
    """
    if configured := os.environ.get(VARIABLE):
        return expanded(Path(configured), VARIABLE)
    from platformdirs import user_cache_path

    return user_cache_path("cnpp-trt", appauthor=False)


def bundles() -> Path:
    """The folder of exported bundles."""
    return home() / "bundles"


def plans() -> Path:
    """The folder of TensorRT plans."""
    return home() / "plans"


def runs() -> Path:
    """Where `run` makes a folder for each call, in the current folder."""
    return Path("cnpp-trt-runs")


def results() -> Path:
    """Where `bench`, `parity`, `consistency` and `report` write, in the current folder."""
    return Path("cnpp-trt-results")


def expanded(path: Path, name: str = "--out") -> Path:
    """`path` with `~` and `~user` replaced, as a shell does where they begin a word.

    Args:
        name: of the option or variable that the path came from, for the message.

    Raises:
        UserError: there is no such user, or no home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        from .messages import printable

        raise UserError(f"{name} {printable(path)}: there is no home folder of that user") from None
