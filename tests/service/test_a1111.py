"""AUTOMATIC1111's interface with the ControlNet extension: `webuiapi` as it is, and Open WebUI's calls replayed."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline
from PIL import Image

pytestmark = pytest.mark.slow

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[service]'")
TINY = {"prompt": "a house", "steps": 2, "seed": 3}


@pytest.fixture
def web(server: Any) -> Any:
    webuiapi = pytest.importorskip("webuiapi", reason="webuiapi is not installed: pip install 'cnpp-trt[test]'")
    return webuiapi.WebUIApi(port=server.port, sampler="UniPC", steps=4)


def units(web: Any, *rows: dict[str, Any]) -> list[Any]:
    import webuiapi

    return [webuiapi.ControlNetUnit(**row) for row in rows]


def png(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_webuiapi_draws_the_pipelines_images(web: Any, mini: Pipeline, mask: Path) -> None:
    assert web.has_controlnet
    m, depth = Image.open(mask), Image.fromarray(mini.extract("depth", mask))
    result = web.txt2img(
        prompt="a (house:1.3) by a road",
        negative_prompt="snow",
        seed=11,
        cfg_scale=3.0,
        batch_size=2,
        width=128,
        height=128,
        sampler_name="DPM++ 2M",
        scheduler="karras",
        controlnet_units=units(
            web,
            {"image": m, "model": "seg", "weight": 0.9, "resize_mode": "Just Resize"},
            {"image": depth, "model": "control_v11f1p_sd15_depth [cfd03158]", "guidance_end": 0.5},
        ),
    )
    expected = mini(
        "a (house:1.3) by a road",
        [Control("seg", mask, 0.9), Control("depth", np.asarray(depth), control_guidance_end=0.5)],
        negative_prompt="snow",
        seed=11,
        guidance_scale=3.0,
        num_inference_steps=4,
        num_images_per_prompt=2,
        scheduler="dpmpp_2m_karras",
        prompt_weights=True,
        long_prompt=True,
    ).images
    assert (np.stack([np.asarray(image) for image in result.images]) == expected).all()
    assert result.info["all_seeds"] == [11, 12]
    assert result.info["infotexts"][1].startswith(
        "a (house:1.3) by a road\nNegative prompt: snow\nSteps: 4, Sampler: DPM++ 2M"
    )
    assert result.image.info["parameters"] == result.info["infotexts"][0]
    assert result.parameters["steps"] == 4


def test_a_call_without_units_forgets_those_of_the_call_before(web: Any, mask: Path, drawn: Any) -> None:
    """webuiapi keeps its last scripts unless it finds the extension."""
    m = Image.open(mask)
    size = {"width": 128, "height": 128, "seed": 1, "cfg_scale": 3.0, "prompt": "trees"}
    web.txt2img(**size, controlnet_units=units(web, {"image": m, "model": "seg"}))
    result = web.txt2img(**size)
    expected = drawn("trees", None, seed=1, guidance_scale=3.0, num_inference_steps=4)[0]
    assert (np.asarray(result.image) == expected).all()


def test_a_module_extracts_from_a_photo(web: Any, mini: Pipeline, mask: Path, drawn: Any) -> None:
    photo = drawn("a house", seed=5, num_inference_steps=8)[0]
    detected = web.controlnet_detect([Image.fromarray(photo)], module="seg_ofade20k")
    given = mini.extract("seg", photo)
    assert (np.asarray(detected.image) == given).all()
    result = web.txt2img(
        prompt="a barn", seed=1, width=128, height=128, cfg_scale=3.0,
        controlnet_units=units(web, {"image": Image.fromarray(photo), "module": "seg", "model": "seg"}),
    )  # fmt: skip
    expected = mini("a barn", Control("seg", given), seed=1, guidance_scale=3.0, num_inference_steps=4).images[0]
    assert (np.asarray(result.image) == expected).all()


def test_image_to_image(web: Any, mini: Pipeline, drawn: Any) -> None:
    first = drawn("a house", seed=5, num_inference_steps=8)[0]
    result = web.img2img(
        images=[Image.fromarray(first)], prompt="at night", seed=2, width=128, height=128, cfg_scale=3.0, steps=8,
        denoising_strength=0.5,
    )  # fmt: skip
    expected = mini("at night", init_image=first, strength=0.5, seed=2, guidance_scale=3.0, num_inference_steps=8)
    assert (np.asarray(result.image) == expected.images[0]).all()
    assert result.info["denoising_strength"] == 0.5
    # A unit without an image takes the one to begin with, as the extension does.
    result = web.img2img(
        images=[Image.fromarray(first)], prompt="at night", seed=2, width=128, height=128, cfg_scale=3.0, steps=8,
        denoising_strength=0.5, controlnet_units=units(web, {"module": "canny", "model": "canny"}),
    )  # fmt: skip
    control = Control("canny", mini.extract("canny", first))
    ours: dict[str, Any] = {"init_image": first, "strength": 0.5, "num_inference_steps": 8}
    expected = mini("at night", control, seed=2, guidance_scale=3.0, **ours)
    assert (np.asarray(result.image) == expected.images[0]).all()


def test_what_webuiapi_asks_besides(web: Any, mini: Pipeline) -> None:
    assert web.util_get_current_model() == "miniature"
    assert web.util_get_model_names() == ["miniature"]
    assert "UniPC" in web.util_get_sampler_names() and "karras" in web.util_get_scheduler_names()
    assert web.controlnet_version() >= 2
    assert web.controlnet_model_list() == ["seg", "canny", "hed", "lineart", "depth"]
    assert web.controlnet_module_list() == ["none", "seg", "canny", "hed", "lineart", "depth"]
    web.util_set_model("miniature")
    web.util_wait_for_ready()
    web.interrupt()
    result = web.txt2img(prompt="x", width=128, height=128)
    assert web.png_info(result.image).info == result.image.info["parameters"]


def test_open_webui(serving: Any, mini: Pipeline, pixels: Any, drawn: Any) -> None:
    """Its calls as its router makes them, with Basic auth; it sends all options back, with another model."""
    server = serving(("miniature", [mini]), ("other", [mini]), app={"token": "secret"})
    auth = {"authorization": "Basic " + base64.b64encode(b"user:secret").decode()}
    client = server.client
    assert client.get("/sdapi/v1/options").status_code == 401
    options = client.get("/sdapi/v1/options", headers=auth).json()
    assert options["sd_model_checkpoint"] == "miniature"
    models = client.get("/sdapi/v1/sd-models", headers=auth).json()
    assert [(m["title"], m["model_name"]) for m in models] == [("miniature", "miniature"), ("other", "other")]
    options["sd_model_checkpoint"] = "other"
    assert client.post("/sdapi/v1/options", json=options, headers=auth).status_code == 200
    assert client.get("/sdapi/v1/options", headers=auth).json()["sd_model_checkpoint"] == "other"
    data = {"prompt": "a house", "batch_size": 2, "width": 128, "height": 128, "steps": 3, "cfg_scale": 3.0}
    answer = client.post(
        "/sdapi/v1/txt2img",
        json={**data, "negative_prompt": "snow", "sampler_name": "Euler", "scheduler": "Automatic"},
        headers=auth,
    ).json()
    info = json.loads(answer["info"])
    assert info["sd_model_name"] == "other"
    expected = drawn(
        "a house", None, negative_prompt="snow", seed=info["seed"], num_inference_steps=3, guidance_scale=3.0,
        scheduler="euler", num_images_per_prompt=2,
    )  # fmt: skip
    assert (np.stack([pixels(image) for image in answer["images"]]) == expected).all()


@pytest.mark.parametrize("name", ["controlnet", "ControlNet", "CONTROLNET"])
def test_script_names_in_any_case(server: Any, mask: Path, pixels: Any, drawn: Any, name: str) -> None:
    image = base64.b64encode(mask.read_bytes()).decode()
    unit = {"image": image, "model": "seg", "resize_mode": 0, "pixel_perfect": True, "threshold_a": 3}
    answer = server.client.post("/sdapi/v1/txt2img", json={**TINY, "alwayson_scripts": {name: {"args": [unit]}}})
    expected = drawn("a house", seed=3, num_inference_steps=2)[0]
    assert (pixels(answer.json()["images"][0]) == expected).all()
    assert answer.headers["x-ignored-fields"] == "controlnet.pixel_perfect, controlnet.threshold_a"


@pytest.mark.parametrize(("mode", "how"), [(1, "crop"), ("Crop and Resize", "crop"), ("Resize and Fill", "pad")])
def test_resize_modes(server: Any, mini: Pipeline, mask: Path, pixels: Any, mode: Any, how: str) -> None:
    from PIL import ImageOps

    wide = Image.open(mask).convert("RGB").resize((256, 128), Image.Resampling.NEAREST)
    fit = ImageOps.fit if how == "crop" else ImageOps.pad
    fitted = np.asarray(fit(wide, (128, 128), Image.Resampling.NEAREST))
    unit = {"image": png(np.asarray(wide)), "model": "seg", "resize_mode": mode}
    answer = server.client.post(
        "/sdapi/v1/txt2img", json={**TINY, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    )
    expected = mini("a house", Control("seg", fitted), seed=3, num_inference_steps=2).images[0]
    assert (pixels(answer.json()["images"][0]) == expected).all()


def test_settings_of_one_request(server: Any, pixels: Any, drawn: Any) -> None:
    body = {**TINY, "override_settings": {"CLIP_stop_at_last_layers": 2}}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    expected = drawn("a house", None, seed=3, num_inference_steps=2, clip_skip=1, clip_skip_negative=True)[0]
    assert (pixels(answer.json()["images"][0]) == expected).all()
    assert "Clip skip: 2" in json.loads(answer.json()["info"])["infotexts"][0]
    assert server.client.get("/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] == 1


def test_scores_are_in_the_info(server: Any, mask: Path) -> None:
    unit = {"image": base64.b64encode(mask.read_bytes()).decode(), "model": "seg"}
    body = {**TINY, "steps": 8, "score": True, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    info = json.loads(server.client.post("/sdapi/v1/txt2img", json=body).json()["info"])
    assert info["scores"][0][0]["metric"] == "mIoU"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"enable_hr": True}, "enable_hr is not supported"),
        ({"restore_faces": True}, "restore_faces"),
        ({"script_name": "controlnet m2m"}, "script_name"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"styles": ["mine"]}, "styles"),
        ({"width": 512, "height": 512}, "choose from 128x128"),
        ({"sampler_name": "Euler a"}, "unknown scheduler 'Euler a'"),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, "not there for Euler"),
        ({"override_settings": {"sd_vae": "x"}}, "sd_vae"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "no model 'other'"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "ADetailer"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "openpose", "image": "x"}]}}}, "openpose"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "seg"}]}}}, "image is missing"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "seg", "image": "x", "foo": 1}]}}}, "foo"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "seg", "image": "eA==", "mask": "x"}]}}}, "mask"),
        (
            {"alwayson_scripts": {"controlnet": {"args": [{"model": "seg", "image": "eA==", "control_mode": 1}]}}},
            "control_mode",
        ),
        ({"batch_size": 0}, "batch_size"),
        ({"timeout": -1}, "timeout"),
        ({"n_iter": 99}, "from 1 to 10"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(server: Any, body: Any, words: str) -> None:
    answer = server.client.post("/sdapi/v1/txt2img", json={**TINY, **body})
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert words in answer.json()["detail"]


def test_scripts_that_are_off_are_reported(server: Any) -> None:
    body = {**TINY, "alwayson_scripts": {"ADetailer": {"args": [False]}}, "eta": 0.5}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "alwayson_scripts.ADetailer, eta"
    body = {**TINY, "alwayson_scripts": {"日本\r\nX-Mine: 1": {"args": [False]}}}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.headers["x-ignored-fields"] == "alwayson_scripts.\\u65e5\\u672c X-Mine: 1"
    assert "x-mine" not in answer.headers


def test_a_prompt_has_a_limit(server: Any) -> None:
    answer = server.client.post("/sdapi/v1/txt2img", json={**TINY, "prompt": "house " * 700})
    assert answer.status_code == 400 and "chunks of 77 tokens" in answer.json()["detail"]


def test_progress_and_interrupt(serving: Any, held: Any, pixels: Any) -> None:
    server = serving(held, warm=True)
    idle = server.client.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(server.client.post, "/sdapi/v1/txt2img", json={**TINY, "steps": 10})
        held.wait_until_running()
        other = pool.submit(
            server.client.post, "/v1/images/generations", json={"prompt": "x", "num_inference_steps": 2}
        )
        told = server.client.get("/sdapi/v1/progress").json()
        assert pixels(told["current_image"]).shape == (128, 128, 3)
        assert server.client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
        state = told["state"]
        assert (state["sampling_steps"], state["job_count"]) == (10, 1)
        assert server.client.post("/sdapi/v1/interrupt").json() == {}
        assert theirs.result().status_code == 409
        held.go_on.set()
        assert other.result().status_code == 200  # another interface's requests are not theirs to interrupt


def test_control_types(server: Any) -> None:
    types = server.client.get("/controlnet/control_types").json()["control_types"]
    assert types["depth"]["default_model"] == "depth" and types["depth"]["default_option"] == "depth"
    assert server.client.get("/controlnet/settings").json()["control_net_unit_count"] >= 1
    answer = server.client.post(
        "/controlnet/detect", json={"controlnet_module": "seg", "controlnet_input_images": ["x"]}
    )
    assert answer.status_code == 400 and "detail" in answer.json()
