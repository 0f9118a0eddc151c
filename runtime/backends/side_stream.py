"""A second stream, for a launch that runs beside those of the first one: forked from it and joined by events."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cuda import Cuda


class SideStream:
    """The second stream. Fork and join are captured with what runs between them.

    Args:
        cuda: whose stream it stands beside.
        device, stream: cuda.core's own.

    Attributes:
        handle: of the second stream.
    """

    def __init__(self, cuda: "Cuda", device: Any, stream: Any) -> None:
        self._cuda = cuda
        self._main = stream
        self._side = cuda.call(device.create_stream)
        self.handle = int(self._side.handle)
        self._forked, self._ended = cuda.call(device.create_event), cuda.call(device.create_event)
        self._pending = False

    def fork(self) -> None:
        """What is launched on the second stream from now on begins when the first one has come here."""
        self._cuda.call(self._main.record, self._forked)
        self._cuda.call(self._side.wait, self._forked)
        self._pending = True

    def join(self) -> None:
        """What is launched on the first stream from now on begins when the second one has come here."""
        if self._pending:
            self._pending = False
            self._cuda.call(self._side.record, self._ended)
            self._cuda.call(self._main.wait, self._ended)

    def forget(self) -> None:
        """A capture failed: there is nothing to join."""
        self._pending = False
