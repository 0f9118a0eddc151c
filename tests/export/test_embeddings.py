"""Textual inversions against diffusers' pipelines, and files that cannot be used."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from cnpp_trt.developer.random_models.lora import make_embedding, make_lora
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.embeddings import Embedding, add_embeddings, add_tokens, read_embedding
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.export.recipe import parse_embedding
from cnpp_trt.runtime.text.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

pytestmark = pytest.mark.slow

WIDTH = 32  # of the tiny text encoder

PROMPTS = ["a <thing> in a field", "<thing>, two<thing>s; <thing>", "no embedding", "<thing> " * 60]


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> Any:
    return CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")


@pytest.fixture
def text_encoder(tiny_checkpoint: Path) -> Any:
    return CLIPTextModel.from_pretrained(tiny_checkpoint / "text_encoder", torch_dtype=torch.float32)


def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)


def encoded(embeddings: list[Embedding], tokenizer: Any, text_encoder: Any, prompt: str, folder: Path) -> torch.Tensor:
    """By the runtime's tokenizer, from what the export would save."""
    tokenizer.save_pretrained(folder)
    ids, _ = Tokenizer(folder, {e.token: len(e.vectors) for e in embeddings}).encode(prompt)
    with torch.no_grad():
        return text_encoder(torch.from_numpy(ids)[None])[0]


FILES = [
    ("diffusers", "learned_embeds.safetensors"),
    ("diffusers", "learned_embeds.bin"),
    ("a1111", "thing.pt"),
    ("emb_params", "<thing>.safetensors"),
]


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("layout", "name"), FILES)
def test_prompts_are_encoded_as_by_diffusers(tmp_path, tiny_checkpoint, tokenizer, text_encoder, layout, name, vectors):
    file = make_embedding(tmp_path / name, WIDTH, layout=layout, vectors=vectors)
    pipe = pipeline(tiny_checkpoint)
    pipe.load_textual_inversion(tmp_path, weight_name=name, token="<thing>")
    embedding = read_embedding(file)
    assert embedding.token == "<thing>" and embedding.vectors.shape == (vectors, WIDTH)
    add_embeddings(tokenizer, text_encoder, [embedding])
    assert tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    for i, prompt in enumerate(PROMPTS):
        ours = encoded([embedding], tokenizer, text_encoder, prompt, tmp_path / str(i))
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_two_at_once_and_in_half_precision(tmp_path, tiny_checkpoint, tokenizer, text_encoder):
    files = [make_embedding(tmp_path / f"{i}.bin", WIDTH, token=f"<w{i}>", vectors=2, seed=i) for i in range(2)]
    embeddings = [read_embedding(file) for file in files]
    pipe = pipeline(tiny_checkpoint)
    pipe.load_textual_inversion([torch.load(file) for file in files])
    half = CLIPTextModel.from_pretrained(tiny_checkpoint / "text_encoder", torch_dtype=torch.float16)
    rows = text_encoder.get_input_embeddings().weight.detach().clone()
    add_embeddings(CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer"), half, embeddings)
    add_embeddings(tokenizer, text_encoder, embeddings)
    prompt = "<w1> beside <w0>"
    ours = encoded(embeddings, tokenizer, text_encoder, prompt, tmp_path / "tokenizer")
    torch.testing.assert_close(ours, pipe.encode_prompt(prompt, "cpu", 1, False)[0], rtol=0, atol=1e-6)
    table = text_encoder.get_input_embeddings().weight
    assert table.shape == rows.shape  # the tiny table has rows to spare
    assert torch.equal(table[:514], rows[:514])
    halved: Any = half.get_input_embeddings().weight
    assert torch.equal(halved, table.half())


def test_a_table_without_spare_rows_grows(tiny_checkpoint, tokenizer, text_encoder):
    """As Stable Diffusion's own, whose rows are the tokenizer's words."""
    text_encoder.resize_token_embeddings(len(tokenizer))
    before = text_encoder.get_input_embeddings().weight.detach().clone()
    add_embeddings(tokenizer, text_encoder, [Embedding("<thing>", torch.ones(2, WIDTH))])
    table = text_encoder.get_input_embeddings()
    assert torch.equal(table.weight, torch.cat([before, torch.ones(2, WIDTH)]))
    assert text_encoder.config.vocab_size == table.num_embeddings == len(tokenizer) == len(before) + 2


def test_a_checkpoint_with_an_embedding(tmp_path, tiny_checkpoint):
    file = make_embedding(tmp_path / "a.bin", WIDTH, vectors=2)
    checkpoint = Checkpoint(str(tiny_checkpoint), embeddings=[f"{file}:<mine>"])
    ids = checkpoint.tokenizer().convert_tokens_to_ids(["<mine>", "<mine>_1"])
    encoder: Any = checkpoint.text_encoder(torch.float32)
    rows = encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows, torch.load(file)["<thing>"])


