"""Weight files of the user, the cache and the package: fetches, imports, checks and reads them.

Only safetensors with torchvision's or timm's names are read; nothing is ever unpickled. Environment variables:
`JAXAD_CACHE` (the folder of the files), `JAXAD_OFFLINE=1` (never use the network), `JAXAD_WEIGHTS_URL` (a mirror of the
hub).
"""

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from jaxad.backbones import registry
from jaxad.backbones.networks import backbone
from jaxad.backbones.store import cache_dir, places
from jaxad.base import Frozen

ATTEMPTS = 3
TIMEOUT = 30.0
"""Seconds without an answer before a connection fails."""
ABANDONED = 600.0
"""Seconds without a write before another process may resume a partial download."""
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes so far, total bytes)."""


def resolve(name: str, weights: str | Path | None) -> str:
    """The full name of the backbone that a weights file belongs to.

    Args:
        name: A backbone, plain (`resnet50`) or full (`resnet50.caffe_in1k`).
        weights: A file, or None.

    Returns:
        The stem of the file if it names a variant of `name` (`resnet50.caffe_in1k.safetensors`), else `name`.

    Raises:
        ValueError: `name` has variants that are read differently, and neither `name` nor the file says which one it is.
    """
    entry = registry.lookup(name)
    if weights is None or name in registry.ENTRIES:
        return name
    variant = _variant(entry, Path(weights))
    if variant is not None:
        return variant.name
    variants = [other for other in registry.ENTRIES.values() if other.architecture == entry.architecture]
    if len({(variant.stride_in_1x1, variant.normalization) for variant in variants}) > 1:
        names = " or ".join(variant.name for variant in variants)
        raise ValueError(f"{weights} does not say which {name} it holds: give {names} as the backbone")
    return name


def of_file(weights: str | Path) -> str:
    """The backbone that a file is named after (`resnet18.tv_in1k.safetensors`).

    Raises:
        ValueError: No backbone has that name.
    """
    stem = Path(weights).stem
    if stem not in registry.ENTRIES and stem not in registry.PLAIN:
        raise ValueError(f"{weights} is not named after a backbone: give the backbone's name as well")
    return stem


def load(name: str, weights: str | Path | None = None, dtype: DTypeLike = jnp.float32) -> Frozen:
    """Reads the weights of a backbone from a file, else from the cache of the user, else from the package.

    Args:
        name: A backbone.
        weights: A safetensors file with torchvision's or timm's names. The deepest stages may be missing.
        dtype: The type that the network computes in; `jnp.bfloat16` halves memory and is faster on TPU and GPU.
            Features are always float32.

    Returns:
        The frozen weights, for `backbone(name).apply` and `features(name, ...)`.

    Raises:
        FileNotFoundError: The file does not exist, or this machine has no weights of that name.
        ValueError: The file is no safetensors file, or belongs to another architecture or variant.
    """
    path = _locate(name, weights)
    entry = registry.lookup(name)
    variant = _variant(entry, path) or entry
    if (variant.stride_in_1x1, variant.normalization) != (entry.stride_in_1x1, entry.normalization):
        raise ValueError(f"{path} holds the variant {variant.name}: ask for that backbone instead of {name}")
    frozen = jax.tree.map(jnp.asarray, _read(name, path))
    return frozen | {"params": jax.tree.map(lambda leaf: leaf.astype(dtype), frozen["params"])}


def source(name: str, weights: str | Path | None = None) -> dict[str, str]:
    """The file that `load(name, weights)` reads, for the record of a run.

    Returns:
        The `path` and `sha256` of the file.

    Raises:
        FileNotFoundError: As for `load`.
    """
    path = _locate(name, weights)
    return {"path": str(path), "sha256": _sha256(path)}


def import_file(path: str | Path, name: str | None = None) -> Path:
    """Copies a weights file into the cache, after a check against the architecture.

    Args:
        path: A safetensors file in float32, float16 or bfloat16 with torchvision's or timm's names.
        name: The backbone that it belongs to; None takes the stem of the file (`resnet50.tv_in1k.safetensors`).

    Returns:
        The file in the cache.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no safetensors file, or belongs to another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}: give a safetensors file")
    entry = registry.lookup(of_file(path) if name is None else resolve(name, path))
    _read(entry.name, path)
    target = cache_dir() / f"{entry.name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _temporary(target)
    try:
        shutil.copyfile(path, part)
        _publish(part, target, _sha256(part))
    finally:
        part.unlink(missing_ok=True)
    return target


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Downloads official weights into the cache, unless they are there; an interrupted download is resumed.

    The file appears under its name only when it is complete and its sha256 is right. Any number of processes may fetch
    the same weights at once: every process writes to a separate file.

    Args:
        name: A backbone.
        progress: Called with the bytes so far and the total.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The server does not have the file.
        ValueError: There are no official weights of that name, or the sha256 of the file is wrong.
        OSError: `JAXAD_OFFLINE` is set, the server cannot be reached, or it closes the connection.
    """
    entry = registry.lookup(name)
    local = next((path for path in places(entry) if path.is_file()), None)
    if local is not None:
        return local
    url = entry.url
    if url is None:
        raise ValueError(f"{entry.name} has no official download; import a file of it: jaxad weights import FILE")
    elsewhere = f"download {url} elsewhere as {entry.name}.safetensors and run: jaxad weights import FILE"
    if os.environ.get("JAXAD_OFFLINE", "0") not in ("", "0"):
        raise OSError(f"JAXAD_OFFLINE is set and {entry.name} is not in {cache_dir()}: unset it, or {elsewhere}")
    target = cache_dir() / f"{entry.name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _claim(target)
    try:
        server_sha256 = _download(url, part, progress, elsewhere)
    except BaseException:
        if part.exists():
            os.replace(part, _leftover(target))
        raise
    digest, expected = _sha256(part), entry.sha256 or server_sha256
    if digest != expected:
        part.unlink()
        reason = (
            f"has the sha256 {digest}, expected {expected}" if expected else "cannot be checked: no sha256 is known"
        )
        raise ValueError(f"{url} {reason}; it was discarded: try again, or {elsewhere}")
    _publish(part, target, digest)
    return target


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the sha256 that the hub sends when it redirects to its file server."""

    sha256: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.sha256 = _checksum(headers) or self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checksum(headers: Message) -> str | None:
    """The sha256 in the headers: the hub sends it as the tag of a file in large-file storage."""
    tags = (headers.get(key, "").strip('"') for key in ("X-Linked-Etag", "ETag"))
    return next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)


