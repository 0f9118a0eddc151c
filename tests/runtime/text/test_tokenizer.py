"""The tokenizer against transformers' CLIPTokenizer, on a small vocabulary of the real kind (byte-level BPE)."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from cnpp_trt.errors import BundleError, UserError
from cnpp_trt.runtime.text.tokenizer import Tokenizer
from diffusers.loaders import TextualInversionLoaderMixin
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
    settings: dict[str, Any] = {"model_max_length": 77} | kwargs
    clip = transformers.CLIPTokenizer.from_pretrained(source, **settings)
    clip.save_pretrained(folder)
    return clip


def reference(clip: transformers.CLIPTokenizer, text: str) -> tuple[list[int], str]:
    """What diffusers' pipelines do with a prompt (`encode_prompt`), the text of their truncation warning included."""
    ids = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
    untruncated = clip(text, padding="longest").input_ids
    dropped: Any = clip.decode(untruncated[76:-1]) if len(untruncated) > 77 else ""
    return ids, dropped


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
        ("tokenizer_config.json", "[]", "Expected `object`"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', "pad token '<none>'"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0}, "merges": []}}', "start and end"),
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


# Embeddings

EMBEDDINGS = {"<cat>": 3, "doggy": 1, "Mixed": 2, "<long>": 40}


@pytest.fixture(scope="module")
def clip_with(tmp_path_factory: pytest.TempPathFactory) -> transformers.CLIPTokenizer:
    clip = write_clip(tmp_path_factory.mktemp("embeddings"))
    for token, vectors in EMBEDDINGS.items():
        clip.add_tokens([token, *(f"{token}_{i}" for i in range(1, vectors))])
    return clip


@pytest.fixture(scope="module")
def tokenizer_with(clip_with, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("saved")
    clip_with.save_pretrained(folder)
    return Tokenizer(folder, EMBEDDINGS)


def named(token: str) -> list[str]:
    """What the tokenizer calls the vectors of an embedding."""
    return [token, *(f"{token}_{i}" for i in range(1, EMBEDDINGS[token]))]


PLAIN = ["red", "house", ",", "12", "é!", "cat"]


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(["<cat>", "doggy", "<long>", "<cat>,doggy.", "x<cat>y", *PLAIN]), max_size=40))
def test_embeddings_are_written_out_as_diffusers_does(tokenizer_with, clip_with, words):
    """Where all letters are small and no vector is called by its name: then diffusers is right."""
    text = " ".join(words)
    converted: Any = TextualInversionLoaderMixin().maybe_convert_prompt(text, clip_with)
    ids, dropped = tokenizer_with.encode(text)
    assert (ids.tolist(), dropped) == reference(clip_with, converted)


# diffusers replaces text, in which it looks for the words in small letters: it loses vectors here.
SPELLED = {
    "mixed": named("Mixed"),
    "<CAT>": named("<cat>"),
    "<Long>": named("<long>"),
    "<cat>_1": ["<cat>_1"],
    "<cat>_9": [*named("<cat>"), "_</w>", "9</w>"],
    "x<Cat>y": ["x</w>", *named("<cat>"), "y</w>"],
    "<cat><cat>": named("<cat>") * 2,
    "MIXEDdoggy": [*named("Mixed"), "doggy"],
}


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from([*SPELLED, *EMBEDDINGS, *PLAIN]), max_size=40))
def test_every_word_stands_for_its_own_vectors(tokenizer_with, clip_with, words):
    """In letters of either case, and beside the names of vectors."""
    expected = []
    for word in words:
        tokens = SPELLED.get(word) or (named(word) if word in EMBEDDINGS else clip_with.tokenize(word))
        expected += clip_with.convert_tokens_to_ids(tokens)
    reading = tokenizer_with.read(" ".join(words))
    assert reading.ids.tolist() == [framed(clip_with, expected[:75])]
    spelled = {"mixed": "Mixed", "<CAT>": "<cat>", "<Long>": "<long>", "MIXEDdoggy": "Mixed doggy"}
    spelled |= {"<cat>_9": "<cat>", "x<Cat>y": "<cat>", "<cat><cat>": "<cat>"}
    used = [w for word in words for w in (spelled.get(word) or word).split() if w in EMBEDDINGS]
    assert reading.embeddings == tuple(dict.fromkeys(used))


