"""The limits of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from layertap.settings import value_kinds as kinds
from layertap.settings.definition import NO_FLAG, Setting
from layertap.settings.value_kinds import MIB

__all__ = ["Limits"]

_MESSAGE = kinds.mib(1, 2047)
_MEMORY = kinds.mib(1)


@dataclass(frozen=True, slots=True)
class Limits:
    """``[limits]``: limits that are checked before any compute. Sizes are in bytes."""

    request_bytes: Annotated[
        int,
        Setting(
            "MiB of one request message.",
            _MESSAGE,
            key="request_mib",
            flag=NO_FLAG,
            memory_share=16,
        ),
    ] = 256 * MIB
    reply_bytes: Annotated[
        int,
        Setting(
            "MiB of one reply message; protobuf messages can't have 2048 or more.",
            _MESSAGE,
            key="reply_mib",
            flag=NO_FLAG,
            memory_share=4,
        ),
    ] = 1024 * MIB
    batch: Annotated[int, Setting("Items of one request.", kinds.COUNT, flag=NO_FLAG)] = 1024
    pixels: Annotated[
        int,
        Setting(
            "Pixels of one encoded image. All images of a request together may have four times as "
            "many, counted at the size in which the model takes them.",
            kinds.COUNT,
            flag=NO_FLAG,
        ),
    ] = 64 * MIB
    text_bytes: Annotated[
        int,
        Setting("Bytes of all texts of one request, in UTF-8.", kinds.COUNT, flag=NO_FLAG),
    ] = 4 * MIB
    audio_samples: Annotated[
        int,
        Setting("Samples of all recordings of one request.", kinds.COUNT, flag=NO_FLAG),
    ] = 32 * MIB
    layers: Annotated[
        int,
        Setting(
            "Selections in one request, and layers that they match.", kinds.COUNT, flag=NO_FLAG
        ),
    ] = 1024
    pending: Annotated[
        int,
        Setting(
            "Requests that wait for a compute thread or run on one; any more are refused.",
            kinds.COUNT,
            flag=NO_FLAG,
        ),
    ] = 64
    pending_bytes: Annotated[
        int,
        Setting(
            "MiB of all requests and replies in memory: received, decoded, being written or being "
            "sent.",
            _MEMORY,
            key="pending_mib",
            flag=NO_FLAG,
            memory_share=4,
        ),
    ] = 4096 * MIB
    plans: Annotated[
        int,
        Setting(
            "Plans that are kept for one model, besides those of its declared layers.",
            kinds.COUNT,
            flag=NO_FLAG,
        ),
    ] = 64
    plan_bytes: Annotated[
        int,
        Setting(
            "MiB that the weights in one model's compiled plans may take, besides the declared "
            "layers' plans; each plan counts as all of the model's weights. A model that is larger "
            "than this is compiled only for its declared layers, or if a request names a compiling "
            "extractor, and then only one such plan is kept.",
            _MEMORY,
            key="plan_mib",
            flag=NO_FLAG,
            memory_share=8,
        ),
    ] = 2048 * MIB
    streams: Annotated[int, Setting("Streams open at once.", kinds.COUNT, flag=NO_FLAG)] = 16
    stream_in_flight: Annotated[
        int,
        Setting(
            "Items of one stream that the server has read but not answered yet.",
            kinds.COUNT,
            flag=NO_FLAG,
        ),
    ] = 16
