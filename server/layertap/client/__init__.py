"""The Python client. Needs no torch."""

from layertap.client.aio import AsyncClient, AsyncFeatureStream
from layertap.client.channel import Tls, read_token
from layertap.client.client import Client
from layertap.client.features import Features
from layertap.client.requests import StreamRequest
from layertap.client.stream import FeatureStream

__all__ = [
    "AsyncClient",
    "AsyncFeatureStream",
    "Client",
    "FeatureStream",
    "Features",
    "StreamRequest",
    "Tls",
    "read_token",
]
