"""Paths that are no model: one line each, and only what is asked for is looked at."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.sources import Finder

pytestmark = pytest.mark.slow

listed: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.scandir", "os.listdir"):
        listed.append(str(arguments[0]))


sys.addaudithook(_hook)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize("text", ["/", "~", ".", "..", "/proc", "/dev", "/usr"])
def test_a_folder_that_is_no_model_is_not_walked(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    listed.clear()
    assert "has no unet" in refused(lambda: Checkpoint(text))
    assert len(listed) <= 4


def test_a_folder_of_a_lora_is_not_walked(tiny_checkpoint, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "lora.safetensors").touch()
    listed.clear()
    message = refused(lambda: Checkpoint(str(tiny_checkpoint), loras=[str(tmp_path)]).match_loras())
    assert "should hold one LoRA file, and holds none" in message
    assert str(tmp_path / "a") not in listed


ODD = [
    ("~nosuchuser", "there is no home folder for '~nosuchuser'"),
    ("~nosuchuser/model", "there is no home folder"),
    ("a\0b", r"there is no 'a\x00b'"),
    ("/" + "a" * 5000, "there is no '/aaa"),
    ("a" * 300, "there is no 'aaa"),
    ("/dev/null", "neither a folder nor a regular file"),
    ("/dev/zero", "neither a folder nor a regular file"),
    ("\x1b[31mred", r"there is no '\x1b[31mred'"),
    ("\ud800", r"there is no '\ud800'"),
    ("", "there is no ''"),
]


@pytest.mark.parametrize(("text", "reason"), ODD)
def test_odd_paths(text, reason):
    assert reason in refused(lambda: Finder().find(text))


@pytest.mark.parametrize(("text", "reason"), ODD)
def test_odd_paths_of_every_part(tiny_checkpoint, text, reason):
    model = str(tiny_checkpoint)
    refused(lambda: Checkpoint(text))
    refused(lambda: Checkpoint(model, loras=[text]).match_loras())
    refused(lambda: Checkpoint(model, embeddings=[text]).embeddings())
    if text:  # else it is as if it were not given
        refused(lambda: Checkpoint(model, {"seg": text}).check_controlnet("seg"))
        refused(lambda: Checkpoint(model, vae=text))
        refused(lambda: Checkpoint(model, variant=text).fingerprint())


def test_links_that_go_round(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "cannot look at" in refused(lambda: Finder().find(tmp_path / "a"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_wait_for_a_writer(tmp_path, tiny_checkpoint):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a regular file" in refused(lambda: Finder().find(tmp_path / "pipe"))
    folder = tmp_path / "model"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "controlnet"):
        (folder / part).parent.mkdir(exist_ok=True)
        (folder / part).symlink_to(tiny_checkpoint / part)
    (folder / "unet").mkdir()
    os.mkfifo(folder / "unet" / "config.json")
    assert "has no unet" in refused(lambda: Checkpoint(str(folder)))
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").symlink_to(tiny_checkpoint / "unet" / "config.json")
    os.mkfifo(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "there are no weights" in refused(lambda: Checkpoint(str(folder)).fingerprint())


def test_a_folder_that_may_not_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "closed" / "model").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    try:
        assert "Permission denied" in refused(lambda: Finder().find(tmp_path / "closed" / "model"))
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_huge_file_in_the_place_of_a_config(tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for part in ("vae", "text_encoder"):
        (folder / part).symlink_to(tiny_checkpoint / part)
    (folder / "unet").mkdir()
    with Path(folder / "unet" / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "more than" in refused(lambda: Checkpoint(str(folder)))
