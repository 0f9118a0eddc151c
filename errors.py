"""The error types of cnpp-trt.

Every message is one line that says what is wrong and what to do. `UserError` is what the caller can mend (a bad
argument, a wrong or damaged file, a full disk): the command exits with status 2. Any other `CnppError` is a failure:
status 1.
"""


class CnppError(Exception):
    """Something failed; the message says what and what to do."""


class UserError(CnppError, ValueError):
    """The request, a file or an argument cannot be used as given."""


class BundleError(UserError):
    """A bundle is missing, incomplete, damaged or of another version."""


class ExportError(CnppError):
    """A checkpoint could not be turned into a bundle that matches it."""


class BackendError(CnppError):
    """A backend cannot run here, or a graph failed while running."""


class DeviceMemoryError(BackendError):
    """What was asked for does not fit into the device's free memory."""


class Cancelled(CnppError):
    """A request was stopped by its caller; the pipeline can go on with others."""

    def __init__(self, message: str = "the request was cancelled") -> None:
        super().__init__(message)
