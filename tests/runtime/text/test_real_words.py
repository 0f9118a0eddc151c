"""CLIP's real vocabulary (of open_clip_torch): 10,000 prompts as transformers and open_clip tokenize them."""

import gzip
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from cnpp_trt.errors import BundleError
from cnpp_trt.runtime.text.tokenizer import Tokenizer

COUNT = 10_000


@pytest.fixture(scope="module")
def open_clip_folder() -> Path:
    pytest.importorskip("ftfy", reason="open_clip's tokenizer needs ftfy")
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("open_clip_torch is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def open_clip(open_clip_folder: Path) -> Any:
    """Its tokenizer's module alone: the package itself needs torchvision."""
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", open_clip_folder / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip(open_clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.CLIPTokenizer, Path]:
    """OpenAI's vocabulary in the files that Stable Diffusion's repositories have, and the folder it is saved to."""
    text = gzip.decompress((open_clip_folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair.split()) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == 49408
    folder = tmp_path_factory.mktemp("clip")
    source = folder / "source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


@pytest.fixture(scope="module")
def words(clip) -> list[str]:
    """The vocabulary's whole words, in plain letters."""
    tokens = (token.removesuffix("</w>") for token in clip[0].get_vocab() if token.endswith("</w>"))
    return sorted(token for token in tokens if token.isascii() and token.isalnum())


OTHERS = [
    "café",
    "Ünïcödé",
    "家",
    "夜景",
    "Москва",
    "مرحبا",
    "שלום",
    "नमस्ते",
    "🏠",
    "👩‍👩‍👧",
    "🇨🇭",
    "ﬁ",
    "İstanbul",
    "ß",
    "e\u0301",
]
MARKS = [
    ",",
    ".",
    "!",
    "?!",
    "--",
    "(",
    ")",
    "[x]",
    ":",
    ";",
    "'s",
    "'re",
    "&",
    "#1",
    "1.5",
    "2024",
    "16:9",
    "50%",
    "_",
    "<a>",
]
SPACES = [" ", " ", " ", "  ", "\n", "\t", "\u00a0", ""]


def prompts(words: list[str], others: list[str], spaces: list[str]) -> list[str]:
    rng = random.Random(0)
    kinds: list[list[str]] = [words, words, words, MARKS, others]

    def word() -> str:
        found = rng.choice(rng.choice(kinds))
        return rng.choice([found, found, found.upper(), found.title()])

    return ["".join(word() + rng.choice(spaces) for _ in range(rng.randint(1, 30))) for _ in range(COUNT)]


@pytest.mark.slow
def test_ids_are_those_of_transformers(clip, words):
    tokenizer, folder = clip
    texts = prompts(words, OTHERS, SPACES)
    expected = tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids
    ours = Tokenizer(folder, vocabulary=49408)
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text)[0].tolist() == ids, repr(text)


@pytest.mark.slow
def test_ids_are_those_of_open_clip(clip, open_clip, words):
    """On texts that its cleaning (ftfy, HTML) leaves alone; it pads with zeros."""
    plain = ["café", "家", "夜景", "москва", "🏠", "ünïcödé"]
    texts = prompts(words, plain, [" ", "  ", "\n"])
    reference = open_clip.SimpleTokenizer()
    reference.clean_fn = str.lower  # the cleaning takes longer than all the rest: it is done once, below
    ours = Tokenizer(clip[1])
    compared = 0
    for text in texts:
        cleaned = open_clip.whitespace_clean(open_clip.basic_clean(text))
        if cleaned != open_clip.whitespace_clean(text):
            continue
        compared += 1
        ids = [49406, *reference.encode(cleaned)[:75], 49407]
        assert ours.encode(text)[0].tolist() == [*ids, *[49407] * (77 - len(ids))], repr(text)
    assert compared > 0.9 * COUNT


def test_ids_beyond_the_text_encoders_table_are_refused(clip):
    with pytest.raises(BundleError, match="has the id 49407, but the text encoder knows 49407 tokens"):
        Tokenizer(clip[1], vocabulary=49407)