def test_an_embedding_of_three_vectors_is_three_ids(tokenizer_with, clip_with):
    vectors = clip_with.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])
    red = clip_with.convert_tokens_to_ids("red</w>")
    assert tokenizer_with.encode("red <cat> red")[0][1:6].tolist() == [red, *vectors, red]


def test_a_tokenizer_without_the_embedding(folder):
    with pytest.raises(BundleError, match="embedding '<cat>' is not in"):
        Tokenizer(folder, {"<cat>": 1})


# Long prompts

ROOM, BACKTRACK = 75, 20


def divided(ids: list[int], comma: int) -> list[list[int]]:
    """The web UI's rule, on a whole prompt: cut after 75, or after the last comma among 56 to 75 unless one follows."""
    if len(ids) <= ROOM:
        return [ids]
    commas = [i + 1 for i in range(ROOM - BACKTRACK, ROOM) if ids[i] == comma]
    end = commas[-1] if commas and ids[ROOM] != comma else ROOM
    return [ids[:end], *divided(ids[end:], comma)]


def text_ids(clip: transformers.CLIPTokenizer, text: str) -> list[int]:
    return clip(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def framed(clip: transformers.CLIPTokenizer, chunk: list[int]) -> list[int]:
    padding = [clip.pad_token_id] * (ROOM - len(chunk))
    ids: list[Any] = [clip.bos_token_id, *chunk, clip.eos_token_id, *padding]
    return ids


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.sampled_from(["house", "red", "red,", ",", "xyz", "12 é"]), max_size=200))
def test_long_prompts_are_divided_as_in_the_web_ui(tokenizer, clip, words):
    text = " ".join(words)
    expected = divided(text_ids(clip, text), clip.convert_tokens_to_ids(",</w>"))
    chunks = tokenizer.encode_long(text)
    assert chunks.dtype == np.int64
    assert chunks.tolist() == [framed(clip, chunk) for chunk in expected]


