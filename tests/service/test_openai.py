"""OpenAI's interface, called by OpenAI's own package: the images are those of the command and the pipeline."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline
from PIL import Image

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'cnpp-trt[test]'")


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_an_edit_is_the_image_of_the_command(
    client: Any, miniature: Any, mask: Path, command: Any, tmp_path: Path, pixels: Any
) -> None:
    answer = client.images.edit(
        model="miniature",
        image=mask.open("rb"),
        prompt="a house by the sea",
        extra_body={"condition": "seg", "seed": 21, "num_inference_steps": 9},
    )
    ran = command(
        "run", "--bundle", miniature.bundle, "--cond", "seg", "--image", mask, "-p", "a house by the sea",
        "--seed", 21, "-s", 9, "-o", tmp_path, "--json",
    )  # fmt: skip
    [path] = json.loads(ran.out)["images"]
    served = pixels(answer.data[0].b64_json)
    assert (served == np.asarray(Image.open(path))).all()
    assert answer.data[0].seed == 21
    assert answer.size == "128x128"


def test_the_image_repeats_itself_from_its_metadata(
    client: Any, miniature: Any, mask: Path, command: Any, tmp_path: Path
) -> None:
    answer = client.images.edit(
        image=mask.open("rb"), prompt="oaks", n=2, extra_body={"condition": "seg", "seed": 4, "num_inference_steps": 3}
    )
    second = tmp_path / "second.png"
    second.write_bytes(base64.b64decode(answer.data[1].b64_json))
    ran = command("run", "--repeat", second, "--bundle", miniature.bundle, "-o", tmp_path / "out", "--json")
    assert json.loads(ran.out)["max_difference"] == 0
    assert "Seed: 5" in Image.open(second).info["parameters"]


def test_every_field_of_ours_reaches_the_pipeline(client: Any, mini: Pipeline, mask: Path, pixels: Any) -> None:
    depth = mini.extract("depth", mask)
    buffer = io.BytesIO()
    Image.fromarray(depth).save(buffer, "PNG")
    control = {
        "condition": "depth",
        "image": base64.b64encode(buffer.getvalue()).decode(),
        "controlnet_conditioning_scale": 0.5,
        "control_guidance_end": 0.6,
    }
    ours: dict[str, Any] = {
        "negative_prompt": "snow",
        "seed": [3, 11],
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "scheduler": "DPM++ 2M Karras",
        "guess_mode": True,
        "prompt_weights": True,
    }
    answer = client.images.generate(
        prompt="a (house:1.3)", n=2, extra_body={**ours, "controls": [control]}, size="128x128"
    )
    expected = mini(
        "a (house:1.3)",
        Control("depth", depth, 0.5, control_guidance_end=0.6),
        **{**ours, "scheduler": "dpmpp_2m_karras"},
        num_images_per_prompt=2,
    ).images
    assert (np.stack([pixels(image.b64_json) for image in answer.data]) == expected).all()


def test_lists_and_json_controls_of_a_form(client: Any, mini: Pipeline, mask: Path, pixels: Any) -> None:
    """As OpenAI's package writes them into a form."""
    files = [mask.open("rb"), mask.open("rb")]
    lists = {"condition": ["seg", "canny"], "controlnet_conditioning_scale": [0.9, 0.2], "seed": 1}
    common: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    answer = client.images.edit(image=files, prompt="a barn", extra_body={**lists, **common})
    expected = mini("a barn", [Control("seg", mask, 0.9), Control("canny", mask, 0.2)], seed=1, **common).images[0]
    assert (pixels(answer.data[0].b64_json) == expected).all()
    text = base64.b64encode(mask.read_bytes()).decode()
    controls = json.dumps([{"condition": "seg", "image": text, "controlnet_conditioning_scale": 0.9}])
    answer = client.images.edit(
        image=mask.open("rb"),
        prompt="a barn",
        extra_body={
            "condition": "canny",
            "controlnet_conditioning_scale": 0.2,
            "controls": controls,
            "seed": 1,
            **common,
        },
    )
    expected = mini("a barn", [Control("canny", mask, 0.2), Control("seg", mask, 0.9)], seed=1, **common).images[0]
    assert (pixels(answer.data[0].b64_json) == expected).all()


