"""The Python client. Needs no torch."""

from layertap.client.channel import Tls, read_token
from layertap.client.client import Client
from layertap.client.features import Features

__all__ = ["Client", "Features", "Tls", "read_token"]