def _download(url: str, part: Path, progress: Progress | None, elsewhere: str) -> str | None:
    """Appends the missing bytes of the file to `part`; returns the sha256 that the server sends, if any."""
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    size, total, reason = 0, None, ""
    for _ in range(ATTEMPTS):
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            response = opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # nothing is left to send; the sha256 shows whether the file is right
                return redirects.sha256 or _checksum(error.headers)
            kind = FileNotFoundError if error.code == 404 else OSError
            raise kind(f"{url} cannot be fetched: HTTP {error.code} {error.reason}; {elsewhere}") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            raise ConnectionError(f"{url} cannot be reached ({cause}): check the network, or {elsewhere}") from None
        with response:
            sha256 = redirects.sha256 or _checksum(response.headers)
            start = start if response.status == 206 else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with part.open("ab" if start else "wb") as file:
                while total is None or file.tell() < total:
                    try:
                        chunk = response.read(CHUNK)
                    except (OSError, http.client.HTTPException) as error:
                        reason = f" ({error})"
                        break
                    if not chunk:
                        break
                    file.write(chunk)
                    if progress is not None:
                        progress(file.tell(), total or file.tell())
                size = file.tell()
        if total is None or size == total:
            return sha256
    raise ConnectionError(f"{url} broke off after {size} of {total} bytes{reason}: run again to resume, or {elsewhere}")


def _leftover(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")


def _claim(target: Path) -> Path:
    """A partial download for this process only: an abandoned one, taken over by an atomic rename, or a new name."""
    claimed = _temporary(target)
    for part in (_leftover(target), *target.parent.glob(f"{target.name}.*.part")):
        try:
            if part == _leftover(target) or time.time() - part.stat().st_mtime > ABANDONED:
                os.rename(part, claimed)
                break
        except FileNotFoundError:
            continue  # another process was faster
    return claimed


def _publish(part: Path, target: Path, digest: str) -> None:
    """Gives a finished file its name, and writes its sha256 next to it in the format of sha256sum."""
    os.replace(part, target)
    checksum = _temporary(target)
    checksum.write_text(f"{digest}  {target.name}\n")
    os.replace(checksum, target.with_suffix(".sha256"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _variant(entry: registry.Entry, path: Path) -> registry.Entry | None:
    """The variant of the architecture that the stem of a file names, if any."""
    variant = registry.ENTRIES.get(path.stem)
    return variant if variant is not None and variant.architecture == entry.architecture else None


def _locate(name: str, weights: str | Path | None) -> Path:
    """The file that `load` reads."""
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"no weights file {path}; `jaxad weights list` shows those known by name")
        return path
    entry = registry.lookup(name)
    for path in places(entry):
        if path.is_file():
            return path
    fetch_or = f"run `jaxad weights fetch {name}`, or " if entry.url else ""
    raise FileNotFoundError(f"the weights {entry.name} are not on this machine: {fetch_or}give a file (--weights PATH)")


def _read(name: str, path: Path) -> Frozen:
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(
            f"weights must be safetensors, got {path}; convert it where torch is installed: python -c "
            '"import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
            f'torch.load(sys.argv[1], weights_only=True).items()}}, sys.argv[2])" {path.name} {name}.safetensors'
        )
    try:
        tensors: dict[str, np.ndarray] = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights must be safetensors, got {path}: {error}") from None
    try:
        return backbone(name).fold(tensors)
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from None
