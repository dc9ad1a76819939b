"""Where weight files lie, in the user's cache and in the package, and whose they are. Does not import JAX."""

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
    """The folder of fetched and imported weights: $JAXAD_CACHE, or jaxad/weights in the user's cache folder.

    Raises:
        FileNotFoundError: The user has no home folder.
    """
    try:
        if folder := os.environ.get("JAXAD_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxad" / "weights"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder for weights: set JAXAD_CACHE to another folder") from None


def programs_dir() -> Path:
    """The folder of compiled programs: $JAXAD_CACHE/programs, or jaxad/programs in the user's cache folder."""
    return cache_dir() / "programs" if os.environ.get("JAXAD_CACHE") else cache_dir().with_name("programs")


def available() -> list[Weights]:
    """All registered weights and their location."""
    rows = []
    for entry in registry.ENTRIES.values():
        path = next((p for p in places(entry) if p.is_file()), None)
        state = "not fetched" if path is None else "embedded" if path == _embedded(entry) else "cached"
        plain = entry.architecture if registry.PLAIN[entry.architecture] is entry else None
        rows.append(Weights(entry.name, plain, state, path, entry.url, entry.sha256))
    return rows


def places(entry: registry.Entry) -> tuple[Path, ...]:
    """Where the weights can be: the cache, the package."""
    try:
        return cache_dir() / f"{entry.name}.safetensors", _embedded(entry)
    except FileNotFoundError:
        return (_embedded(entry),)


def _embedded(entry: registry.Entry) -> Path:
    return Path(__file__).with_name(f"{entry.name}.safetensors")


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
    variant = variant_of(entry, Path(weights))
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


def variant_of(entry: registry.Entry, path: Path) -> registry.Entry | None:
    """The variant of the architecture that the stem of a file names, if any."""
    variant = registry.ENTRIES.get(path.stem)
    return variant if variant is not None and variant.architecture == entry.architecture else None
