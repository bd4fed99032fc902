"""Addresses that only this machine can reach are recognised; IPv6 hosts get brackets."""

from __future__ import annotations

import pytest

from layertap.addresses import bare_host, host_port, is_loopback, target_is_loopback


@pytest.mark.parametrize(
    ("host", "bare", "bound"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:80"),
        ("localhost", "localhost", "localhost:80"),
        ("::1", "::1", "[::1]:80"),
        ("[::1]", "::1", "[::1]:80"),
        ("::", "::", "[::]:80"),
    ],
)
def test_ipv6_hosts_are_bracketed_once(host: str, bare: str, bound: str) -> None:
    """Brackets separate an IPv6 address's own colons from the port's."""
    assert bare_host(host) == bare
    assert host_port(host, 80) == bound


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback_hosts_are_known(host: str) -> None:
    """Every loopback address, in each spelling, and its name."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.evil", ""])  # noqa: S104
def test_other_hosts_are_no_loopback(host: str) -> None:
    """The wildcard address, other addresses, and names that only resemble the loopback's."""
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:8001",
        "localhost:8001",
        "localhost",
        "[::1]:8001",
        "dns:localhost:8001",
        "dns:///127.0.0.1:8001",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:8001",
        "unix:/run/layertap",
        "unix:relative",
    ],
)
def test_targets_on_this_machine_are_known(target: str) -> None:
    """gRPC's ways to write a target that stays on this machine."""
    assert target_is_loopback(target)


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:8001",
        "example.org:443",
        "dns://127.0.0.1/localhost:8001",
        "dns:///example.org",
        "ipv4:127.0.0.1:1,10.0.0.1:2",
        "ipv6:[2001:db8::1]:8001",
        "xds:///localhost",
        "localhost.example.org:8001",
        "",
    ],
)
def test_targets_elsewhere_are_not_taken_for_local(target: str) -> None:
    """A list with one other address, a DNS name or an unknown scheme may leave this machine."""
    assert not target_is_loopback(target)
