"""The tokenizer against transformers' CLIPTokenizer, on a small vocabulary of the real kind (byte-level BPE)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from cnpp_trt.errors import BundleError, UserError
from cnpp_trt.runtime.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_clip(folder: Path, **kwargs: object) -> transformers.CLIPTokenizer:
    """vocab.json and merges.txt, loaded by transformers and saved as it saves a pipeline's tokenizer."""
    merges = [("r", "e"), ("re", "d</w>"), ("h", "o"), ("ho", "u"), ("s", "e</w>"), ("hou", "se</w>"), ("'", "s</w>")]
    merges += [("1", "2</w>"), ("Ã", "©</w>"), ("c", "a"), ("ca", "t</w>"), (",", ",</w>"), ("a", "b")]
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (source / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    clip = transformers.CLIPTokenizer.from_pretrained(source, **({"model_max_length": 77} | kwargs))
    clip.save_pretrained(folder)
    return clip


def reference(clip: transformers.CLIPTokenizer, text: str) -> tuple[list[int], str]:
    """What diffusers' pipelines do with a prompt (`encode_prompt`), the text of their truncation warning included."""
    ids = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
    untruncated = clip(text, padding="longest").input_ids
    return ids, clip.decode(untruncated[76:-1]) if len(untruncated) > 77 else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def clip(folder: Path) -> transformers.CLIPTokenizer:
    return write_clip(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, clip: transformers.CLIPTokenizer) -> Tokenizer:
    return Tokenizer(folder)


TEXTS = [
    "",
    " \t\n  ",
    "a red house",
    "A Red HOUSE, the Cat's",
    "it's we're i'd they'll i'm you've don't",
    "12 cats,, 3.5 houses!?",
    "café naïve Ünïcödé ЖЗ 家 कि",
    "cafe\u0301 vs caf\u00e9",
    "a 🏠 and a 👩‍👩‍👧 🇨🇭",
    "zero\u200bwidth\u00a0nbsp\u2028line",
    "\x00control\x07",
    "İstanbul ß ǅ",
    f"literal {END} and {START} tokens",
    "house " * 74 + "red",
    "house " * 75 + "red",
    "house " * 75 + "red's 🏠 Cat",
    " ".join(["a red house and the cat's café"] * 40),
    "x" * 500,
    ", ".join(f"Word{i} 家" for i in range(200)),
    "house " * 76 + END + " red",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_dropped_text_are_those_of_transformers(tokenizer, clip, text):
    ids, dropped = tokenizer.encode(text)
    expected, expected_dropped = reference(clip, text)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    assert dropped == expected_dropped


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=160))
def test_any_text(tokenizer, clip, text):
    ids, dropped = tokenizer.encode(text)
    assert (ids.tolist(), dropped) == reference(clip, text)


def test_nothing_is_dropped_at_exactly_75_tokens_of_text(tokenizer):
    assert tokenizer.encode("house " * 75)[1] == ""
    assert tokenizer.encode("house " * 75 + "red")[1] == "red"


@pytest.mark.parametrize("max_length, padding", [(10, "max_length"), (200, "longest")])
def test_truncation_and_padding_stored_in_the_file_do_not_count(tmp_path, tokenizer, max_length, padding):
    clip = write_clip(tmp_path)
    clip("red " * 20, padding=padding, max_length=max_length, truncation=True)
    clip.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == max_length
    for text in ("a red house", "house " * 100):
        ids, dropped = Tokenizer(tmp_path).encode(text)
        expected_ids, expected_dropped = tokenizer.encode(text)
        assert ids.tolist() == expected_ids.tolist()
        assert dropped == expected_dropped


def test_another_pad_token(tmp_path):
    """Stable Diffusion 2 pads with "!", an ordinary token, which a prompt may end on."""
    clip = write_clip(tmp_path, pad_token="!")
    ids, _ = Tokenizer(tmp_path).encode("a red house!")
    assert ids.tolist() == reference(clip, "a red house!")[0]
    assert ids[-1] == clip.convert_tokens_to_ids("!") != clip.eos_token_id
    ids, dropped = Tokenizer(tmp_path).encode("house " * 80 + "!")
    assert (ids.tolist(), dropped) == reference(clip, "house " * 80 + "!")
    assert dropped == "house house house house house !"


def test_pad_token_as_an_object(tmp_path):
    write_clip(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token": {"__type": "AddedToken", "content": "!"}}))
    assert Tokenizer(tmp_path).encode("")[0][-1] == byte_alphabet().index("!")


@pytest.mark.parametrize("length, expected", [(None, 77), (10**30, 77), (1e30, 77), (16, 16)])
def test_model_max_length(tmp_path, length, expected):
    write_clip(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "model_max_length"}
    path.write_text(json.dumps(config if length is None else config | {"model_max_length": length}))
    assert Tokenizer(tmp_path).encode("a red house")[0].shape == (expected,)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="character 4"):
        tokenizer.encode("red \ud83c house")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", None, "is missing"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', "pad token '<none>'"),
    ],
)
def test_damaged_folder(tmp_path, name, content, message):
    write_clip(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match=message) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_samplers_noise_and_tokenizer_import_no_pytorch():
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); "
        "import cnpp_trt.runtime.noise, cnpp_trt.runtime.schedulers, cnpp_trt.runtime.tokenizer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
