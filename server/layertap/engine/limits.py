"""What a request may ask for at most."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that hold before any compute.

    Attributes:
        request_bytes: Bytes of one request message.
        reply_bytes: Bytes of one reply message; protobuf itself ends at 2 GiB.
        batch: Items of one request.
        pixels: Pixels of one encoded image; four times as many of all that a request has, in the
            sizes in which the model takes them.
        layers: Selections of one request, and layers that they match.
        pending: Requests that wait for a compute thread or run on one.
        pending_bytes: Bytes of requests and replies that are in memory: received, decoded, being
            made or being sent.
        plans: Plans of one model that are kept besides the declared ones.
        plan_bytes: Bytes that the weights of one model's compiled plans may take besides; each is
            counted as all of the model's. A model over that is compiled only where it is declared,
            and one plan at a time where a request insists.
        streams: Streams that may be open at once.
        stream_in_flight: Items of one stream that are read and whose replies are not yet sent.
    """

    request_bytes: int = 256 * MIB
    reply_bytes: int = 1024 * MIB
    batch: int = 1024
    pixels: int = 64 * MIB
    layers: int = 1024
    pending: int = 64
    pending_bytes: int = 4096 * MIB
    plans: int = 64
    plan_bytes: int = 2048 * MIB
    streams: int = 16
    stream_in_flight: int = 16
