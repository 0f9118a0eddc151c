"""A plugin of pytest: the root of the repository is a package, but no package of tests.

pytest would import its `__init__.py` under the name of the checkout's folder, which fails where that is no identifier.
"""

from pathlib import Path

import pytest


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None
