"""Downloads over HTTP: resumed where they broke off, limited in size and patience, checked against a sha256.

This module does not import JAX.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

ATTEMPTS = 3
"""Connections that may break off one after another without bringing a chunk."""
PATIENCE = 20.0
"""Seconds without an answer before a connection fails, and over which the rate is measured."""
SLOWEST = 1000
"""Bytes a second below which a download is given up."""
LARGEST = 2 << 30
"""Bytes of the largest file that is accepted; the largest registered weights have 1.4e9."""
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes so far, total bytes)."""


class _MissingError(Exception):
    """The server does not have the file, or does not give it away."""


class _Answer(NamedTuple):
    """What a server answers to a request for a file from some byte on."""

    body: http.client.HTTPResponse | None
    """None: the server has no bytes from there on."""
    start: int
    total: int | None
    sha256: str | None
    """What the server that was asked states, not those that it redirects to."""


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[io.FileIO]:
    """Opens the partial download of a file for this process alone; waits while another one has it.

    The lock goes with the process, so what a killed one has left can be resumed at once. An empty file is deleted.
    """
    part = target.with_name(f"{target.name}.part")
    while True:
        with io.FileIO(
            part, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        ) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                continue  # the other process has published or deleted it
            try:
                yield file
            finally:
                if _size(file) == 0 and _is_at(file, part):
                    part.unlink()
            return


def download(
    urls: tuple[str, ...], file: io.FileIO, pinned: str | None, trust: bool, progress: Progress | None, advice: str
) -> str:
    """Completes a file from the first address that has it.

    Args:
        urls: Addresses of the same file.
        file: What is there of it. What a broken connection has brought stays in it; what is wrong is deleted.
        pinned: The sha256 that the file must have; None takes the word of the server, if `trust` allows it.
        trust: Accept a file whose sha256 nobody but the server knows.
        progress: Called with the bytes so far and the total.
        advice: What else the user can do, for messages.

    Returns:
        The address.

    Raises:
        FileNotFoundError: No server has the file.
        ValueError: The sha256 is wrong, or not known and `trust` is not given.
        OSError: A server cannot be reached, breaks off, is too slow or sends too much, or the disk is full.
    """
    status = _MissingError()
    for url in urls:
        resumed = _size(file) > 0
        try:
            stated = _complete(url, file, pinned is not None or trust, progress, advice)
        except _MissingError as error:
            status = error
            continue
        digest = sha256(file)
        if resumed and digest != (pinned or stated or digest):  # it began as another file
            file.truncate(0)
            stated = _complete(url, file, True, progress, advice)
            digest = sha256(file)
        if digest != (pinned or stated or digest):
            file.truncate(0)
            raise ValueError(
                f"{url} has the sha256 {digest}, expected {pinned or stated}; it was discarded: try again, or {advice}"
            )
        return url
    raise FileNotFoundError(f"{' and '.join(urls)} cannot be fetched: {status}; {advice}")


def sha256(file: io.FileIO) -> str:
    """The sha256 of an open file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write(file: io.FileIO, content: bytes) -> None:
    """Appends to an unbuffered file. Raises OSError with its name if the disk is full."""
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from None


def _complete(url: str, file: io.FileIO, trusted: bool, progress: Progress | None, advice: str) -> str | None:
    """Appends the missing bytes of the file; returns the sha256 that the server states, if any."""
    stated, failures, furthest = None, 0, _size(file)
    while True:
        answer = _ask(url, _size(file), advice)
        stated = stated or answer.sha256
        with answer.body or contextlib.nullcontext():
            if not trusted:
                word = f"but the server's own, {stated}" if stated else "and the server states none"
                raise ValueError(
                    f"{url} cannot be checked: no sha256 of it is known {word}; to accept the file and keep its sha256 "
                    f"from now on, add --trust, or {advice}"
                )
            if answer.body is None:  # nothing is left to send; the sha256 shows whether the file is right
                return stated
            _check_size(url, answer, file, advice)
            file.truncate(answer.start)
            file.seek(answer.start)
            reason = _receive(url, answer, file, progress, advice)
        size, total = _size(file), max(answer.total or 0, _announced(file) or 0)
        if not reason and size >= total:
            return stated
        failures = 0 if size > furthest + CHUNK else failures + 1
        furthest = max(furthest, size)
        if failures == ATTEMPTS or size == answer.start:
            of = f" of {total}" if total else ""
            raise ConnectionError(f"{url} broke off after {size}{of} bytes{reason}: run again to resume, or {advice}")


def _receive(url: str, answer: _Answer, file: io.FileIO, progress: Progress | None, advice: str) -> str:
    """Writes the body of an answer until it ends; returns why it broke off, or nothing."""
    assert answer.body is not None
    window_start, window_bytes, size, limit = time.monotonic(), 0, answer.start, None
    while answer.total is None or size < answer.total:
        try:
            chunk = answer.body.read1(CHUNK)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f" ({_line(error)})"
        if not chunk:
            break
        write(file, chunk)
        size, window_bytes = size + len(chunk), window_bytes + len(chunk)
        if limit is None and size > CHUNK:  # the beginning is there
            limit = min(_announced(file) or LARGEST, LARGEST)
        if limit is not None and size > limit:
            file.truncate(0)
            raise ConnectionError(f"{url} does not end after the {limit / 1e6:.1f} MB that its weights have: {advice}")
        if progress is not None:
            progress(size, answer.total or size)
        elapsed = time.monotonic() - window_start
        if elapsed > PATIENCE:
            if window_bytes < SLOWEST * elapsed:
                raise ConnectionError(f"{url} sends less than {SLOWEST} bytes/s: run again to resume, or {advice}")
            window_start, window_bytes = time.monotonic(), 0
    return ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Stays on the web, and remembers the sha256 that the hub sends when it redirects to its file server."""

    def __init__(self, url: str) -> None:
        self._url, self.sha256 = url, None

    def http_error_302(self, req, fp, code, msg, headers):
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except (ValueError, OSError):
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.sha256 = self.sha256 or self.stated(req.full_url, headers)
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise urllib.error.URLError(f"it redirects to {newurl}, which is not {' or '.join(allowed)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def stated(self, url: str, headers: Message) -> str | None:
        """The sha256 in the headers, if the server that was asked has sent them."""
        return _checksum(headers) if urlsplit(url)[:2] == urlsplit(self._url)[:2] else None


def _checksum(headers: Message) -> str | None:
    """The sha256 in the headers: the hub sends it as the tag of a file in large-file storage."""
    tags = (headers.get(key, "").strip('"') for key in ("X-Linked-Etag", "ETag"))
    return next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)