def test_the_word_is_said_and_where_it_is_from(tmp_path, tiny_checkpoint, caplog):
    """AUTOMATIC1111's own files, renamed as sites do, have another word inside."""
    content = {"string_to_param": {"*": torch.ones(2, WIDTH)}, "name": "turnaround-9500"}
    torch.save(content, tmp_path / "charturnerv2.pt")
    torch.save({**content, "name": None}, tmp_path / "plain.pt")
    lora = make_lora(tmp_path / "lora.safetensors", Checkpoint(str(tiny_checkpoint)).empty("unet"))
    texts = [f"{tmp_path}/charturnerv2.pt", f"{tmp_path}/plain.pt", f"{tmp_path}/plain.pt:<mine>"]
    caplog.set_level("INFO", "cnpp_trt")
    checkpoint = Checkpoint(str(tiny_checkpoint), loras=[f"{lora}:0.5"], embeddings=texts)
    export_bundle(checkpoint, ["seg"], tmp_path / "bundle")
    said = [line for line in caplog.messages if "embedding" in line or "LoRA" in line]
    assert said[1:] == [
        f"embedding: write turnaround-9500 in a prompt, the word from inside {tmp_path}/charturnerv2.pt (2 vectors)",
        f"embedding: write plain in a prompt, the word from the name of {tmp_path}/plain.pt (2 vectors)",
        "embedding: write <mine> in a prompt, the word from the command (2 vectors)",
    ]
    assert said[0].startswith(f"the LoRA {lora}:0.5 is fused into ") and said[0].endswith("layers with weight 0.5")


def test_the_authors_own_files(tmp_path):
    """The first ones hold a module of PyTorch's, ParameterDict, instead of a table."""
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, WIDTH))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "old.pt")
    embedding = read_embedding(tmp_path / "old.pt")
    assert embedding.token == "old"
    assert torch.equal(embedding.vectors, torch.ones(2, WIDTH)) and not embedding.vectors.requires_grad


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sd-concepts-library/cat-toy", ("sd-concepts-library/cat-toy", None)),
        ("sd-concepts-library/cat-toy:<toy>", ("sd-concepts-library/cat-toy", "<toy>")),
        ("a:b/c.pt", ("a:b/c.pt", None)),
        (r"C:\c.pt", (r"C:\c.pt", None)),
        (r"C:\c.pt:toy", (r"C:\c.pt", "toy")),
    ],
)
def test_parse_embedding(text, expected):
    assert parse_embedding(text) == expected


def test_a_file_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b.pt").touch()
    assert parse_embedding("a:b.pt") == ("a:b.pt", None)