def test_a_photo_is_extracted_and_scored(client: Any, mini: Pipeline, mask: Path, drawn: Any, pixels: Any) -> None:
    photo = drawn("a house", seed=5, num_inference_steps=8)[0]
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    answer = client.images.edit(
        image=("photo.png", buffer.getvalue()),
        prompt="a house in winter",
        extra_body={
            "condition": "seg", "extract": True, "seed": 2, "num_inference_steps": 8, "return_conditions": True,
        },
    )  # fmt: skip
    given = mini.extract("seg", photo)
    expected = mini("a house in winter", Control("seg", given), seed=2, num_inference_steps=8).images[0]
    served = pixels(answer.data[0].b64_json)
    assert (served == expected).all()
    [score] = answer.data[0].scores
    assert score["value"] == pytest.approx(mini.score("seg", given, expected).value)
    assert score["metric"] == "mIoU"
    assert (pixels(score["extracted"]) == mini.extract("seg", expected)).all()


def test_an_edit_without_a_condition_begins_with_the_image(
    client: Any, mini: Pipeline, drawn: Any, pixels: Any
) -> None:
    first = drawn("a house", seed=5, num_inference_steps=8)[0]
    buffer = io.BytesIO()
    Image.fromarray(first).save(buffer, "PNG")
    ours: dict[str, Any] = {"seed": 2, "num_inference_steps": 8, "strength": 0.5}
    answer = client.images.edit(image=("i.png", buffer.getvalue()), prompt="at night", extra_body=ours)
    expected = mini("at night", init_image=first, **ours).images[0]
    assert (pixels(answer.data[0].b64_json) == expected).all()


def test_a_stream_has_partial_images_and_ends_in_the_image(client: Any, mask: Path, drawn: Any, pixels: Any) -> None:
    def stream() -> list[Any]:
        return list(
            client.images.edit(
                image=mask.open("rb"),
                prompt="a house",
                stream=True,
                partial_images=2,
                extra_body={"condition": "seg", "seed": 8, "num_inference_steps": 6},
            )
        )

    stream()  # the first picture of a server teaches it what its latents look like: a later one has all previews
    events = stream()
    assert [e.type for e in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [e.partial_image_index for e in events[:-1]] == [0, 1]
    expected = drawn("a house", seed=8, num_inference_steps=6)[0]
    assert (pixels(events[-1].b64_json) == expected).all()
    previews = [pixels(e.b64_json).astype(float) for e in events[:-1]]
    assert all(p.shape == (128, 128, 3) for p in previews)
    # A preview is of this picture: nearer to it than its mean color is, and nearer the later it is.
    errors = [np.abs(p - expected).mean() for p in previews]
    assert errors[1] <= errors[0]
    assert errors[1] < np.abs(expected - expected.mean((0, 1))).mean()
    events = list(client.images.generate(prompt="a house", stream=True, extra_body={"num_inference_steps": 2}))
    assert [e.type for e in events] == ["image_generation.completed"]


def test_formats(client: Any, mask: Path, drawn: Any, pixels: Any) -> None:
    expected = drawn("a house", None, seed=1, num_inference_steps=2)[0].astype(float)
    ours = {"seed": 1, "num_inference_steps": 2}
    for kind in ("jpeg", "webp"):
        answer = client.images.generate(prompt="a house", output_format=kind, output_compression=90, extra_body=ours)
        raw = base64.b64decode(answer.data[0].b64_json)
        image = Image.open(io.BytesIO(raw))
        assert image.format == kind.upper()
        assert np.abs(pixels(raw) - expected).mean() < 6
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert b"Steps" in comment.replace(b"\0", b"")
    answer = client.images.generate(prompt="a house", response_format="url", extra_body=ours)
    head, _, body = answer.data[0].url.partition(",")
    assert head == "data:image/png;base64"
    assert (pixels(body) == expected).all()


def test_ignored_fields_are_listed(client: Any) -> None:
    raw = client.images.with_raw_response.generate(
        prompt="a house", quality="high", user="me", moderation="low", extra_body={"num_inference_steps": 1}
    )
    assert raw.headers["x-ignored-fields"] == "moderation, quality, user"
    raw = client.images.with_raw_response.generate(prompt="a house", extra_body={"num_inference_steps": 1})
    assert "x-ignored-fields" not in raw.headers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown field `frobnicate`"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 1000"),
        ({"num_inference_steps": 500}, "num_inference_steps", "at most 150"),
        ({"num_inference_steps": "many"}, "num_inference_steps", "Expected `int"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"n": 0}, "n", "from 1 to 10"),
        ({"seed": -2}, "seed", "from 0"),
        ({"scheduler": "heun"}, "scheduler", "unknown scheduler"),
        ({"size": "512x512"}, "size", "choose from 128x128"),
        ({"size": "huge"}, "size", "WIDTHxHEIGHT"),
        ({"output_format": "svg"}, "output_format", "png, jpeg or webp"),
        ({"background": "transparent"}, "background", "no transparent"),
        ({"mask": "x"}, "mask", "not supported"),
        ({"condition": "seg"}, "condition", "give one image for each"),
        ({"condition": "seg", "control_image": "https://example.org/a.png"}, "control_image", "nothing is fetched"),
        ({"condition": "seg", "control_image": "/etc/passwd"}, "control_image", "not base64"),
        ({"condition": "seg", "control_image": "AAAA"}, None, "is not an image"),
        ({"condition": "pose", "control_image": "AAAA"}, "condition", "unknown condition"),
        ({"controls": [{"condition": "seg"}]}, "image", "missing required field `image`"),
        ({"strength": 0.5}, "strength", "init_image"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"partial_images": 4}, "partial_images", "0 to 3"),
        ({"prompt": 3}, "prompt", "Expected `str`"),
    ],
)
def test_what_cannot_be_used_is_a_line_that_names_it(client: Any, body: Any, param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a house", extra_body=body)
    error = refused.value.body
    assert words in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="choose from miniature") as refused:
        client.images.generate(model="dall-e-3", prompt="a house")
    assert refused.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["miniature"]
    assert client.models.retrieve("miniature").conditions == ["seg", "canny", "hed", "lineart", "depth"]


