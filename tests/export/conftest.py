"""A hub with random weights, as a cache on this machine and as a server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graph_cache
import hub_server
import pytest
from cnpp_trt.developer.random_models.hub import BASE, make_hub, snapshot_of


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME of a cache that holds every repository; read only."""
    return make_hub(tmp_path_factory.mktemp("hub"), tiny=True)


@pytest.fixture(scope="session")
def base(hub_home: Path) -> Path:
    """The base model's folder in the cache."""
    return snapshot_of(hub_home, BASE)


@pytest.fixture
def cached(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is this process's own, and the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_home / "hub"))
    return hub_home


@pytest.fixture
def hub(hub_home: Path) -> Iterator[Any]:
    with hub_server.serve(hub_home) as served:
        yield served


@pytest.fixture
def online(hub: Any, script: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The command in a process of its own, with an empty cache (`tmp_path/hf`) and `hub` in the hub's place."""

    def call(*arguments: Any, **env: str) -> Any:
        known = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""}
        return script(*arguments, env={**known, "NO_PROXY": "127.0.0.1", **graph_cache.environment(), **env})

    return call
