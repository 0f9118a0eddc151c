"""What goes wrong between here and the hub: one line each, and nothing half-made is left."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.developer.random_models.hub import BASE, SINGLE_FILE

pytestmark = pytest.mark.slow


@pytest.fixture
def told(online: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """The command must refuse with status 2 and one line, the last one; it is returned.

    What came before is of downloads. Its size is none that can be used, so that nothing is exported where all is found.
    """

    def call(*arguments: Any, **env: str) -> str:
        out = tmp_path / "bundle"
        given = arguments or ("--model", "sd15", "--cond", "canny")
        outcome = online("export", "--size", "12", *given, "--out", out, **env)
        assert outcome.returncode == 2, outcome.stderr
        lines = outcome.stderr.splitlines()
        assert [line for line in lines if "Traceback" in line] == []
        assert not out.exists()
        assert lines[-1].startswith("error: ")
        return str(lines[-1].removeprefix("error: "))

    return call


FOUND = "size 12x12 cannot be used"


def test_what_is_needed_is_downloaded_once(told, hub):
    assert told().startswith(FOUND)
    assert hub.downloads
    assert {name.rpartition(".")[2] for name in hub.downloads} == {"json"}  # no weights before all is known to fit
    before = len(hub.downloads)
    assert told().startswith(FOUND)
    assert len(hub.downloads) == before
    assert told(HF_HUB_OFFLINE="1").startswith(FOUND)


def test_a_revision(told, hub, base):
    assert told("--model", f"{BASE}@{base.name}", "--controlnet", "sd15", "--cond", "canny").startswith(FOUND)
    message = told("--model", f"{BASE}@v9", "--cond", "canny")
    assert message == f"the hub's {BASE} has no revision 'v9': check its branches and tags"


@pytest.mark.parametrize("given", ["", "hf_valid"])
def test_no_such_repository(told, given):
    message = told("--model", "nobody/nothing", "--cond", "canny", HF_TOKEN=given)
    assert "there is no nobody/nothing" in message
    assert "hf auth login" in message


def test_a_private_repository(told, hub):
    hub.private = {BASE}
    assert "for a private one log in" in told()
    assert told(HF_TOKEN=hub.token).startswith(FOUND)


def test_a_gated_repository(told, hub):
    hub.gated = {BASE}
    for token in ("", hub.token):
        message = told(HF_TOKEN=token)
        assert message.startswith(f"the hub's {BASE} is gated: accept its terms on https://huggingface.co/{BASE}")
    hub.accepted = True
    assert told(HF_TOKEN=hub.token).startswith(FOUND)


def test_a_token_that_is_not_valid(told, hub):
    assert "HF_TOKEN" in told(HF_TOKEN="hf_expired")


def test_no_network(told):
    message = told(HF_ENDPOINT="http://127.0.0.1:9")
    assert f"{BASE} is no local folder or file, is not in the hub's cache, and the hub cannot be reached" in message


def test_no_network_but_a_cache(told, hub_home):
    assert told(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(hub_home)).startswith(FOUND)


def test_offline_without_a_copy(told, hub):
    message = told(HF_HUB_OFFLINE="1")
    assert message == (
        f"{BASE} is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it: unset it, or give a local folder"
    )
    assert hub.requests == []


def test_offline_with_half_a_copy(told, hub_home, tmp_path):
    """Other conditions were downloaded, this one was not."""
    part = shutil.copytree(hub_home, tmp_path / "part", ignore=shutil.ignore_patterns("depth"))
    message = told("--size", 64, "--model", "sd15", "--cond", "depth", HF_HUB_OFFLINE="1", HF_HOME=str(part))
    assert "limingcv/reward_controlnet has no file or folder 'checkpoints/depth'" in message
    assert "(in the hub's cache; the hub itself was not asked, or not reached)" in message


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_with_trouble(told, hub, status):
    hub.status = status
    assert f"the hub answered {status} for {BASE}" in told()


def test_a_page_in_the_hubs_place(told, hub):
    """As a hotel's network answers before one logs in to it."""
    hub.page = "<html>Welcome!</html>"
    assert "the hub" in told()


# Downloads


def test_a_download_that_breaks_off_goes_on(told, hub, tmp_path):
    hub.cut = ("config.json", 1)
    assert told().startswith(FOUND)
    assert hub.cut == ("config.json", 0)


def test_a_download_that_always_breaks_off(told, hub, tmp_path):
    hub.cut = ("config.json", 1000)
    message = told()
    assert BASE in message
    assert "check the network" in message
    assert list((tmp_path / "hf").rglob("config.json")) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB: configs fit, the UNet's weights do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_download(told, small_disk):
    """Found while it is written, or before: what is large is compared with the free space first."""
    message = told("--size", 64, "--model", "sd15", "--cond", "canny", HF_HOME=str(small_disk))
    assert message == f"no space left to download {BASE}: set HF_HOME to a larger disk"
    assert list(small_disk.rglob("*.safetensors")) == []
    single = f"{BASE}/{SINGLE_FILE}.safetensors"
    message = told("--size", 64, "--model", single, "--controlnet", "sd15", "--cond", "canny", HF_HOME=str(small_disk))
    assert f"do not fit on the disk of {small_disk}" in message
    assert message.endswith("free: set HF_HOME to a larger disk")
