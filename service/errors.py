"""What a client is told when a request is not served: a status of HTTP, and a line that says what to do."""

import re
from dataclasses import dataclass

from ..errors import BackendError, Cancelled, CnppError, DeviceMemoryError, UserError
from ..messages import printable
from ..schema import SchemaError


class ServiceError(CnppError):
    """A request is refused.

    Attributes:
        status: of HTTP.
        code: one word for programs, as OpenAI's errors have it.
        param: the field that is wrong, or None.
        retry_after: seconds after which the same request may be accepted, or None.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


@dataclass(frozen=True)
class Refusal:
    """An error as every interface tells it, each in its own shape.

    Attributes:
        status, code, param, retry_after: as in `ServiceError`.
        message: one line.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None

    @classmethod
    def of(cls, error: BaseException) -> "Refusal":
        """What is told of an exception; nothing of those that are no `CnppError`, whose texts may hold anything."""
        text = printable(error, 1000)
        if isinstance(error, ServiceError):
            return cls(error.status, text, error.code, error.param, error.retry_after)
        if isinstance(error, SchemaError):
            return cls(400, f"the request cannot be used: {text}", "invalid_request", _field(text))
        if isinstance(error, UserError):
            return cls(400, text, "invalid_request", _named_field(text))
        if isinstance(error, Cancelled):
            return cls(409, text, "cancelled")
        if isinstance(error, DeviceMemoryError):
            return cls(503, text, "out_of_memory", retry_after=10)
        if isinstance(error, BackendError | CnppError):
            return cls(500, text, "failed")
        return cls(500, "the server failed: its log says more", "server_error")


def busy(message: str, retry_after: float) -> ServiceError:
    """The error of a full queue; `retry_after` in seconds is rounded up to whole ones."""
    return ServiceError(429, message, code="queue_full", retry_after=max(1, -int(-retry_after // 1)))


def unknown_field(name: str, where: str) -> ServiceError:
    """The error of a field that nobody knows."""
    shown = printable(repr(name), 80)
    return ServiceError(400, f"unknown field {shown} in {where}: leave it out", code="unknown_field", param=name[:80])


def refused_field(name: str, why: str) -> ServiceError:
    """The error of a field that is known and not implemented."""
    return ServiceError(400, f"{name} {why}", code="unsupported_field", param=name)


def _field(message: str) -> str | None:
    """The field that a message of msgspec's names."""
    found = re.search(r"(?:unknown|required) field `([^`]{1,80})`", message) or re.search(
        r"at `\$\.([^`]{1,80})`", message
    )
    return found[1] if found else None


def _named_field(message: str) -> str | None:
    """Messages of `Request` and `Control` begin with the name of the field."""
    found = re.match(r"(?:unknown )?([a-z]+(?:_[a-z]+)*)\b", message)
    return found[1] if found and found[1] in _FIELDS else None


_FIELDS = frozenset(
    (
        "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "seed", "strength",
        "clip_skip", "num_images_per_prompt", "controlnet_conditioning_scale", "control_guidance_start",
        "control_guidance_end",
        "condition", "controls",
    )
)  # fmt: skip
