"""What a server takes from its clients, at most."""

from dataclasses import dataclass, fields

from ..errors import UserError
from ..runtime.images.image_files import MAX_PIXELS
from ..runtime.settings.request import MAX_IMAGES, MAX_STEPS


@dataclass(frozen=True)
class Limits:
    """Bounds of requests and of what is kept for them.

    Attributes:
        queue: requests that wait for one model.
        batch: images that are drawn together, 1 to 16.
        batch_window: seconds that a worker waits for clients to come back that it has answered together.
        images: of one request, 1 to 16.
        steps: of one request, 1 to 1000.
        prompt_chunks: of 77 tokens each, in a long prompt.
        body_bytes: of the body of a request.
        pixels: of an image that a client sends.
        deadline: seconds from the acceptance of a request to its end; a client may ask for less.
        body_seconds: that a client may take to send its request.
        jobs: images of finished jobs that are kept.
        job_seconds: that a finished job is kept.

    Raises:
        UserError: a value is out of its range.
    """

    queue: int = 64
    batch: int = 4
    batch_window: float = 0.02
    images: int = 10
    steps: int = 150
    prompt_chunks: int = 8
    body_bytes: int = 32 << 20
    pixels: int = 16_777_216
    deadline: float = 300.0
    body_seconds: float = 60.0
    jobs: int = 100
    job_seconds: float = 600.0

    def __post_init__(self) -> None:
        most = {"batch": MAX_IMAGES, "images": MAX_IMAGES, "steps": MAX_STEPS, "pixels": MAX_PIXELS}
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "batch_window" else 1e-3
            top = most.get(field.name, 1e12)
            if not least <= value <= top:
                raise UserError(f"{field.name} must be from {least:g} to {top:g}, not {value!r}")
