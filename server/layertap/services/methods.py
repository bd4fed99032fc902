"""The methods of a service, in a form that every transport can serve.

A method takes bytes and the caller, and returns bytes. Each handler decodes the request itself, so
a malformed request raises InvalidInputError as usual, and a serialized reply is passed on
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from layertap.services.answer import Answer
from layertap.services.caller import Caller

__all__ = ["Handler", "Methods", "Service", "StreamHandler", "StreamMethod", "UnaryMethod"]

Handler = Callable[[bytes, Caller], bytes | Answer]
"""Answers a unary call. The bytes of an ``Answer`` are released once the reply was sent."""

StreamHandler = Callable[[Iterator[bytes], Caller], Iterator[bytes]]
"""Answers a stream. Its iterator of messages raises CancelledError when the caller leaves."""


@dataclass(frozen=True, slots=True)
class UnaryMethod:
    """A method with one request and one reply.

    Attributes:
        handler: Answers a call.
        to_owner: Whether errors may tell callers about the operator's files.
    """

    handler: Handler
    to_owner: bool = False


@dataclass(frozen=True, slots=True)
class StreamMethod:
    """A method with a stream of requests and a stream of replies.

    Attributes:
        handler: Answers a stream.
    """

    handler: StreamHandler


Methods = Mapping[str, UnaryMethod | StreamMethod]
"""The methods of a service by name."""


class Service(Protocol):
    """What a transport needs to serve a service.

    Attributes:
        NAME: The full name of the service, such as ``layertap.v1.FeatureService``.
    """

    NAME: str

    def methods(self) -> Methods:
        """Return the methods by name."""