def _ask(url: str, start: int, advice: str) -> _Answer:
    """Requests a file from a byte on.

    Raises:
        _MissingError: The server does not have it.
        ConnectionError: The server cannot be reached, or its answer makes no sense.
    """
    redirects = _Redirects(url)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        body = _within(PATIENCE, lambda: urllib.request.build_opener(redirects).open(request, timeout=PATIENCE))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return _Answer(None, start, None, redirects.sha256 or redirects.stated(error.url, error.headers))
        status = f"HTTP {error.code} {_line(error.reason)}"
        if error.code in (401, 403, 404, 410):
            raise _MissingError(status) from None
        raise ConnectionError(f"{url} cannot be fetched: {status}; {advice}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = _line(getattr(error, "reason", None) or error or type(error).__name__)
        raise ConnectionError(f"{url} cannot be reached ({cause}): check the network, or {advice}") from None
    sha256 = redirects.sha256 or redirects.stated(body.url, body.headers)
    if body.status not in (200, 206):
        body.close()
        raise ConnectionError(f"{url} cannot be fetched: HTTP {body.status} {_line(body.reason)}; {advice}")
    try:
        length = _header(body.headers, "Content-Length", r"\d{1,18}")
        _header(body.headers, "Content-Encoding", "identity")
        if body.status == 206:
            _header(body.headers, "Content-Range", rf"bytes {start}-\d+/(\d+|\*)")
    except ValueError as error:
        body.close()
        if start:
            return _ask(url, 0, advice)
        raise ConnectionError(f"{url} {error}; {advice}") from None
    start = start if body.status == 206 else 0
    total = None if length is None or body.chunked else start + int(length)
    return _Answer(body, start, total, sha256)


def _header(headers: Message, name: str, pattern: str) -> str | None:
    """A header that must have a certain form if it is there. Raises ValueError if it has another, or several."""
    values = {value.strip() for value in headers.get_all(name, [])}
    if any(re.fullmatch(pattern, value, re.ASCII) is None for value in values) or len(values) > 1:
        raise ValueError(f"sends the bad header {name}: {_line(', '.join(sorted(values)))}")
    return next(iter(values), None)


def _line(text: object) -> str:
    """What a server has sent, as one short line without control characters."""
    return ascii(str(text))[1:-1][:200]


def _within(seconds: float, call: Callable[[], http.client.HTTPResponse]) -> http.client.HTTPResponse:
    """Calls a function that may take no longer; a socket's timeout does not end headers that trickle in."""
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _check_size(url: str, answer: _Answer, file: io.FileIO, advice: str) -> None:
    """Raises OSError if the file is larger than weights are, or than the disk has room for."""
    if answer.total is None:
        return
    if answer.total > LARGEST:
        raise ConnectionError(
            f"{url} has {answer.total / 1e9:.1f} GB, but weights may have {LARGEST / 1e9:.1f} GB at most; {advice}"
        )
    disk = os.fstatvfs(file.fileno())
    room, missing = disk.f_bavail * disk.f_frsize, answer.total - answer.start
    if missing > room:
        raise OSError(
            f"{url} needs {missing / 1e6:.1f} MB more, but the folder of the weights has room for {room / 1e6:.1f} MB: "
            "free some, or set JAXAD_CACHE to another folder"
        )


def _announced(file: io.FileIO) -> int | None:
    """The size that the beginning of a safetensors file states, whatever the server says; None if it states none."""
    try:
        length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        tensors = json.loads(os.pread(file.fileno(), min(length, CHUNK), 8))
        return 8 + length + max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name[:2] != "__")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _size(file: io.FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _is_at(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
