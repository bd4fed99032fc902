"""The errors of layertap, independent of any transport.

LayertapError
├── InvalidInputError              the request itself is wrong: field, got, expected
│   └── DecodeError                its bytes are not a well-formed message
├── NotFoundError
│   ├── ModelNotFoundError         no model of that name is served
│   └── LayerNotFoundError         the model has no such layer
├── ExtractorUnsupportedError      the layer exists, but the chosen extractor can't serve it
├── ReplyTooLargeError             the reply would exceed the limit; checked before the pass
├── SharedMemoryLostError          a reference to shared memory that is not leased to the caller
├── OverloadedError                the queue is full
├── UnauthenticatedError           the call came without a valid token
├── PermissionDeniedError          the token has no right to what was called
├── UnavailableError               the server is starting, stopping or can't be reached
├── DeadlineExceededError          the deadline passed
├── CancelledError                 the caller cancelled or disconnected
├── ModelRunError                  the model itself failed on a well-formed input
├── ModelLoadError                 a model can't be loaded
│   └── WeightsUnavailableError    its weights can't be had
├── ConfigError                    the configuration is invalid
└── InternalError                  a fault of layertap; the server's log has the details

``layertap.services.error_codes`` maps each to a code, which each transport maps to its own;
``layertap.client`` maps gRPC's status back.
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
    """The root: ``except LayertapError`` catches whatever layertap raises on purpose."""


class InvalidInputError(LayertapError):
    """The request is wrong; the message names the field, what was got and what was expected.

    Args:
        text: The message. With ``image``, ``images[3]: `` goes in front of it.
        image: The index in the request of the image that is wrong.

    Attributes:
        image: The same; None if the error is not about one image.
    """

    def __init__(self, text: str = "", *, image: int | None = None) -> None:
        super().__init__(text if image is None else f"{_image_prefix(image)}{text}")
        self.image = image

    @property
    def detail(self) -> str:
        """The message without the index of the image, for callers who know a better name for it."""
        return str(self).removeprefix("" if self.image is None else _image_prefix(self.image))


def _image_prefix(index: int) -> str:
    return f"images[{index}]: "


class DecodeError(InvalidInputError):
    """The bytes are not a well-formed message."""


class NotFoundError(LayertapError):
    """Something that was requested by name does not exist."""


class ModelNotFoundError(NotFoundError):
    """No model of that name is served; the message lists those that are."""


class LayerNotFoundError(NotFoundError):
    """The model has no such layer; the message offers close matches."""


class ExtractorUnsupportedError(LayertapError):
    """The chosen extractor can't serve the layer; the message says why and which ones can."""


class ReplyTooLargeError(LayertapError):
    """The reply would be larger than the limit; nothing was computed."""


class SharedMemoryLostError(LayertapError):
    """The session, region or lease is not, or no longer, the sender's; send the tensor itself."""


class OverloadedError(LayertapError):
    """The server's queue is full; try again later.

    Attributes:
        retry_after: Seconds after which the server asks to be called again; negative where it asks
            not to be, None if it says nothing.
    """

    retry_after: float | None = None


class UnauthenticatedError(LayertapError):
    """The server requests a token, and none that it knows came with the call."""


class PermissionDeniedError(LayertapError):
    """The caller is known, or anonymous callers are welcome, but may not call this."""


class UnavailableError(LayertapError):
    """The server is starting, draining or can't be reached."""


class DeadlineExceededError(LayertapError):
    """The time given to the call ran out."""


class CancelledError(LayertapError):
    """The caller went away before the answer was ready."""


class ModelRunError(LayertapError):
    """The model failed on an input that looked right."""


class ModelLoadError(LayertapError):
    """A model can't be loaded; the message says what to do."""


class WeightsUnavailableError(ModelLoadError):
    """A model's weights can't be had; the message says what to do."""


class ConfigError(LayertapError):
    """The configuration is wrong; the message names the key."""


class InternalError(LayertapError):
    """A fault of layertap's own; the server's log has the details under the request id."""
