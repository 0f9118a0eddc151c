"""What a request holds once it is made."""

from cnpp_trt import Control, Request


def controls_of(request: Request) -> tuple[Control, ...]:
    """A request's controls, which are a tuple whatever they were given as."""
    assert isinstance(request.controls, tuple)
    return request.controls
