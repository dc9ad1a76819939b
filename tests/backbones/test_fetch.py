"""Fetching weights from a server on loopback that misbehaves in every way, and from folders."""

import functools
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import jaxad
from jaxad import backbones
from jaxad.backbones import download, registry

NAME = "vgg13.tv_in1k"  # the registry has no sha256 of it
HUB_PATH = f"/timm/{NAME}/resolve/main/model.safetensors"


def checkpoint(seed: int = 0) -> bytes:
    """The first stage of a VGG-13, and of its classifier so much that it is several chunks."""
    rng = np.random.default_rng(seed)
    shapes = {"features.0": (64, 3, 3, 3), "features.2": (64, 64, 3, 3), "head.fc": (3000, 250)}
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return save(tensors | {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in shapes.items()})


BODY = checkpoint()
DIGEST = hashlib.sha256(BODY).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """Redirects to its files and states their sha256 like the model hub; `answers` come before the file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.digest, self.location, self.pause = BODY, DIGEST, "/file", 0.0
        self.ranges, self.answers = [], []
        self.paths = {HUB_PATH}

    def handle_error(self, request, client_address):
        """Clients that hang up are no news."""

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format, *args):
        del format, args

    def do_GET(self):
        if self.path in self.server.paths:
            self.send_response(302)
            if self.server.digest:
                self.send_header("X-Linked-Etag", f'"{self.server.digest}"')
            self.send_header("Location", self.server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/file":
            self.server.ranges.append(self.headers["Range"])
            (self.server.answers.pop(0) if self.server.answers else Handler.file)(self)
        else:
            self.send_error(404)

    def file(self, ranges=True, most=None, headers=()):
        """The file from the byte on that was asked for, up to so many bytes, with other headers; None omits one."""
        span, size = self.headers["Range"] if ranges else None, len(self.server.body)
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        if start >= size:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        usual = {"Content-Length": size - start, "Content-Range": f"bytes {start}-{size - 1}/{size}" if start else None}
        for name, value in (usual | dict(headers)).items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    self.send_header(name, str(one))
        self.end_headers()
        time.sleep(self.server.pause)
        self.wfile.write(self.server.body[start:][:most])

    def chunked(self, most, cut=0):
        """The file in chunks, up to so many bytes; without so many at the end of what is sent."""
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        parts = [self.server.body[:most][i : i + 65536] for i in range(0, most, 65536)]
        sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        self.wfile.write(sent[: len(sent) - cut])
        self.close_connection = True

    def trickle(self, start=b""):
        """Now and then a byte, until the client has enough."""
        self.wfile.write(start)
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass


def sending(**options):
    """An answer that is a file in another way."""
    return functools.partial(Handler.file, **options)


def saying(text):
    """An answer that is these bytes, and the end."""
    return lambda handler: handler.wfile.write(text)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXAD_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("JAXAD_WEIGHTS_URL", server.address)
        monkeypatch.setenv("no_proxy", "*")
        yield server
        server.shutdown()
        thread.join()


fetch = functools.partial(backbones.fetch, trust=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetch_downloads_once_and_checks_the_sha256_of_the_hub(hub, cache):
    reports = []
    path = fetch("vgg13", lambda done, total: reports.append((done, total)))
    assert path == cache / f"{NAME}.safetensors"
    assert path.read_bytes() == BODY
    assert (cache / f"{NAME}.sha256").read_text() == f"{DIGEST}  {NAME}.safetensors\n"
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert reports[-1] == (len(BODY), len(BODY))
    assert backbones.fetch(NAME) == path
    assert hub.ranges == [None]
    assert names(cache) == [f"{NAME}.safetensors", f"{NAME}.sha256"]


@pytest.mark.parametrize("digest", [DIGEST, None], ids=["stated", "unknown"])
def test_a_sha256_that_only_the_server_knows_needs_trust_and_holds_from_then_on(hub, cache, digest):
    hub.digest = digest
    words = f"but the server's own, {DIGEST}" if digest else "and the server states none"
    with pytest.raises(ValueError, match=rf"no sha256 of it is known {words}; to accept .*, add --trust"):
        backbones.fetch(NAME)
    assert names(cache) == [] and len(hub.ranges) == 1
    fetch(NAME)
    (cache / f"{NAME}.safetensors").unlink()
    hub.body, hub.digest = checkpoint(1), hashlib.sha256(checkpoint(1)).hexdigest()
    for trust in (False, True):
        with pytest.raises(ValueError, match=rf"has the sha256 {hub.digest}, expected {DIGEST}.*delete .*\.sha256 to"):
            backbones.fetch(NAME, trust=trust)
    hub.body = BODY
    assert backbones.fetch(NAME).read_bytes() == BODY


def test_the_sha256_of_the_registry_takes_precedence(hub, cache, monkeypatch):
    monkeypatch.setitem(registry.ENTRIES, NAME, registry.ENTRIES[NAME]._replace(sha256=DIGEST))
    hub.digest = "0" * 64
    assert backbones.fetch(NAME).read_bytes() == BODY


def test_a_redirect_does_not_change_the_sha256(hub, cache):
    with Hub() as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        other.body = checkpoint(1)
        stated = hashlib.sha256(other.body).hexdigest()
        other.answers, hub.location = [sending(headers={"ETag": stated})] * 2, f"{other.address}/file"
        with pytest.raises(ValueError, match=f"has the sha256 {stated}, expected {DIGEST}"):
            fetch(NAME)
        hub.digest = None
        with pytest.raises(ValueError, match="and the server states none"):
            backbones.fetch(NAME)
        other.shutdown()
        thread.join()
    assert names(cache) == []


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/file", "data:,weights", "http://[", "http://\x1b"]
)
def test_a_redirect_does_not_leave_the_web(hub, cache, location):
    hub.location = location
    with pytest.raises(ConnectionError, match=rf"^{hub.address}{HUB_PATH} cannot be .*") as caught:
        fetch(NAME)
    assert str(caught.value).isprintable() and names(cache) == []


@pytest.mark.parametrize(
    ("first", "ranges"),
    [
        (sending(most=1_000_001), [None, "bytes=1000001-"]),
        (lambda handler: handler.chunked(len(BODY), cut=1_000_000), None),
        (lambda handler: handler.chunked(1_000_000), [None, "bytes=1000000-"]),
        (sending(most=1_000_000, headers={"Content-Length": None}), [None, "bytes=1000000-"]),
        (sending(most=1_000_000, headers={"Content-Length": 1_000_000}), [None, "bytes=1000000-"]),
        (sending(headers={"Content-Length": len(BODY) + 9}), [None, f"bytes={len(BODY)}-"]),
    ],
)
def test_a_short_body_is_resumed(hub, cache, first, ranges):
    hub.answers = [first]
    assert fetch(NAME).read_bytes() == BODY
    assert len(hub.ranges) == 2 and ranges in (None, hub.ranges)
    assert names(cache) == [f"{NAME}.safetensors", f"{NAME}.sha256"]


@pytest.mark.parametrize(
    "second",
    [
        sending(ranges=False),
        sending(headers={"Content-Range": "bytes 5-9/10"}),
        sending(headers={"Content-Range": "nonsense"}),
        lambda handler: handler.chunked(len(BODY)),
    ],
)
def test_a_server_that_ignores_ranges_starts_over(hub, cache, second):
    hub.answers = [sending(most=1_000), second]
    assert fetch(NAME).read_bytes() == BODY


def test_the_next_run_resumes_what_a_failing_server_has_sent(hub, cache):
    hub.answers = [sending(most=1_000)] * 3
    with pytest.raises(ConnectionError, match=rf"broke off after 3000 of {len(BODY)} bytes: run again to resume"):
        fetch(NAME)
    assert names(cache) == [f"{NAME}.safetensors.part"]
    assert fetch(NAME).read_bytes() == BODY
    assert hub.ranges[-1] == "bytes=3000-"
    assert names(cache) == [f"{NAME}.safetensors", f"{NAME}.sha256"]


@pytest.mark.parametrize("left", [BODY, b"of another file", BODY + b"more"], ids=["whole", "other", "longer"])
def test_what_is_there_is_checked_and_replaced_if_it_is_wrong(hub, cache, left):
    cache.mkdir()
    (cache / f"{NAME}.safetensors.part").write_bytes(left)
    assert fetch(NAME).read_bytes() == BODY
    assert hub.ranges == [f"bytes={len(left)}-", None][: 1 if left == BODY else 2]
    assert names(cache) == [f"{NAME}.safetensors", f"{NAME}.sha256"]


def test_a_killed_download_is_resumed_at_once_and_a_live_one_is_waited_for(hub, cache):
    cache.mkdir()
    target, paths = cache / f"{NAME}.safetensors", []
    claim = (
        "import sys, time, pathlib; from jaxad.backbones.download import claimed, write\n"
        "with claimed(pathlib.Path(sys.argv[1])) as part: write(part, sys.stdin.buffer.read(500)); print(flush=True);"
        " time.sleep(60)"
    )
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(jaxad.__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", claim, str(target)], **streams) as other:
        other.stdin.write(BODY[:500])
        other.stdin.flush()
        other.stdout.readline()
        thread = threading.Thread(target=lambda: paths.append(fetch(NAME)))
        thread.start()
        time.sleep(0.1)
        assert hub.ranges == []
        other.kill()
        thread.join()
    assert paths[0].read_bytes() == BODY
    assert hub.ranges == ["bytes=500-"]
    assert names(cache) == [f"{NAME}.safetensors", f"{NAME}.sha256"]


def test_of_concurrent_fetches_one_downloads(hub, cache):
    hub.pause = 0.2
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.ranges == [None]
    assert [path.read_bytes() == BODY for path in paths] == [True] * 3
    assert names(cache) == [f"{NAME}.safetensors", f"{NAME}.sha256"]


def test_a_planted_link_is_not_followed(hub, cache, tmp_path):
    cache.mkdir()
    (tmp_path / "mine").write_text("precious")
    (cache / f"{NAME}.safetensors.part").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"safetensors\.part"):
        fetch(NAME)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sending(headers={"Content-Length": "many"}), "sends the bad header Content-Length: many"),
        (sending(headers={"Content-Length": "-5"}), "sends the bad header Content-Length: -5"),
        (sending(headers={"Content-Length": [5, 6]}), "sends the bad header Content-Length: 5, 6"),
        (sending(headers={"Content-Length": 10**13}), "has 10000.0 GB, but weights may have 2.1 GB at most"),
        (sending(headers={"Content-Encoding": "gzip"}), "sends the bad header Content-Encoding: gzip"),
        (saying(b"\x1b[31mgarbage\r\n\r\n"), r"cannot be reached (\x1b[31mgarbage"),
        (saying(b""), "cannot be reached (Remote end closed connection without response)"),
        (saying(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200), "cannot be reached (got more than 100 headers)"),
        (saying(b"HTTP/1.1 204 Nothing\r\n\r\n"), "cannot be fetched: HTTP 204 Nothing"),
        (lambda handler: handler.send_error(503, "Later"), "cannot be fetched: HTTP 503 Later"),
        (lambda handler: handler.trickle(), "cannot be reached (no answer within 1 s)"),
        (lambda handler: time.sleep(2), "cannot be reached ("),
        (lambda handler: handler.trickle(b"HTTP/1.1 200 OK\r\n\r\n"), "sends less than 1000 bytes/s: run again"),
        (
            lambda handler: handler.trickle(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(4_000_000)),
            "does not end after the 3.0 MB",
        ),
        (lambda handler: handler.trickle(b"HTTP/1.1 200 OK\r\n\r\n" + BODY), "does not end after the 3.2 MB that its"),
    ],
)
def test_a_misbehaving_server_is_named(hub, cache, answer, words, monkeypatch):
    hub.answers = [answer] * 3
    if words.startswith(("cannot be reached (no", "sends less")) or words.endswith("("):
        monkeypatch.setattr(download, "PATIENCE", 1)
    if "3.0 MB" in words:
        monkeypatch.setattr(download, "LARGEST", 3_000_000)
    with pytest.raises(ConnectionError, match=f"^{re.escape(f'{hub.address}{HUB_PATH} {words}')}") as caught:
        fetch(NAME)
    assert str(caught.value).isprintable()
    assert "jaxad weights import FILE" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (save({"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}), "does not fit: vgg13.tv_in1k needs the tensor"),
        (b"<html>no weights</html>", "weights must be safetensors in float types, got http://"),
    ],
    ids=["other", "page"],
)
def test_a_file_is_read_before_it_is_published(hub, cache, body, words):
    hub.body, hub.digest = body, hashlib.sha256(body).hexdigest()
    with pytest.raises(ValueError, match=words):
        fetch(NAME)
    assert names(cache) == []


@pytest.mark.parametrize(
    ("name", "digest", "message"),
    [
        (NAME, "0" * 64, f"has the sha256 {DIGEST}, expected {'0' * 64}"),
        ("resnet18", None, f"has the sha256 {DIGEST}, expected 694f673d"),
    ],
)
def test_a_wrong_sha256_leaves_nothing(hub, cache, name, digest, message):
    hub.digest, hub.paths = digest, {HUB_PATH, "/resnet18.tv_in1k.safetensors"}
    with pytest.raises(ValueError, match=message):
        fetch(name)
    assert names(cache) == []


def test_a_full_disk_is_named_and_keeps_what_is_there(hub, cache, monkeypatch):
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        download.write(full, b"weights")
    cache.mkdir()
    (cache / f"{NAME}.safetensors.part").write_bytes(BODY[:1000])
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((1, 1, 9, 9, 9, 0, 0, 0, 0, 255)))
    with pytest.raises(OSError, match=r"needs 3\.\d MB more, but the folder of the weights has room for 0.0 MB: free"):
        fetch(NAME)
    assert (cache / f"{NAME}.safetensors.part").read_bytes() == BODY[:1000]


def test_a_file_that_the_server_does_not_have(hub, cache):
    with pytest.raises(FileNotFoundError, match=r"HTTP 404.*jaxad weights import FILE"):
        backbones.fetch("resnet50")
    assert names(cache) == []


def test_no_network(hub, cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("JAXAD_WEIGHTS_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match=r"cannot be reached \(.*refused\): check the network") as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)
    assert names(cache) == []


def test_a_mirror_may_be_one_flat_folder(hub, cache):
    hub.paths, hub.digest = {f"/{NAME}.safetensors"}, None
    assert fetch(NAME).read_bytes() == BODY


@pytest.mark.parametrize("path", ["{}", "file://{}", "{}/"])
@pytest.mark.parametrize("layout", [f"{NAME}.safetensors", HUB_PATH[1:]])
def test_weights_come_from_a_local_folder_even_offline(cache, tmp_path, monkeypatch, path, layout):
    folder = tmp_path / "my weights"
    (folder / layout).parent.mkdir(parents=True)
    monkeypatch.setenv("JAXAD_WEIGHTS_URL", path.format(folder))
    monkeypatch.setenv("JAXAD_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"is a folder without .*my weights/vgg13.tv_in1k.safetensors: put"):
        backbones.fetch(NAME)
    (folder / layout).write_bytes(BODY)
    assert backbones.fetch(NAME).read_bytes() == BODY
    with monkeypatch.context() as patched:
        patched.setitem(registry.ENTRIES, NAME, registry.ENTRIES[NAME]._replace(sha256="0" * 64))
        (cache / f"{NAME}.safetensors").unlink()
        with pytest.raises(ValueError, match="expected 000"):
            backbones.fetch(NAME)
    assert names(cache) == [f"{NAME}.sha256"]


def test_an_address_that_is_neither_is_refused(cache, monkeypatch):
    for address in ("ftp://127.0.0.1", "http://", "http://[::1"):
        monkeypatch.setenv("JAXAD_WEIGHTS_URL", address)
        with pytest.raises(ValueError, match=r"must be an address with http\(s\) or a folder, got (ftp|http):"):
            fetch(NAME)


def test_offline_never_asks_the_server(hub, cache, monkeypatch):
    monkeypatch.setenv("JAXAD_OFFLINE", "1")
    with pytest.raises(OSError, match=rf"JAXAD_OFFLINE is set and {NAME} is not in .*: unset it, or download"):
        fetch(NAME)
    assert hub.ranges == []
    assert not cache.exists()
    cache.mkdir()
    (cache / f"{NAME}.safetensors").write_bytes(BODY)
    assert backbones.fetch(NAME).read_bytes() == BODY


def test_weights_without_an_official_file_cannot_be_fetched(cache):
    with pytest.raises(ValueError, match=r"resnet50.caffe_in1k has no official download; import a file"):
        fetch("resnet50.caffe_in1k")


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backbones.cache_dir() == tmp_path / "jaxad" / "weights"