def lengths(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of text in each chunk; none of these prompts is padded with a token that it holds."""
    end = tokenizer.empty[-1]
    return [row.tolist().index(end) - 1 for row in tokenizer.encode_long(text)]


def commas(*positions: int, of: int) -> str:
    """A prompt of `of` tokens with a comma as the n-th, counted from 1."""
    return " ".join("," if i + 1 in positions else "house" for i in range(of))


LENGTHS = {
    "": [0],
    " \n": [0],
    commas(of=74): [74],
    commas(of=75): [75],
    commas(of=76): [75, 1],
    commas(of=150): [75, 75],
    commas(of=151): [75, 75, 1],
    commas(60, of=75): [75],
    commas(60, of=76): [60, 16],
    commas(60, 70, of=76): [70, 6],
    commas(75, of=76): [75, 1],
    commas(56, of=76): [56, 20],
    commas(55, of=76): [75, 1],
    commas(60, 76, of=80): [75, 5],
    commas(76, 151, of=160): [75, 75, 10],
    commas(60, 120, 130, of=160): [60, 70, 30],
    "red BREAK house house": [1, 2],
    "red\nBREAK\nhouse": [1, 1],
    "BREAK red": [0, 1],
    "red BREAK": [1],
    "BREAK": [0],
    "red BREAK BREAK house": [1, 0, 1],
    "BREAKS break": [9],  # no such word: b, re, a, k, s, b, re, a, k
    f"{commas(of=80)} BREAK red": [75, 5, 1],
}


@pytest.mark.parametrize("text", LENGTHS, ids=range(len(LENGTHS)))
def test_where_chunks_end(tokenizer, text):
    assert lengths(tokenizer, text) == LENGTHS[text]


def test_no_prompt(tokenizer):
    assert tokenizer.empty.tolist() == tokenizer.encode("")[0].tolist()
    assert tokenizer.encode_long("").tolist() == [tokenizer.empty.tolist()]


def test_a_prompt_that_fits_is_one_chunk_and_brackets_are_text(tokenizer):
    for text in ("a (red:1.2) [house]", "house " * 75):
        assert tokenizer.encode_long(text).tolist() == [tokenizer.encode(text)[0].tolist()]


def test_long_prompts_end_and_pad_with_different_tokens(tmp_path):
    clip = write_clip(tmp_path, pad_token="!")
    expected = [framed(clip, chunk) for chunk in divided(text_ids(clip, "red " * 80), -1)]
    assert Tokenizer(tmp_path).encode_long("red " * 80).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["house", "red", ",", "<cat>", "<long>", "doggy"]), max_size=120))
def test_the_vectors_of_an_embedding_stay_together(tokenizer_with, clip_with, words):
    text = " ".join(words)
    converted: Any = TextualInversionLoaderMixin().maybe_convert_prompt(text, clip_with)
    end = clip_with.eos_token_id
    chunks = [row[1 : row.index(end)] for row in tokenizer_with.encode_long(text).tolist()]
    assert [i for chunk in chunks for i in chunk] == text_ids(clip_with, converted)
    for token, vectors in EMBEDDINGS.items():
        first, last = clip_with.convert_tokens_to_ids([token, f"{token}_{vectors - 1}" if vectors > 1 else token])
        for chunk in chunks:
            assert [i + vectors - 1 for i, t in enumerate(chunk) if t == first] == [
                i for i, t in enumerate(chunk) if t == last
            ]


def test_an_embeddings_word_in_other_letters_stays_together(tokenizer_with, clip_with):
    ids = clip_with.convert_tokens_to_ids([*named("<cat>"), "red</w>"])
    assert tokenizer_with.encode_long("<CAT> red")[0, 1:5].tolist() == ids
    assert lengths(tokenizer_with, f"{commas(of=73)} <CAT>") == [73, 3]


def test_an_embedding_that_does_not_fit_goes_into_the_next_chunk(tokenizer_with):
    assert lengths(tokenizer_with, f"{commas(of=72)} <cat>") == [75]
    assert lengths(tokenizer_with, f"{commas(of=73)} <cat>") == [73, 3]
    assert lengths(tokenizer_with, f"{commas(60, of=75)} <cat>") == [60, 18]


def test_samplers_noise_and_tokenizer_import_no_pytorch():
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); "
        "import cnpp_trt.runtime.sampling.noise, cnpp_trt.runtime.sampling.schedulers, cnpp_trt.runtime.text.tokenizer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Prompts and files from outside


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        " " * 99_999,
        "a" + " " * 99_998 + "b",
        "x" * 100_000,
        "\x00" * 1000 + "red",
        "red\x00house",
        "\u202e\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
        "<cat>" * 20_000,
        "cafe\u0301" * 10_000,
        "(" * 40 + "\u200b" * 50_000,
        "\U0001f3e0" * 50_000,
    ],
    ids=range(10),
)
@pytest.mark.timeout(60)
def test_long_and_strange_prompts(tokenizer_with, clip_with, text):
    """A quadratic rule would take minutes; the timeout ends the test then."""
    assert tokenizer_with.read(text, weighted=True).ids.shape == (1, 77)
    chunks = tokenizer_with.encode_long(text)
    if "<cat>" not in text:
        assert [i for row in chunks.tolist() for i in row[1 : row.index(526)]] == text_ids(clip_with, text)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_emphasis_shares_its_weight_with_every_vector(tokenizer_with, clip_with, dropped):
    """Of a word that stays with its chunk, and of one that is cut off with the prompt."""
    before = "red " * (72 + dropped)
    ids = clip_with.convert_tokens_to_ids([*["red</w>"] * (72 + dropped), *named("<cat>")])
    short = tokenizer_with.read(f"{before}(<cat>:1.5)", weighted=True)
    assert short.ids.tolist() == [framed(clip_with, ids[:75])]
    assert short.weights[0, : 73 + dropped].tolist() == [1.0] * (73 + dropped)
    assert short.weights[0, 73 + dropped :].tolist() == [1.5] * (3 - dropped) + [1.0]
    long = tokenizer_with.read(f"{before}(<cat>:1.5)", weighted=True, long=True)
    assert [row[row != 1].tolist() for row in long.weights] == ([[1.5] * 3] if not dropped else [[], [1.5] * 3])
    assert long.dropped == ""


def test_weights_go_with_what_follows_the_last_comma(tokenizer):
    text = f"{commas(60, of=70)} (red red red red red red red:0.5) [house]"
    reading = tokenizer.read(text, weighted=True, long=True)
    assert lengths(tokenizer, text.translate(str.maketrans("", "", "()[]:.05"))) == [60, 18]
    expected = [1.0] * 10 + [0.5] * 7 + [1 / 1.1]
    np.testing.assert_allclose(reading.weights[1, 1:19], expected, rtol=1e-6)
    assert (reading.weights[0] == 1).all()
    assert (reading.weights[1, 19:] == 1).all()


def test_break_begins_a_chunk_in_long_weighted_prompts(tokenizer, clip):
    red, house = clip.convert_tokens_to_ids(["red</w>", "house</w>"])
    reading = tokenizer.read("(red:1.2) BREAK [house]", weighted=True, long=True)
    assert reading.ids.tolist() == [framed(clip, [red]), framed(clip, [house])]
    np.testing.assert_allclose(reading.weights[:, 1], [1.2, 1 / 1.1], rtol=1e-6)


VALUES: Any = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "x" * 2000,
    "\x1b[31m",
    [],
    {},
    [[]],
    {"Regex": "(a*)*$"},
    {"type": "Nonsense"},
    [1, "a"],
]


def changed(value: object, rng: random.Random) -> object:
    """One value somewhere in a JSON document replaced, or dropped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], changed(value[i], rng), *value[i + 1 :]]
    return rng.choice(VALUES)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_refused_in_one_line_or_harmless(clip_with, tmp_path, name):
    clip_with.save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(400):
        content = bytearray(whole)
        if i % 2:
            content = bytearray(json.dumps(changed(json.loads(whole), rng)).encode())
        else:
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            content = content[: rng.choice([len(content), len(content), rng.randrange(len(content))])]
        (tmp_path / name).write_bytes(content)
        try:
            tokenizer = Tokenizer(tmp_path, EMBEDDINGS, vocabulary=len(clip_with))
            for text in ("a red <cat> house, 12 é", "(red:1.2) BREAK house " * 30):
                reading = tokenizer.read(text, long=True, weighted=True)
                assert reading.ids.min() >= 0 and reading.ids.max() < len(clip_with)
        except BundleError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 600
    assert refused > 100


