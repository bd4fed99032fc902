"""Reports the state of the service to systemd, like ``sd_notify(3)``."""

from __future__ import annotations

import logging
import os
import socket

__all__ = ["notify"]

_log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a state such as ``READY=1`` to the service manager; do nothing if there is none.

    The protocol is one datagram to the socket named by ``$NOTIFY_SOCKET``; a leading ``@`` means
    the NUL of an abstract address. If sending fails, that is only logged, as the server itself
    works.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as error:
        _log.warning("can't notify the service manager of %s: %s", state, error.strerror or error)
