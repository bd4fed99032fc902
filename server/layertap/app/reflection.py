"""Server reflection for a bounded number of callers at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from layertap.app.places import Places

__all__ = ["REFLECTIONS", "Reflection"]

REFLECTIONS = 16
"""Calls that may be open at once. One is over in milliseconds, unless its caller leaves it open."""


class Reflection(reflection.ReflectionServicer):  # type: ignore[misc] # ships no types
    """gRPC's own, which would let anybody have all threads of the server.

    Args:
        service_names: The full names of the server's services.
    """

    def __init__(self, service_names: list[str]) -> None:
        super().__init__(service_names)
        self._places = Places(REFLECTIONS, "ask for reflection")

    def ServerReflectionInfo(  # noqa: N802 - gRPC's name
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """Describe the services."""
        with self._places.taken(context):
            yield from super().ServerReflectionInfo(request_iterator, context)
