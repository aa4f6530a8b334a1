"""Bytes of shards, wherever they are: local files, https:// with range requests, s3:// and gs:// through fsspec.

No address ever reaches a shell, and an https server can't send the reader to an address inside the cluster: see
`http`. `data.trusted_hosts` allows private hosts and plain http.
"""

from __future__ import annotations

import http.client
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import urllib3

from dsclip.data.sources.http import RefusedAddress, request
from dsclip.errors import UserError

T = TypeVar("T")

OBJECT_STORES = ("s3", "gs")
SCHEMES = ("https", "http", *OBJECT_STORES)
PERMANENT = (400, 401, 403, 404, 410, 416)  # answers that don't change when one asks again
LONGEST_PAUSE_S = 30.0
MOST_OPEN_FILES = 256
_SECRETS = re.compile(
    r"(?i)(bearer|basic|token)[ :=]+[\w.~+/=-]{6,}|hf_\w{6,}|AKIA\w{12,}|(?<=://)[^/@\s]+(?=@)|"
    r"\b(x-amz-[\w-]+|signature|sig|token|key|access_token|awsaccesskeyid)=[^&\s]+"
)


class SourceError(Exception):
    """Bytes that can't be had; retried bytes too. The message holds no secret."""


class MissingSource(SourceError):
    """There is no such file."""


class _Refused(Exception):
    """An answer that may be another one the next time."""


def redact(text: str) -> str:
    """The text without what looks like a token, a signature or a password."""
    return _SECRETS.sub("[secret]", text)


def is_remote(location: str) -> bool:
    """Whether it is an address. Raises UserError for addresses that are never opened."""
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", location)
    if not scheme:
        return False
    if scheme[1].lower() not in SCHEMES or not location[scheme.end() :].startswith("//"):
        raise UserError(f"{redact(location)}: only files, https://, s3:// and gs:// are read; pipes are never opened")
    if "@" in urlsplit(location).netloc:
        raise UserError(
            f"{redact(location)}: no passwords in addresses, they end up in logs; put `Bearer TOKEN` into the environment "
            "variable DSCLIP_AUTHORIZATION"
        )
    return True


class Stream(Protocol):
    """What is read from its beginning to its end."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""

    def close(self) -> None:
        """Lets go of it."""


@dataclass(frozen=True)
class Storage:
    """How bytes are had: ranges are read again after a pause when a remote read fails. retries: attempts after the first."""

    trusted_hosts: tuple[str, ...] = ()
    retries: int = 5
    pause_s: float = 0.5  # before the first retry; doubles each time

    def size(self, location: str) -> int:
        """Bytes of a file. Raises SourceError."""
        if not is_remote(location):
            try:
                return os.stat(location).st_size
            except OSError as error:
                raise SourceError(f"{location}: {error.strerror}") from error
        if _scheme(location) in OBJECT_STORES:
            return self._again(location, lambda: int(_filesystem(_scheme(location)).size(location)))
        return self._again(location, lambda: self._http_size(location))

    def read(self, location: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`: fewer only where the file ends. Raises SourceError."""
        if not is_remote(location):
            try:
                return os.pread(_open_file(os.getpid(), location).descriptor, length, start)
            except OSError as error:
                raise SourceError(f"{location}: {error.strerror}") from error
        if _scheme(location) in OBJECT_STORES:
            cat: Callable[..., bytes] = _filesystem(_scheme(location)).cat_file
            return self._again(location, lambda: cat(location, start=start, end=start + length))
        return self._again(location, lambda: self._http_range(location, start, length))

    def open(self, location: str) -> tuple[Stream, int | None]:
        """(a file that is read from its beginning on, its length where a server says it). Raises SourceError."""
        if not is_remote(location):
            try:
                return open(location, "rb"), None
            except OSError as error:
                raise SourceError(f"{location}: {error.strerror}") from error
        if _scheme(location) in OBJECT_STORES:
            return self._again(location, lambda: _filesystem(_scheme(location)).open(location, "rb")), None
        response = self._again(location, lambda: self._ask(location, "GET"))
        length = response.headers.get("Content-Length")
        return response, None if length is None else int(length)

    def read_all(self, location: str, most: int) -> bytes:
        """A whole small file. Raises SourceError, also when it has more than `most` bytes."""
        if is_remote(location) and _scheme(location) not in OBJECT_STORES:
            content = self.read(location, 0, most + 1)  # one round trip
        else:
            size = self.size(location)
            if size > most:
                raise SourceError(f"{redact(location)} has {size:,} bytes; at most {most:,} are read")
            # A local one is opened anew: the file may have been replaced since a descriptor was kept.
            content = self.read(location, 0, size) if is_remote(location) else _read_file(location)
        if len(content) > most:
            raise SourceError(f"{redact(location)} has more than {most:,} bytes, the most that are read")
        return content

    def _again(self, location: str, attempt: Callable[[], T]) -> T:
        pause, left = self.pause_s, self.retries
        while True:
            try:
                return attempt()
            except SourceError:
                raise
            except RefusedAddress as error:
                raise SourceError(redact(f"{location}: {error}")) from None
            except FileNotFoundError as error:
                raise MissingSource(redact(f"{location}: {error}")) from None
            except Exception as error:  # urllib3, http.client, ssl, socket and every object store's own
                if isinstance(error, PermissionError | ValueError) or not left:
                    raise SourceError(redact(f"{location}: {type(error).__name__}: {error}")) from None
                time.sleep(min(pause, LONGEST_PAUSE_S))
                pause, left = 2 * pause, left - 1

    def _http_size(self, location: str) -> int:
        response = self._ask(location, "HEAD")
        response.release_conn()
        return int(response.headers["Content-Length"])

    def _http_range(self, location: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        response = self._ask(location, "GET", {"Range": f"bytes={start}-{start + length - 1}"})
        if response.status != 206:
            response.close()
            raise SourceError(f"{redact(location)}: the server does not answer range requests")
        promised = int(response.headers.get("Content-Length", length))
        content = response.read(min(promised, length))
        if promised <= length:
            response.release_conn()
        else:
            response.close()
        if len(content) < min(promised, length):
            raise http.client.IncompleteRead(content, min(promised, length) - len(content))
        return content

    def _ask(self, location: str, method: str, headers: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
        """The answer, when it is none of an error."""
        headers = dict(headers or {})
        if secret := os.environ.get("DSCLIP_AUTHORIZATION"):
            headers["Authorization"] = secret
        response = request(location, method, headers, self.trusted_hosts)
        if response.status < 400:
            return response
        answer = f"HTTP {response.status} {response.reason or ''}".rstrip()
        response.close()
        if response.status in PERMANENT:
            kind = MissingSource if response.status in (404, 410) else SourceError
            raise kind(redact(f"{location}: {answer}"))
        raise _Refused(answer)


def _scheme(location: str) -> str:
    return location.partition(":")[0].lower()


@lru_cache(maxsize=4)
def _filesystem(scheme: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise SourceError(f"{scheme}:// needs a package: pip install 'dsclip[{scheme}]' ({error})") from error


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error


class _OpenFile:
    """A file that is open until nobody reads it any more."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=MOST_OPEN_FILES)
def _open_file(process: int, path: str) -> _OpenFile:
    """One of the files that this process read last: a read costs no opening."""
    return _OpenFile(os.open(path, os.O_RDONLY))


LOCAL = Storage()
