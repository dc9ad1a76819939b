"""Weight files of the user, the cache and the package: fetches, imports, checks and reads them.

Only safetensors with torchvision's or timm's names are read; nothing is ever unpickled. Environment variables:
`JAXAD_CACHE` (the folder of the files), `JAXAD_OFFLINE=1` (never use the network), `JAXAD_WEIGHTS_URL` (a mirror of the
hub, or a folder of files).
"""

import hashlib
import io
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from jaxad.backbones import download, registry
from jaxad.backbones.download import Progress
from jaxad.backbones.networks import backbone
from jaxad.backbones.store import cache_dir, of_file, places, resolve, variant_of
from jaxad.base import Frozen


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
    variant = variant_of(entry, path) or entry
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
        ValueError: The file in the cache is not the one that was fetched or imported.
    """
    path = _locate(name, weights)
    return {"path": str(path), "sha256": _digest(path, None if weights else _pinned(path))}


def import_file(path: str | Path, name: str | None = None) -> Path:
    """Copies a weights file into the cache, after a check against the architecture.

    Args:
        path: A safetensors file in float32, float16 or bfloat16 with torchvision's or timm's names.
        name: The backbone that it belongs to; None takes the stem of the file (`resnet50.tv_in1k.safetensors`).

    Returns:
        The file in the cache.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no safetensors file, belongs to another architecture, or has integers or NaN for weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}: give a safetensors file")
    entry = registry.lookup(of_file(path) if name is None else resolve(name, path))
    _refuse_others(entry.name, path)
    target = cache_dir() / f"{entry.name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with download.claimed(target) as part:
        _copy(path, part)
        _publish(entry, part, target, str(path))
    return target


def fetch(name: str, progress: Progress | None = None, trust: bool = False) -> Path:
    """Downloads official weights into the cache, unless they are there; an interrupted download is resumed.

    The file appears under its name only when it is complete, its sha256 is right and it fits the architecture. Of any
    number of processes that fetch the same weights at once, one downloads and the others wait for it.

    Args:
        name: A backbone.
        progress: Called with the bytes so far and the total.
        trust: Accept a file of which jaxad knows no sha256. Its sha256 is kept beside it and holds from then on.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The server does not have the file.
        ValueError: There are no official weights of that name, the sha256 of the file (also of one that is there) is
            wrong, or not known without `trust`, or it belongs to another architecture.
        OSError: `JAXAD_OFFLINE` is set, the server cannot be reached, closes the connection, is too slow or sends too
            much, or the disk is full.
    """
    entry = registry.lookup(name)
    local = next((path for path in places(entry) if path.is_file()), None)
    if local is not None:
        _digest(local, _pinned(local))
        return local
    urls, target = entry.urls, cache_dir() / f"{entry.name}.safetensors"
    if not urls:
        raise ValueError(f"{entry.name} has no official download; import a file of it: jaxad weights import FILE")
    advice = f"download {urls[0]} elsewhere as {entry.name}.safetensors and run: jaxad weights import FILE"
    is_remote = "://" in urls[0]
    if is_remote and os.environ.get("JAXAD_OFFLINE", "0") not in ("", "0"):
        raise OSError(f"JAXAD_OFFLINE is set and {entry.name} is not in {cache_dir()}: unset it, or {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with download.claimed(target) as part:
        if target.is_file():  # another process was faster
            return target
        pinned = entry.sha256 or _pinned(target)
        if entry.sha256 is None and pinned:
            advice = f"delete {target.with_suffix('.sha256')} to accept another, or {advice}"
        if is_remote:
            origin = download.download(urls, part, pinned, trust, progress, advice)
        else:
            origin = _from_folder(urls, part, pinned)
        _publish(entry, part, target, origin)
    return target


def _from_folder(paths: tuple[str, ...], part: io.FileIO, pinned: str | None) -> str:
    """Copies the first of some files that exists; returns its path."""
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        raise FileNotFoundError(f"JAXAD_WEIGHTS_URL is a folder without {' or '.join(paths)}: put the file there")
    _copy(Path(path), part)
    digest = download.sha256(part)
    if digest != (pinned or digest):
        part.truncate(0)
        raise ValueError(
            f"{path} has the sha256 {digest}, expected {pinned}: give the official file, or import this one"
        )
    return path


def _pinned(target: Path) -> str | None:
    """The sha256 that a fetch or an import has kept beside the file."""
    record = target.with_suffix(".sha256")
    match = re.match("[0-9a-f]{64}(?= )", record.read_text(errors="replace")) if record.is_file() else None
    return match and match[0]


def _digest(path: Path, pinned: str | None) -> str:
    """The sha256 of a file. Raises ValueError if another one was kept beside it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != (pinned or digest):
        raise ValueError(
            f"{path} has changed since it was fetched or imported: delete it, and fetch or import it again"
        )
    return digest


def _publish(entry: registry.Entry, part: io.FileIO, target: Path, origin: str) -> None:
    """Gives a finished file its name if it fits the architecture, and writes its sha256 next to it as sha256sum does.

    The record comes first: a file is never there without it.
    """
    try:
        _read(entry.name, Path(part.name), origin)
    except ValueError:
        part.truncate(0)
        raise
    os.fsync(part)
    record = target.with_suffix(".sha256.part")
    record.write_text(f"{download.sha256(part)}  {target.name}\n")
    os.replace(record, target.with_suffix(".sha256"))
    os.replace(part.name, target)


def _copy(path: Path, part: io.FileIO) -> None:
    """Makes `part` a copy of a file."""
    part.truncate(0)
    with path.open("rb") as file:
        while chunk := file.read(download.CHUNK):
            download.write(part, chunk)


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


def _read(name: str, path: Path, origin: str | None = None) -> Frozen:
    """Reads a file; `origin` is what messages call it."""
    origin = origin or str(path)
    _refuse_others(name, path)
    try:
        tensors: dict[str, np.ndarray] = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that numpy does not have
        raise ValueError(f"weights must be safetensors in float types, got {origin}: {error}") from None
    try:
        return backbone(name).fold(tensors)
    except ValueError as error:
        raise ValueError(f"{origin} does not fit: {error}") from None


def _refuse_others(name: str, path: Path) -> None:
    """Raises ValueError for a pickle, which could run code."""
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(
            f"weights must be safetensors, got {path}; convert it where torch is installed: python -c "
            '"import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
            f'torch.load(sys.argv[1], weights_only=True).items()}}, sys.argv[2])" {path.name} {name}.safetensors'
        )
