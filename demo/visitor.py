"""One open page: what it asks for, and the one picture that it has under way."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import CnppError, UserError
from ..messages import one_line
from ..runtime.control.palette import colors_from_labels
from ..runtime.images.png_files import encode_png
from ..schema import SchemaError
from ..service.errors import Refusal
from ..service.orders import Asked, AskedControl, make_order
from ..service.reply import Reply, encode_images
from .facts import content_of, example_of, greeting
from .messages import Answer, ControlMessage, Draw, Example, Message, Stop, read_message

if TYPE_CHECKING:
    from ..runtime.control.consistency import Score
    from ..service.models import ServedModel
    from ..service.service import Service
    from ..service.tasks import Outcome, Task

logger = logging.getLogger(__name__)

_PREVIEW_SECONDS = 0.15
"""Between two previews of one picture."""


class Visitor:
    """The server's side of a page's WebSocket.

    Args:
        socket: not yet accepted.
        service: that draws.
    """

    def __init__(self, socket: WebSocket, service: "Service") -> None:
        self._socket = socket
        self._service = service
        self._owner = ("demo", socket.client.host if socket.client else "")
        self._drawing: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Answers until the page is closed; what it has under way then ends."""
        await self._socket.accept()
        try:
            await self._send(greeting(self._service))
            while True:
                frame = await self._socket.receive_bytes()
                try:
                    message, parts = read_message(frame)
                except SchemaError as e:
                    await self._refuse(0, UserError(f"the page sent what cannot be read: {e}"))
                    continue
                await self._answer(message, parts)
        except (WebSocketDisconnect, RuntimeError, KeyError):  # KeyError: a text instead of bytes
            pass
        finally:
            await self._end_drawing()

    async def _answer(self, message: Message, parts: list[bytes]) -> None:
        if isinstance(message, Draw | Stop):
            await self._end_drawing()
            if isinstance(message, Draw):
                self._drawing = asyncio.create_task(self._draw(message, parts))
            else:
                await self._send(Answer("stopped"))
            return
        try:
            model = self._service.models.find(message.model)
            if isinstance(message, Example):
                answer = await self._service.in_thread(example_of, model, message.condition, message.id)
            else:
                content = _part(parts, 1)
                answer = await self._service.in_thread(
                    content_of, model, content, message.condition, message.id, self._service
                )
        except Exception as e:
            if not isinstance(e, CnppError | SchemaError):
                logger.exception("an image could not be read: %s", one_line(e))
            await self._refuse(message.id, e)
            return
        await self._send(answer)

    async def _end_drawing(self) -> None:
        drawing, self._drawing = self._drawing, None
        if drawing is not None and not drawing.done():
            drawing.cancel()
            with suppress(asyncio.CancelledError):
                await drawing

    async def _draw(self, message: Draw, parts: list[bytes]) -> None:
        drawn: list[tuple[ServedModel, Task]] = []
        try:
            models = [self._service.models.find(name) for name in (message.model, message.compare) if name is not None]
            orders = []
            with ExitStack() as places:
                for model in models:
                    places.enter_context(self._service.place(model))
                    own = message if model is models[0] else _as_compared(message, models[0], model)
                    asked = await self._service.in_thread(asked_of, model, own, parts)
                    orders.append(await self._service.in_thread(make_order, model, asked, self._service.limits))
                for model, order in zip(models, orders, strict=True):
                    drawn.append((model, self._service.submit(model, order, None, self._owner, placed=True)))
            for model, task in drawn:
                await self._follow(message.id, model, task)
            done = [(model, task, await self._service.wait(task)) for model, task in drawn]
            await self._send(await self._service.in_thread(result_of, message.id, *done))
        except (CnppError, SchemaError) as e:
            await self._refuse(message.id, e)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the page was closed
        except Exception as e:
            logger.exception("a picture of the demo failed: %s", one_line(e))
            with suppress(Exception):
                await self._refuse(message.id, e)
        finally:
            for model, task in drawn:
                if task.cancel("the page asked for something else"):
                    model.queue.wake()

    async def _follow(self, id: int, model: "ServedModel", task: "Task") -> None:
        """Tells of the queue, of each step and of what the picture looks like, until the task has ended."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: "Task") -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        task.listen(tell)
        told: tuple[Any, ...] = ()
        shown = time.monotonic()
        while not task.ended:
            position = model.queue.position(task) if task.state == "queued" else None
            if told != (position, task.step, task.state):
                told = (position, task.step, task.state)
                answer = Answer("progress", id=id, step=task.step, steps=task.steps, position=position)
                if task.order.preview and task.step < task.steps and time.monotonic() - shown > _PREVIEW_SECONDS:
                    answer.fields["previews"] = [
                        answer.part(png) for png in await self._service.in_thread(previews_of, model, task)
                    ]
                    shown = time.monotonic()
                if task.ended:
                    return
                await self._send(answer)
            # Python 3.11's `wait_for` forgets a cancellation that comes together with what it waits for.
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await changed.wait()
            changed.clear()
            task.expire()

    async def _refuse(self, id: int, error: BaseException) -> None:
        refusal = Refusal.of(error)
        await self._send(Answer("error", id=id, message=refusal.message, field=refusal.param, code=refusal.code))

    async def _send(self, answer: Answer) -> None:
        async with self._sending:
            await self._socket.send_bytes(answer.frame())


def previews_of(model: "ServedModel", task: "Task") -> list[bytes]:
    """What each image looks like at the last step, a pixel for each of its latents; none while that is unknown."""
    pictures = [model.previewer.picture(latents) for latents in (task.latents if task.latents is not None else ())]
    return [encode_png(picture) for picture in pictures if picture is not None]


def asked_of(model: "ServedModel", message: Draw, parts: list[bytes]) -> Asked:
    """The request that a page asks for.

    Raises:
        UserError: the seed, or the labels of a painting, cannot be used.
    """
    seed = message.seed.strip()
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 20):
        raise UserError("seed must be a whole number from 0 to 18446744073709551615")
    kept = message.kept
    fields: dict[str, Any] = {} if kept is None else {name: getattr(kept, name) for name in kept.__struct_fields__}
    if message.strength is not None and message.init_image is None:
        raise UserError("strength says how much of an initial image is drawn anew: give an image to begin with")
    return Asked(
        [_control(model, control, parts) for control in message.controls],
        fields={
            **fields,
            "prompt": ", ".join(filter(None, (message.prompt.strip(), message.added_prompt.strip()))),
            "negative_prompt": message.negative_prompt.strip(),
            "num_images_per_prompt": message.images,
            "num_inference_steps": message.steps,
            "guidance_scale": message.guidance,
            "scheduler": message.scheduler,
            "seed": int(seed),
            **({} if message.strength is None else {"strength": message.strength}),
        },
        init_image=None if message.init_image is None else _part(parts, message.init_image),
        score=True,
        preview=message.preview,
    )


def result_of(id: int, *drawn: "tuple[ServedModel, Task, Outcome]") -> Answer:
    """The images with their metadata, their conditions, scores and times. Encodes: not in the event loop.

    Args:
        id: the page's number of the request.
        drawn: by the model that was asked for, and by the one that it is compared with.
    """
    model, _, outcome = drawn[0]
    result = outcome.result
    answer = Answer(
        "done",
        id=id,
        model=model.id,
        seeds=[str(seed) for seed in result.request.seeds],
        timings={"queue": outcome.waited, **result.timings},
        notes=list(dict.fromkeys(note for _, task, out in drawn for note in (*task.order.notes, *out.result.notes))),
        compared=None,
    )
    answer.fields["images"] = [answer.part(content) for content in encode_images(model, outcome, Reply())]
    answer.fields["controls"] = _rows(answer, outcome)
    for other, _, found in drawn[1:]:
        images = [answer.part(content) for content in encode_images(other, found, Reply())]
        scores = [{"condition": each.condition, "scores": _told(each.scores)} for each in found.scores]
        seconds = found.result.timings["total"]
        answer.fields["compared"] = {"model": other.id, "images": images, "controls": scores, "seconds": seconds}
    return answer


def _rows(answer: Answer, outcome: "Outcome") -> list[dict[str, Any]]:
    """Each control as it was given, and as it was found in each image again."""
    result, scores, rows = outcome.result, list(outcome.scores), []
    for control, given in zip(result.request.controls, result.control_images, strict=True):
        row: dict[str, Any] = {"condition": control.condition, "given": answer.part(encode_png(given))}
        # Scores lack those that cannot be extracted, and keep the order of the others.
        if scores and scores[0].condition == control.condition:
            found = scores.pop(0)
            row["extracted"] = [answer.part(encode_png(image)) for image in found.extracted]
            row["scores"] = _told(found.scores)
        rows.append(row)
    return rows


def _told(scores: "Sequence[Score]") -> list[dict[str, Any]]:
    return [
        {"text": str(score), "grade": score.grade, "value": score.value if np.isfinite(score.value) else None}
        for score in scores
    ]


def _as_compared(message: Draw, model: "ServedModel", other: "ServedModel") -> Draw:
    """What the other model is asked for: with its own steps, guidance and scheduler where they are not this one's."""
    if other.pipelines[0].defaults == model.pipelines[0].defaults:
        return message
    return msgspec.structs.replace(message, steps=None, guidance=None, scheduler=None)


def _control(model: "ServedModel", message: ControlMessage, parts: list[bytes]) -> AskedControl:
    if message.labels is not None:
        width, height = model.size
        labels = np.frombuffer(_part(parts, message.labels), np.uint8)
        if labels.size != width * height:
            raise UserError(f"the painting has {labels.size} pixels, not {width}x{height}: load the page again")
        image = encode_png(colors_from_labels(labels.reshape(height, width)))
    elif message.image is not None:
        image = _part(parts, message.image)
    else:
        raise UserError(f"{message.condition} has no image: paint one, upload one or take the example")
    return AskedControl(
        message.condition,
        image,
        message.extract,
        message.resize_mode,
        message.scale,
        message.start,
        message.end,
        name=f"the image of {message.condition}",
    )


def _part(parts: list[bytes], number: int) -> bytes:
    if not 0 < number < len(parts):
        raise UserError("a part of the message is missing: load the page again")
    return parts[number]
