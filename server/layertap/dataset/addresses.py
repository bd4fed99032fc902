"""Files at addresses such as ``s3://bucket/photos``, through fsspec.

A path without a scheme is a file of this machine and never gets here.

Note [What an address may fail with]
    An item that is not there, or that may not be read, is that item's failure. Anything else, such
    as a network that is down, says nothing about the item: it is UnavailableError, for which a run
    tries the batch again for a while, and then ends without having left anything out.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from layertap.errors import ConfigError, InvalidInputError, LayertapError, UnavailableError

__all__ = [
    "address_errors",
    "address_stamp",
    "file_system",
    "found_at",
    "is_address",
    "local_path",
    "open_address",
    "read_address",
    "read_range",
    "suffix_of",
]

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(::.*)?://")
_CHAIN = re.compile(r"^[a-zA-Z0-9+.-]+::|::[a-zA-Z][a-zA-Z0-9+.-]*://")
_WEB = ("http", "https")
_REFUSED_STATUS = range(400, 500)
_STAMPS = (
    *("ETag", "etag", "md5Hash", "crc32c", "generation", "blob_id", "Content-MD5"),
    *("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created"),
)
"""What file systems call that which changes with a file."""


def is_address(path: str) -> bool:
    """Return whether a path is an address with a scheme, such as ``s3://bucket/a.jpg``."""
    return _SCHEME.match(path) is not None


def local_path(path: str) -> str:
    """Return the path that an address such as ``file:///a.npz`` means; any other as it is."""
    return file_system(path)[1] if path.startswith(("file://", "local://")) else path


def suffix_of(path: str) -> str:
    """Return the suffix of a path or an address in lower case, such as ``.jpg``."""
    if is_address(path) and path.partition(":")[0].lower() in _WEB:
        path = urlsplit(path).path
    name = path.rpartition("/")[2]
    return name[name.rindex(".") :].lower() if "." in name[1:] else ""


def file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it.

    Raises:
        ConfigError: If fsspec, or the library for this scheme, is not installed.
        InvalidInputError: For an unknown scheme, a chained address, or one with a password.
    """
    _check(address)
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"address {address}: needs fsspec; install it with: pip install 'layertap[fsspec]'"
        ) from error
    try:
        return fsspec.core.url_to_fs(address)  # type: ignore[no-any-return]
    except ImportError as error:
        raise ConfigError(f"address {address}: {error}") from error
    except ValueError as error:
        raise InvalidInputError(f"address {address}: {error}") from error


def _check(address: str) -> None:
    if _CHAIN.search(address):
        raise InvalidInputError(f"address {address}: got a chain of file systems, expected one")
    try:
        password = urlsplit(address).password
    except ValueError as error:
        raise InvalidInputError(f"address {address}: {error}") from error
    if password:
        shown = re.sub(r"//[^@/]*@", "//…@", address)
        raise InvalidInputError(
            f"address {shown}: got a password, which would be in the ids of the output; give it to "
            f"fsspec in its own configuration or in the environment"
        )


def found_at(address: str, suffixes: frozenset[str]) -> list[str] | None:
    """Return the files that an address names, as addresses in the order of their names.

    Args:
        address: A file; a folder, whose files with one of the suffixes are taken with those of all
            folders below; or a glob.
        suffixes: Suffixes in lower case.

    Returns:
        None if there is nothing.

    Raises:
        ConfigError, InvalidInputError: See ``file_system``.
        UnavailableError: See Note [What an address may fail with].
    """
    fs, path = file_system(address)
    with address_errors(address):
        # In the addresses of web pages, a question mark begins the query.
        signs = "*" if address.partition(":")[0].lower() in _WEB else "*?["
        if any(sign in path for sign in signs) and not fs.exists(path):
            return sorted(_named(fs, each) for each in fs.glob(path)) or None
        if _is_folder(fs, path):
            return sorted(_named(fs, each) for each in fs.find(path) if _taken(each, suffixes))
        return [address] if fs.exists(path) else None


def _is_folder(fs: Any, path: str) -> bool:
    if "http" in _protocols(fs):  # Any page with links would pass for a folder.
        return path.endswith("/")
    return bool(fs.isdir(path))


def _taken(path: str, suffixes: frozenset[str]) -> bool:
    name = path.rpartition("/")[2]
    return suffix_of(name) in suffixes and not fnmatch.fnmatch(name, ".*")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _named(fs: Any, path: str) -> str:
    return str(fs.unstrip_protocol(path))


def address_stamp(address: str) -> str:
    """Return the size of a file and what else its file system says of its content.

    It is empty if there is no such file.
    """
    fs, path = file_system(address)
    try:
        with address_errors(address):
            info = fs.info(path)
    except InvalidInputError:
        return ""
    return " ".join(str(info[key]) for key in ("size", *_STAMPS) if info.get(key) is not None)


def read_address(address: str) -> bytes:
    """Return the content of a file.

    Raises:
        InvalidInputError: If it is not there, or may not be read.
        UnavailableError: See Note [What an address may fail with].
    """
    fs, path = file_system(address)
    with address_errors(address):
        return bytes(fs.cat_file(path))


def read_range(address: str, begin: int, size: int) -> bytes:
    """Return some bytes of a file; fewer if it ends before. For errors see ``read_address``."""
    fs, path = file_system(address)
    with address_errors(address):
        raw = bytes(fs.cat_file(path, start=begin, end=begin + size)) if size else b""
    if len(raw) > size:
        # The answer is the whole file, not its beginning at ``begin``.
        raise InvalidInputError(
            f"{address}: the server does not send parts of a file; download the file"
        )
    return raw


def open_address(address: str) -> Any:
    """Open a file for reading at any place. For errors see ``read_address``."""
    fs, path = file_system(address)
    with address_errors(address):
        return fs.open(path, "rb")


@contextmanager
def address_errors(address: str) -> Iterator[None]:
    """Convert the errors of a file system; see Note [What an address may fail with]."""
    try:
        yield
    except LayertapError:
        raise
    except FileNotFoundError as error:
        raise InvalidInputError(f"{address}: no such file") from error
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise InvalidInputError(f"{address}: {error.strerror or error}") from error
    except ImportError as error:
        raise ConfigError(f"address {address}: {error}") from error
    except Exception as error:
        # Each library has errors of its own, such as aiohttp's and botocore's.
        if getattr(error, "status", None) in _REFUSED_STATUS:
            raise InvalidInputError(f"{address}: {error}") from error
        raise UnavailableError(f"{address}: {type(error).__name__}: {error}") from error