@pytest.mark.parametrize("text", ["a.pt:", "a.pt:two words", ":word"])
def test_no_word(text):
    with pytest.raises(UserError, match="cannot be the word"):
        parse_embedding(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", [torch.ones(2, 4)], "no textual inversion"),
        ("a.bin", {"a": torch.ones(4), "b": torch.ones(4)}, "no textual inversion"),
        ("a.bin", {"a": torch.ones(2, 2, 4)}, "no textual inversion"),
        ("a.bin", {"a": torch.ones(4, dtype=torch.int64)}, "no textual inversion"),
        ("a.bin", {"a": "b"}, "no textual inversion"),
        ("a.pt", {"string_to_param": {}, "name": "a"}, "no textual inversion"),
        ("a.bin", {"two words": torch.ones(4)}, "'two words', which is not one word"),
        ("two words.pt", {"string_to_param": {"*": torch.ones(2, 4)}}, "which is not one word"),
        ("a.bin", {"a": torch.ones(76, 4)}, "holds 76 vectors: a prompt has room for 75"),
        ("a.safetensors", {"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 8)}, "for SDXL"),
        ("a.safetensors", {"unet.x.lora_A.weight": torch.ones(2, 4), "y": torch.ones(2)}, "no textual inversion"),
        ("a.bin", {"a": torch.tensor([[1.0, torch.nan]])}, "has NaN or Inf"),
        ("a.safetensors", {"a": torch.tensor([-torch.inf])}, "has NaN or Inf"),
        ("a.bin", {"a": torch.ones(1, 1).expand(2, 1 << 40)}, "no plain tensor"),
        ("a.bin", {"a": torch.ones(2, 0)}, "no textual inversion"),
        ("a.bin", {"a": torch.ones(2, 4).to_sparse()}, "no plain tensor"),
        ("a.bin", {"\x1b[31mred": torch.ones(4)}, r"'\\x1b\[31mred', which is not one word"),
        ("a.bin", {"a" * 1000: torch.ones(4)}, "which is not one word"),
        ("a.bin", {"clip_l": torch.ones(2, 4), 5: torch.ones(2, 8)}, "for SDXL"),
        ("a.bin", None, "there is no"),
        ("a.safetensors", None, "there is no"),
        ("a.bin", b"no", "damaged"),
        ("a.safetensors", b"no", "damaged"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    with pytest.raises(UserError, match=message) as error:
        read_embedding(file)
    assert "\n" not in str(error.value)


def test_a_pickle_that_would_run_code(tmp_path):
    torch.save({"<thing>": Path("x")}, tmp_path / "a.bin")
    with pytest.raises(UserError, match="code that would run"):
        read_embedding(tmp_path / "a.bin")


def test_another_width(tokenizer, text_encoder):
    with pytest.raises(UserError, match="of width 1024, this text encoder's are 32 wide"):
        add_embeddings(tokenizer, text_encoder, [Embedding("<thing>", torch.ones(1, 1024))])
    assert "<thing>" not in tokenizer.get_vocab()


def test_a_word_that_the_tokenizer_knows(tokenizer):
    with pytest.raises(UserError, match=r"knows 'a</w>' already"):
        add_tokens(tokenizer, [Embedding("a</w>", torch.ones(1, WIDTH))])


def embeddings(vectors: dict[str, int]) -> list[Embedding]:
    return [Embedding(word, torch.ones(n, WIDTH)) for word, n in vectors.items()]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"Cat": 1, "cAT": 2}, "'Cat' and 'cAT' cannot be told apart in a prompt, where both have 'cat'"),
        ({"cat1": 3, "cat1_1": 1}, "'cat1' and 'cat1_1' cannot be told apart in a prompt, where both have 'cat1_1'"),
        ({"cat1": 3, "CAT1_2": 2}, "'CAT1_2' and 'cat1' cannot be told apart in a prompt, where both have 'cat1_2'"),
        ({"caf\u00e91": 1, "cafe\u03011": 1}, "cannot be told apart"),
    ],
)
def test_words_that_no_prompt_tells_apart_are_refused_in_either_order(tokenizer, vectors, message):
    for each in (vectors, dict(reversed(vectors.items()))):
        with pytest.raises(UserError, match=message) as refused:
            add_tokens(tokenizer, embeddings(each))
        assert "\n" not in str(refused.value)
        assert not tokenizer.get_vocab().keys() & vectors.keys(), "nothing is added where one is refused"


def test_the_same_word_twice(tokenizer):
    with pytest.raises(UserError, match="'<x>' and '<x>' cannot be told apart"):
        add_tokens(tokenizer, embeddings({"<x>": 1}) + embeddings({"<x>": 1}))


