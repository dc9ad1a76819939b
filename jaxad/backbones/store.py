"""Where weight files lie: in the user's cache and in the package. This module does not import JAX."""

import os
from pathlib import Path
from typing import NamedTuple

from jaxad.backbones import registry


class Weights(NamedTuple):
    """A set of weights that `load` knows by name."""

    name: str
    plain: str | None
    """The plain name for this set, if it has one."""
    state: str
    """`cached`, `embedded` (in the package) or `not fetched`."""
    path: Path | None
    url: str | None
    """None: there is no official file; use `import_file`."""
    sha256: str | None


def cache_dir() -> Path:
    """The folder of fetched and imported weights: $JAXAD_CACHE, or jaxad/weights in the user's cache folder."""
    if folder := os.environ.get("JAXAD_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxad" / "weights"


def programs_dir() -> Path:
    """The folder of compiled programs: $JAXAD_CACHE/programs, or jaxad/programs in the user's cache folder."""
    return cache_dir() / "programs" if os.environ.get("JAXAD_CACHE") else cache_dir().with_name("programs")


def available() -> list[Weights]:
    """All registered weights and their location."""
    rows = []
    for entry in registry.ENTRIES.values():
        path = next((p for p in places(entry) if p.is_file()), None)
        state = "not fetched" if path is None else "cached" if path.parent == cache_dir() else "embedded"
        plain = entry.architecture if registry.PLAIN[entry.architecture] is entry else None
        rows.append(Weights(entry.name, plain, state, path, entry.url, entry.sha256))
    return rows


def places(entry: registry.Entry) -> tuple[Path, ...]:
    """Where the weights can be: the cache, the package."""
    return cache_dir() / f"{entry.name}.safetensors", Path(__file__).with_name(f"{entry.name}.safetensors")
