"""Listening on a Unix socket: the file's mode, replacing stale sockets, and removing the file.

Note [How the file is created and removed]
    Before gRPC's core binds a socket, it removes any socket at that path, even one that another
    server uses. When it stops it removes the path again, even if another server has taken it over.
    And if a socket is bound first and gets its mode later, others can connect in between. So gRPC
    binds in a folder that only this user may enter; the file gets its mode there and is then moved
    to its path. When the server stops, the path is removed only if it is still that file.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from layertap.errors import UnavailableError

__all__ = ["UnixSocket"]

_log = logging.getLogger(__name__)

_PATH_BYTES = 107
"""Maximum length of a Unix socket's address (``sun_path`` of unix(7), minus its final zero)."""


class UnixSocket:
    """A socket file that the server listens on.

    Args:
        path: The path of the file. A socket without a listener is replaced.
        mode: The file's permissions, which decide who may connect: ``0o600`` for this user only.
        bind: Binds and listens on an address such as ``unix:/path``; raises RuntimeError if it
            can't.

    Raises:
        UnavailableError: If another server listens there, another file is there, or the system
            refuses.
    """

    def __init__(self, path: Path, mode: int, bind: Callable[[str], object]) -> None:
        self.path = path.absolute()
        _check_free(self.path)
        try:
            self._identity = _bind(self.path, mode, bind)
        except OSError as error:
            raise _refused(self.path, error.strerror or str(error)) from error
        except RuntimeError as error:  # Raised by gRPC, which logs the reason itself.
            raise _refused(self.path, "see the log") from error

    def close(self) -> None:
        """Remove the file, unless it has been replaced by another one."""
        try:
            found = self.path.lstat()
            if (found.st_dev, found.st_ino) == self._identity:
                self.path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("can't remove the socket %s: %s", self.path, error.strerror)


def _bind(path: Path, mode: int, bind: Callable[[str], object]) -> tuple[int, int]:
    """Bind a socket file, set its mode and move it to its path; return its device and inode."""
    folder = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))
    try:
        made = folder / "s"
        for each in (made, path):
            if len(os.fsencode(each)) > _PATH_BYTES:
                raise _refused(path, f"the path is too long for a socket ({_PATH_BYTES} bytes)")
        bind(f"unix:{made}")
        made.chmod(mode)
        found = made.lstat()
        made.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found.st_dev, found.st_ino


def _check_free(path: Path) -> None:
    """Raise UnavailableError unless a path is free or has a socket without a listener."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise _refused(path, "the path exists and is not a socket; it was not changed")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            _log.info("replacing the stale socket %s", path)
            return
        except FileNotFoundError:  # The file was removed just now.
            return
        except OSError as error:
            raise _refused(path, error.strerror or str(error)) from error
    raise _refused(path, "another server listens there")


def _refused(path: Path, reason: str) -> UnavailableError:
    return UnavailableError(f"can't listen on unix:{path}: {reason}")