@pytest.mark.parametrize("frame", ["cls", "sep"])
@pytest.mark.parametrize("beyond", [527, 2**32 - 1])
def test_a_frame_beyond_the_text_encoders_table(tmp_path, frame, beyond):
    """The start and end that the post processor adds have ids of their own, beside the vocabulary's."""
    clip = write_clip(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"][frame][1] = beyond
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"has the id {beyond}, but the text encoder knows 527 tokens"):
        Tokenizer(tmp_path, vocabulary=len(clip))


def test_ids_that_the_library_gives_anew(clip_with, tmp_path):
    """A vocabulary that lost a token: the embeddings' ids would be those of other vectors."""
    clip_with.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["Ġ</w>"]
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="has no such id for"):
        Tokenizer(tmp_path, EMBEDDINGS, vocabulary=len(clip_with))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_none(clip_with, tmp_path, name):
    clip_with.save_pretrained(tmp_path)
    for link in ("/dev/zero", "/dev/null", str(tmp_path)):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(link)
        with pytest.raises(BundleError, match="cannot be read") as error:
            Tokenizer(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("vectors", [0, -1, 76, 10**12])
def test_an_embedding_of_too_many_vectors(clip_with, tmp_path, vectors):
    clip_with.save_pretrained(tmp_path)
    with pytest.raises(BundleError, match="vectors: export the bundle anew"):
        Tokenizer(tmp_path, {"<cat>": vectors})


def test_an_embedding_that_is_a_piece_of_ordinary_words(clip_with, tmp_path):
    clip_with.save_pretrained(tmp_path)
    with pytest.raises(BundleError, match="knows 're' as no embedding"):
        Tokenizer(tmp_path, {"re": 1})
