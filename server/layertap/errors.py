"""The errors of layertap, independent of any transport.

LayertapError
├── InvalidInputError              the request itself is wrong: field, got, expected
│   └── DecodeError                its bytes are not a well-formed message
├── NotFoundError
│   ├── ModelNotFoundError         no served model has that name
│   └── LayerNotFoundError         the model has no such layer
├── ExtractorUnsupportedError      the layer exists, but the chosen extractor can't serve it
├── ReplyTooLargeError             the reply would exceed the limit; checked before the pass
├── SharedMemoryLostError          a reference to shared memory that is not leased to the caller
├── OverloadedError                the queue is full
├── UnauthenticatedError           the call came without a valid token
├── PermissionDeniedError          the token does not give the right to make this call
├── UnavailableError               the server is starting, stopping or can't be reached
├── DeadlineExceededError          the deadline passed
├── CancelledError                 the caller cancelled or disconnected
├── ModelRunError                  the model itself failed on a well-formed input
├── ModelLoadError                 a model can't be loaded
│   └── WeightsUnavailableError    its weights can't be found or read
├── ConfigError                    the configuration is invalid
└── InternalError                  a fault of layertap; the server's log has the details

``layertap.services.error_codes`` maps each to a code, which each transport maps to its own.
``layertap.client`` maps gRPC's statuses back.
"""

from __future__ import annotations

__all__ = [
    "CancelledError",
    "ConfigError",
    "DeadlineExceededError",
    "DecodeError",
    "ExtractorUnsupportedError",
    "InternalError",
    "InvalidInputError",
    "LayerNotFoundError",
    "LayertapError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelRunError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "ReplyTooLargeError",
    "SharedMemoryLostError",
    "UnauthenticatedError",
    "UnavailableError",
    "WeightsUnavailableError",
]


class LayertapError(Exception):
    """The base class of all errors that layertap raises on purpose."""


class InvalidInputError(LayertapError):
    """The request is wrong; the message names the field, what was got and what was expected.

    Args:
        text: The message. With ``image``, it is prefixed by ``images[3]: ``, for example.
        image: The index in the request of the image that is wrong.

    Attributes:
        image: The index of the image; None if the error is not about one image.
    """

    def __init__(self, text: str = "", *, image: int | None = None) -> None:
        super().__init__(text if image is None else f"{_image_prefix(image)}{text}")
        self.image = image

    @property
    def detail(self) -> str:
        """The message without the index of the image, for callers who know the image's name."""
        return str(self).removeprefix("" if self.image is None else _image_prefix(self.image))


def _image_prefix(index: int) -> str:
    return f"images[{index}]: "


class DecodeError(InvalidInputError):
    """The bytes are not a well-formed message."""


class NotFoundError(LayertapError):
    """Something that a request names does not exist."""


class ModelNotFoundError(NotFoundError):
    """No served model has that name; the message lists the served models."""


class LayerNotFoundError(NotFoundError):
    """The model has no such layer; the message suggests close matches."""


class ExtractorUnsupportedError(LayertapError):
    """The extractor can't serve the layer; the message says why, and which extractors can."""


class ReplyTooLargeError(LayertapError):
    """The reply would be larger than the limit; nothing was computed."""


class SharedMemoryLostError(LayertapError):
    """The session, region or lease doesn't belong to the sender (any more); send the tensor."""


class OverloadedError(LayertapError):
    """The server's queue is full; try again later.

    Attributes:
        retry_after: Seconds after which the server allows a retry; negative if it forbids one, None
            if it doesn't say.
    """

    retry_after: float | None = None


class UnauthenticatedError(LayertapError):
    """The server requires a token, and the call has no valid one."""


class PermissionDeniedError(LayertapError):
    """The caller is known, or needs no token, but may not make this call."""


class UnavailableError(LayertapError):
    """The server is starting, draining or can't be reached.

    Attributes:
        refused: Whether the server is certainly not working on the call: it could not be reached,
            or it refused or ended the call itself. False if the connection broke during the call.
    """

    refused: bool = False


class DeadlineExceededError(LayertapError):
    """The deadline of the call has passed."""


class CancelledError(LayertapError):
    """The caller cancelled or disconnected before the answer was ready."""


class ModelRunError(LayertapError):
    """The model failed on an input that passed all checks."""


class ModelLoadError(LayertapError):
    """A model can't be loaded; the message says what to do."""


class WeightsUnavailableError(ModelLoadError):
    """A model's weights can't be found or read; the message says what to do."""


class ConfigError(LayertapError):
    """The configuration is wrong; the message names the key."""


class InternalError(LayertapError):
    """A fault of layertap itself; the server's log has the details under the request id."""