def test_forms_are_checked_like_json(client: Any, server: Any, mask: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        client.images.edit(image=mask.open("rb"), prompt="a house", extra_body={"frobnicate": 1})
    with pytest.raises(openai.BadRequestError, match="mask is not supported"):
        client.images.edit(image=mask.open("rb"), mask=mask.open("rb"), prompt="a house")
    answer = server.client.post("/v1/images/edits", data={"prompt": "x"}, files={"other": b"y"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "other"
    answer = server.client.post("/v1/images/edits", files={"prompt": ("p.txt", b"y"), "image": ("i.png", b"z")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    answer = server.client.post("/v1/images/edits", files={"prompt": (None, "x")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    answer = server.client.post("/v1/images/edits", json={"prompt": "x"})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 415),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", 415),
    ],
)
def test_malformed_bodies(server: Any, content: bytes, kind: str, status: int) -> None:
    answer = server.client.post("/v1/images/generations", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert len(answer.json()["error"]["message"].splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"--x", b"--x\r\nnonsense\r\n--x--", b"\0" * 1000])
def test_malformed_forms(server: Any, content: bytes) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    answer = server.client.post("/v1/images/edits", content=content, headers=kind)
    assert answer.status_code == 400
    answer = server.client.post("/v1/images/edits", content=content, headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400


def test_paths_that_there_are_not(server: Any) -> None:
    answer = server.client.get("/v1/nothing")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    answer = server.client.get("/v1/images/generations")
    assert answer.status_code == 405


def test_the_documents_name_every_field(server: Any) -> None:
    document = server.client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ImageForm"]["properties"]
    assert {"prompt", "image", "condition", "controlnet_conditioning_scale", "num_inference_steps"} <= set(fields)
    page = server.client.get("/docs").text
    assert "/v1/images/edits" in page and "controlnet_conditioning_scale" in page
    assert "<script" not in page and "http" not in page


def test_notes_say_what_looks_wrong(client: Any, drawn: Callable[..., Any]) -> None:
    photo = drawn("a house", seed=5, num_inference_steps=4)[0]
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    answer = client.images.edit(
        image=("p.png", buffer.getvalue()), prompt="x", extra_body={"condition": "canny", "num_inference_steps": 1}
    )
    assert any("extract=true" in note for note in answer.notes)