def ids_of(tokenizer: Any, vectors: dict[str, int], prompts: list[str], folder: Path) -> list[list[str]]:
    """The tokens of prompts by the runtime, without start, end and padding, by name: ids depend on the order.

    transformers writes an added token's name in small letters.
    """
    add_tokens(tokenizer, embeddings(vectors))
    tokenizer.save_pretrained(folder)
    runtime = Tokenizer(folder, vectors)
    found = [runtime.read(prompt, long=True).ids.tolist() for prompt in prompts]
    names = [[tokenizer.convert_ids_to_tokens(i) for row in rows for i in row] for rows in found]
    return [[name for name in row if name not in ("<|startoftext|>", "<|endoftext|>")] for row in names]


def vectors_of(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{i}" for i in range(1, count))]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_words_that_begin_alike(tiny_checkpoint, tmp_path, order):
    both = [("bad_prompt", 2), ("bad_prompt_version2", 3)]
    vectors = dict(both[i] for i in order)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    [found] = ids_of(tokenizer, vectors, ["bad_prompt, bad_prompt_version2"], tmp_path)
    assert found == [*vectors_of("bad_prompt", 2), ",</w>", *vectors_of("bad_prompt_version2", 3)]


def test_a_word_that_ends_as_a_vectors_name_without_being_one(tokenizer, tmp_path):
    [found] = ids_of(tokenizer, {"<x>": 1, "<x>_1": 2}, ["<x>_1 <x>"], tmp_path)
    assert found == ["<x>_1", "<x>_1_1", "<x>"]


WORDS = st.text("zZqé<>_-1.", min_size=1, max_size=5).filter(lambda word: word.strip("_1.-"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_words_that_contain_each_other(tiny_checkpoint, tmp_path_factory, data):
    """Prefixes, suffixes, infixes, other letters, names of vectors: each word has its own vectors, in any order."""
    words = data.draw(st.lists(WORDS, min_size=1, max_size=4))
    for _ in range(data.draw(st.integers(0, 4))):
        part = data.draw(st.sampled_from(words))
        words.append(data.draw(st.sampled_from([part + "2", "z" + part, part + "_1", part + part, part[1:] or "q"])))
    vectors = {word: data.draw(st.integers(1, 12)) for word in dict.fromkeys(words)}
    orders = [dict(data.draw(st.permutations(list(vectors.items())))) for _ in range(2)]
    tokenizers = [CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer") for _ in orders]
    names = [name.lower() for word, n in vectors.items() for name in vectors_of(word, n)]
    refused = len({*names}) < len(names) or bool({*vectors} & tokenizers[0].get_vocab().keys())
    if refused:
        for tokenizer, order in zip(tokenizers, orders, strict=True):
            with pytest.raises(UserError):
                add_tokens(tokenizer, embeddings(order))
        return
    items = data.draw(st.lists(st.sampled_from([*vectors, "house", ",", "42"]), max_size=12))
    shouted = data.draw(st.booleans())
    prompt = " ".join(word.upper() if shouted else word for word in items)
    expected: list[str] = []
    for word in items:
        expected += vectors_of(word, vectors[word]) if word in vectors else tokenizers[0].tokenize(word)
    for tokenizer, order in zip(tokenizers, orders, strict=True):
        assert ids_of(tokenizer, order, [prompt], tmp_path_factory.mktemp("words")) == [
            [name.lower() for name in expected]
        ]


def test_a_tokenizer_with_more_words_than_the_text_encoder(tmp_path, checkpoint_copy, text_encoder):
    """Their ids would be read from beyond its table."""
    text_encoder.resize_token_embeddings(500)
    text_encoder.config.eos_token_id = 499  # which is looked at first
    text_encoder.save_pretrained(checkpoint_copy / "text_encoder")
    with pytest.raises(UserError, match="has the token 513, the text encoder 500 rows: they do not belong together"):
        export_bundle(Checkpoint(str(checkpoint_copy)), ["seg"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
