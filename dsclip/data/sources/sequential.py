"""A file that is read once from its beginning to its end, also from servers that answer no range requests."""

from __future__ import annotations

import http.client
import time

from dsclip.data.sources.storage import SourceError, Storage, Stream, is_remote, redact

SKIPPED_BYTES = 1 << 20  # at a time, on the way to where a connection broke off


class SequentialFile:
    """What `tarfile` reads a stream from. A connection that breaks is made again, `storage.retries` times in a row.

    waited_s: how long reads of a remote file took. failure: what ended reading, if something did.
    """

    def __init__(self, storage: Storage, location: str):
        self._storage, self._location = storage, location
        self._remote = is_remote(location)
        self._file: Stream | None = None
        self._length: int | None = None  # by the server
        self._position, self._pushed = 0, b""
        self.waited_s = 0.0
        self.failure: str | None = None

    def __repr__(self) -> str:
        return redact(self._location)

    def push_back(self, content: bytes) -> None:
        """What `read` gives first."""
        self._pushed = content

    def read(self, size: int) -> bytes:
        """Up to `size` bytes: fewer only where the file ends. Raises SourceError."""
        if self._pushed:
            content, self._pushed = self._pushed[:size], self._pushed[size:]
            return content + (self.read(size - len(content)) if len(content) < size else b"")
        started = time.monotonic()
        try:
            return self._again(size)
        except SourceError as error:
            self.failure = str(error)
            raise
        finally:
            if self._remote:
                self.waited_s += time.monotonic() - started

    def close(self) -> None:
        """Lets go of the file or connection."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _again(self, size: int) -> bytes:
        pause = self._storage.pause_s
        for left in range(self._storage.retries if self._remote else 0, -1, -1):
            try:
                content = self._read(size)
            except SourceError:
                raise
            except Exception as error:  # urllib3, http.client, ssl, socket and every object store's own
                self.close()
                if not left:
                    raise SourceError(redact(f"{self._location}: {type(error).__name__}: {error}")) from None
                time.sleep(pause)
                pause *= 2
            else:
                self._position += len(content)
                return content
        raise SourceError(redact(f"{self._location} can't be read"))

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file, self._length = self._storage.open(self._location)
            for start in range(0, self._position, SKIPPED_BYTES):  # without ranges, the way there is to be read again
                self._whole(self._file, start, min(SKIPPED_BYTES, self._position - start))
        return self._whole(self._file, self._position, size)

    def _whole(self, file: Stream, start: int, size: int) -> bytes:
        """A read may give less than there is; an end before the file's is that of a connection."""
        content = b""
        while len(content) < size and (part := file.read(size - len(content))):
            content += part
        expected = size if self._length is None else min(size, self._length - start)
        if len(content) < expected and (self._length is not None or start < self._position):
            raise http.client.IncompleteRead(content, expected - len(content))
        return content
