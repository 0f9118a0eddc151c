"""`--fast`: tests that were quick when they last ran here, for the round after every change.

What each test took is kept in pytest's cache, without its fixtures: those are shared, and whichever test comes first
would pay for them. A test that has not run here yet counts as quick.
"""

import pytest

KEY = "cnpp-trt/seconds"
QUICK = 0.25
"""Seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help=f"only tests that took at most {QUICK} s when they last ran here"
    )


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist report to this process. With `-p no:cacheprovider` nothing is kept.
    if not hasattr(config, "workerinput") and config.pluginmanager.hasplugin("cacheprovider"):
        config.pluginmanager.register(_Seconds(config), "cnpp-trt-seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    cache = getattr(config, "cache", None)
    seconds = cache.get(KEY, {}) if cache else {}
    quick = [item for item in items if seconds.get(item.nodeid, 0) <= QUICK]
    kept = set(quick)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = quick


class _Seconds:
    """Keeps what each test took."""

    def __init__(self, config: pytest.Config) -> None:
        self._cache = config.cache
        self._found: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._found[report.nodeid] = round(report.duration, 3)

    def pytest_sessionfinish(self) -> None:
        if self._cache is not None and self._found:
            self._cache.set(KEY, {**self._cache.get(KEY, {}), **self._found})
