"""Golden files: what another implementation gives for inputs that both know. Needs numpy alone."""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).with_name("golden")
KEPT = 128
"""Entries of a large array that are stored."""

RANGES = {"weight": (0.5, 1.5), "running_var": (0.5, 1.5), "global_scale": (8, 12)}
"""Of vectors, by the end of their name; others are between -0.3 and 0.3."""


class Golden(NamedTuple):
    """A golden file."""

    reference: str
    """The implementation and its version, or repository and commit."""
    given: dict[str, np.ndarray]
    """What both implementations start from, as the other one has it (b c h w)."""
    expected: dict[str, np.ndarray]
    """What the other one gives, by "quantity" or "quantity/part": the entries that are `kept`."""


def synthetic(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random float32 tensor for that name in a torch checkpoint, scaled so that activations stay in range.

    One that has only one axis longer than 1 is drawn as a vector, with the same numbers in any such shape.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if np.prod(shape) != max(shape, default=1):
        return (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    low, high = RANGES.get(name.rpartition(".")[2], (-0.3, 0.3))
    return random.uniform(low, high, shape).astype(np.float32)


def normal(name: str, *shape: int) -> np.ndarray:
    """Random float32 numbers of deviation 1, for that name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def pixels(name: str, *shape: int) -> np.ndarray:
    """Random images of 256 levels, for that name."""
    return np.clip(128 + 60 * normal(name, *shape), 0, 255).astype(np.uint8)


def fill(module: Any) -> None:
    """Gives every tensor of a torch module's state the values of `synthetic`; counters stay as they are."""
    import torch  # pyright: ignore[reportMissingImports]

    tensors = module.state_dict()
    new = {k: torch.from_numpy(synthetic(k, tuple(v.shape))) for k, v in tensors.items() if v.is_floating_point()}
    module.load_state_dict(tensors | new)


def kept(array: Any) -> np.ndarray:
    """The entries of a large array that are stored: evenly spread, including the first and the last."""
    flat = np.asarray(array).reshape(-1)
    return flat if flat.size <= KEPT else flat[np.linspace(0, flat.size - 1, KEPT).astype(int)]


def plain(value: Any) -> np.ndarray:
    """An array of numpy or torch, in float32 unless it holds integers."""
    array = np.asarray(value.detach() if hasattr(value, "detach") else value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def write(name: str, reference: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Writes a golden file.

    Args:
        name: The method, or "method-part".
        reference: The implementation and its version, or repository and commit.
        given: Inputs that `normal` and `synthetic` do not make, whole.
        expected: Arrays by "quantity" or "quantity/part"; of large ones, the entries that are `kept`.
    """
    results = {key: kept(plain(value)) for key, value in expected.items()}
    index = json.dumps({"reference": reference, "expected": {key: value.size for key, value in results.items()}})
    flat = np.concatenate([value.astype(np.float32) for value in results.values()])
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, index=np.array(index), expected=flat, **{k: plain(v) for k, v in given.items()})
    print(path, path.stat().st_size, "bytes")


def read(name: str) -> Golden:
    """Reads a golden file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        given = dict(file)
    index, flat = json.loads(str(given.pop("index"))), given.pop("expected")
    ends = np.cumsum(list(index["expected"].values()))
    return Golden(index["reference"], given, dict(zip(index["expected"], np.split(flat, ends[:-1]), strict=True)))


def names() -> list[str]:
    """Of all golden files."""
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


def method_of(name: str) -> str:
    """The method that a golden file is about."""
    return name.partition("-")[0]


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference as a share of their largest value; of a large array, that of the entries that are kept.

    Raises:
        ValueError: The sizes differ.
    """
    a, b = kept(ours).astype(np.float64), theirs.astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the size must be {b.size}, got {a.size}")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))
