"""Bytes of shards, wherever they are: local files, https:// with range requests, s3:// and gs:// through fsspec.

No address ever reaches a shell, and an https server can't send the reader to an address inside the cluster: only public
addresses are opened, also after a redirect, unless `data.trusted_hosts` names the host.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from dsclip.errors import UserError

OBJECT_STORES = ("s3", "gs")
SCHEMES = ("https", "http", *OBJECT_STORES)
TIMEOUT_S = 60
LONGEST_PAUSE_S = 30.0
_SECRETS = re.compile(
    r"(?i)(bearer|basic|token)[ :=]+[\w.~+/=-]{6,}|hf_\w{6,}|AKIA\w{12,}|(?<=://)[^/@\s]+(?=@)|"
    r"\b(x-amz-[\w-]+|signature|sig|token|key|access_token|awsaccesskeyid)=[^&\s]+"
)


class SourceError(Exception):
    """Bytes that can't be had; retried bytes too. The message holds no secret."""


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


@dataclass(frozen=True)
class Reader:
    """Reads ranges, again after a pause when a remote read fails. retries: attempts after the first."""

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
                return os.pread(_descriptor(location), length, start)
            except OSError as error:
                raise SourceError(f"{location}: {error.strerror}") from error
        if _scheme(location) in OBJECT_STORES:
            cat = _filesystem(_scheme(location)).cat_file
            return self._again(location, lambda: cat(location, start=start, end=start + length))
        return self._again(location, lambda: self._http_range(location, start, length))

    def read_all(self, location: str, most: int) -> bytes:
        """A whole small file. Raises SourceError, also when it has more than `most` bytes."""
        size = self.size(location)
        if size > most:
            raise SourceError(f"{redact(location)} has {size:,} bytes; at most {most:,} are read")
        return self.read(location, 0, size)

    def _again(self, location: str, attempt: Callable):
        pause = self.pause_s
        for left in range(self.retries, -1, -1):
            try:
                return attempt()
            except SourceError:
                raise
            except Exception as error:  # urllib, http.client, ssl, socket and every object store's own
                permanent = isinstance(error, FileNotFoundError | PermissionError)
                permanent |= isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404, 410, 416)
                if permanent or not left:
                    raise SourceError(redact(f"{location}: {type(error).__name__}: {error}")) from None
                time.sleep(min(pause, LONGEST_PAUSE_S))
                pause *= 2

    def _http_size(self, location: str) -> int:
        with self._open(location, "HEAD") as response:
            return int(response.headers["Content-Length"])

    def _http_range(self, location: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        with self._open(location, "GET", {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            if response.status != 206:
                raise SourceError(f"{redact(location)}: the server does not answer range requests")
            promised = int(response.headers.get("Content-Length", length))
            content = response.read(min(promised, length))
            if len(content) < min(promised, length):
                raise http.client.IncompleteRead(content, min(promised, length) - len(content))
            return content

    def _open(self, location: str, method: str, headers: dict | None = None):
        self._check_host(location)
        request = urllib.request.Request(location, method=method, headers=headers or {})
        if secret := os.environ.get("DSCLIP_AUTHORIZATION"):
            request.add_unredirected_header("Authorization", secret)  # never passed on to another host
        opener = urllib.request.build_opener(_Redirects(self._check_host), urllib.request.ProxyHandler())
        return opener.open(request, timeout=TIMEOUT_S)

    def _check_host(self, location: str) -> None:
        """Raises SourceError for what isn't https to a public address and isn't trusted by name."""
        parts = urlsplit(location)
        if parts.hostname in self.trusted_hosts or parts.netloc in self.trusted_hosts:
            return
        if parts.scheme != "https":
            raise SourceError(f"{redact(location)}: only https is read; data.trusted_hosts can allow {parts.netloc}")
        for *_, address in socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM):
            if not ipaddress.ip_address(address[0].split("%")[0]).is_global:
                raise SourceError(
                    f"{redact(location)} leads to {address[0]}, which is no public address; data.trusted_hosts can allow it"
                )


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, check: Callable[[str], None]):
        self._check = check

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        self._check(newurl)
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def _scheme(location: str) -> str:
    return location.partition(":")[0].lower()


@lru_cache(maxsize=4)
def _filesystem(scheme: str):
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise SourceError(f"{scheme}:// needs a package: pip install 'dsclip[{scheme}]' ({error})") from error


_open_files: dict[tuple[int, str], int] = {}
MOST_OPEN_FILES = 256


def _descriptor(path: str) -> int:
    """An open file of this process, one of the last 256."""
    key = (os.getpid(), path)
    found = _open_files.pop(key, None)
    if found is None:
        found = os.open(path, os.O_RDONLY)
        if len(_open_files) >= MOST_OPEN_FILES:
            os.close(_open_files.pop(next(iter(_open_files))))
    _open_files[key] = found  # last used, last closed
    return found
