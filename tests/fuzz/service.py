"""Bodies and images that clients send to the server: every interface, asked as uvicorn asks it."""

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
from cnpp_trt.errors import UserError
from cnpp_trt.messages import printable
from cnpp_trt.runtime.pipeline import Pipeline
from hypothesis import strategies as st
from PIL import Image

from .kind import Kind, Place
from .mutations import damaged, documents

_BOUNDARY = b"a-boundary"


def _form(image: bytes) -> bytes:
    """A multipart form of an edit, as OpenAI's client sends it."""
    texts = {"prompt": "a house", "condition": "seg", "seed": "1", "num_inference_steps": "1", "n": "1"}
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in texts.items()]
    head = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return b"".join(b"--" + _BOUNDARY + b"\r\n" + p + b"\r\n" for p in (*parts, head + image)) + b"--a-boundary--\r\n"


def _bodies(image: str) -> dict[str, dict[str, Any]]:
    """What each path takes, with an image in base64."""
    drawn = {"prompt": "a (red:1.2) house", "num_inference_steps": 2, "seed": 3}
    control = {"condition": "depth", "image": image, "extract": False, "controlnet_conditioning_scale": 0.5}
    unit = {"model": "seg", "image": image, "module": "none", "weight": 1.0, "resize_mode": "Just Resize"}
    web = {"prompt": "x", "steps": 2, "width": 64, "height": 64, "sampler_name": "DDIM", "cfg_scale": 2, "seed": 1}
    scripts = {"controlnet": {"args": [unit]}}
    return {
        "/v1/images/generations": {
            **drawn, "condition": "seg", "control_image": image, "n": 2, "size": "64x64", "score": True,
            "output_format": "jpeg", "return_conditions": True, "scheduler": "ddim", "guidance_scale": 2.0,
            "init_image": image, "strength": 0.5,
        },
        "/v1/jobs": {**drawn, "preview": True, "controls": [control, {**control, "condition": "seg"}]},
        "/sdapi/v1/txt2img": {**web, "alwayson_scripts": scripts, "override_settings": {"sd_model_checkpoint": "tiny"}},
        "/sdapi/v1/img2img": {**web, "init_images": [image], "denoising_strength": 0.5, "alwayson_scripts": scripts},
        "/sdapi/v1/options": {"sd_model_checkpoint": "tiny", "CLIP_stop_at_last_layers": 1},
        "/sdapi/v1/png-info": {"image": image},
        "/controlnet/detect": {"controlnet_module": "seg", "controlnet_input_images": [image]},
    }  # fmt: skip


def service(place: Place) -> Kind:
    """A body with changed fields, or with a damaged image, or a damaged form: an answer, or one line and no 5xx."""
    import httpx  # other kinds are tried where the server's packages are not installed
    from cnpp_trt.service.app import create_app
    from cnpp_trt.service.limits import Limits
    from cnpp_trt.service.service import Service

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = buffer.getvalue()
    bodies = _bodies(base64.b64encode(image).decode())
    served = Service(
        [("tiny", [Pipeline.open(place.bundle, "onnxruntime-cpu", threads=1)])], Limits(images=2, steps=2, queue=8)
    )
    served.start(warm=False)
    transport = httpx.ASGITransport(create_app(served, access_log=False), raise_app_exceptions=False)
    loop = asyncio.new_event_loop()

    async def post(path: str, content: bytes, kind: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            return await client.post(path, content=content, headers={"content-type": kind})

    def attempt(example: tuple[str, str, bytes]) -> None:
        path, kind, content = example
        if kind == "image":
            text = json.dumps(bodies[path]).replace(bodies["/sdapi/v1/png-info"]["image"], "@")
            content, kind = text.replace("@", base64.b64encode(content).decode()).encode(), "application/json"
        answer = loop.run_until_complete(post(path, content, kind))
        if answer.status_code >= 500:
            raise AssertionError(f"{answer.status_code} {answer.text[:500]}")
        if answer.status_code >= 400:
            told = answer.json()
            message = (
                told["error"]["message"] if "error" in told and isinstance(told["error"], dict) else told["detail"]
            )
            assert message == printable(message, 2_000), "an unprintable message"
            raise UserError(message)

    form = f"multipart/form-data; boundary={_BOUNDARY.decode()}"
    documented = [st.tuples(st.just(p), st.just("application/json"), documents(body)) for p, body in bodies.items()]
    pictured = [st.tuples(st.just(p), st.just("image"), damaged(image)) for p in bodies if p != "/sdapi/v1/options"]
    forms = st.tuples(st.just("/v1/images/edits"), st.just(form), damaged(_form(image)))
    return Kind(st.one_of(*documented, *pictured, forms), attempt, lambda e: f"{e[0]} {e[1]} {e[2][:1_500]!r}")
