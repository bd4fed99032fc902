"""Parses and formats addresses: IPv6 in brackets, Unix sockets, and local addresses."""

from __future__ import annotations

import ipaddress

__all__ = [
    "TARGET",
    "bare_host",
    "host_port",
    "is_loopback",
    "is_unix",
    "may_be_several",
    "target_is_loopback",
    "unix_path",
]

TARGET = "127.0.0.1:8001"
"""The default address of a server."""

# gRPC reads anything else before a colon as a host name.
_SCHEMES = ("dns", "ipv4", "ipv6")
_LOCAL_SCHEMES = ("unix", "unix-abstract")


def bare_host(host: str) -> str:
    """Return the host without the brackets that URLs put around an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def host_port(host: str, port: int) -> str:
    """Return ``host:port``, with brackets if the host is an IPv6 address."""
    bare = bare_host(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def is_unix(address: str) -> bool:
    """Return whether an address is a Unix socket's: ``unix:path`` or ``unix-abstract:name``."""
    scheme, colon, _ = address.partition(":")
    return bool(colon) and scheme in _LOCAL_SCHEMES


def unix_path(address: str) -> str:
    """Return the path of ``unix:path`` or ``unix:///path``; empty for any other address."""
    scheme, _, path = address.partition(":")
    if scheme != "unix":
        return ""
    return path.removeprefix("//") if path.startswith("///") else path


def is_loopback(host: str) -> bool:
    """Return whether a host can only be reached from this machine; true for Unix sockets too."""
    if is_unix(host):
        return True
    bare = bare_host(host)
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare.lower() == "localhost"


def may_be_several(target: str) -> bool:
    """Return whether a gRPC target may stand for several servers: names and lists with a scheme."""
    scheme, colon, _ = target.partition(":")
    return bool(colon) and scheme in _SCHEMES


def target_is_loopback(target: str) -> bool:
    """Return whether a gRPC target stays on this machine; False if that can't be determined.

    Targets are those of gRPC's naming document: ``host:port``, ``dns:///host:port``,
    ``ipv4:a:port,b:port``, ``ipv6:[a]:port`` and ``unix:path``.
    """
    scheme, colon, rest = target.partition(":")
    if is_unix(target):
        return True
    if not colon or scheme not in _SCHEMES:
        return is_loopback(_host_of(target))
    if rest.startswith("//"):
        # The authority is the name server to ask, which may give any answer for any name.
        authority, _, rest = rest[2:].partition("/")
        if authority:
            return False
    return all(is_loopback(_host_of(each)) for each in rest.split(","))


def _host_of(address: str) -> str:
    if address.startswith("["):
        return address.partition("]")[0] + "]"
    return address.partition(":")[0] if address.count(":") == 1 else address
