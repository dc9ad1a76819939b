"""What nearest neighbors of the same part are worth; known_parts.json.

    python -m experiments.studies.known_parts --data MTD_FOLDER --weights resnet18.tv_in1k.safetensors

In DifferNet's split, most tiles of the test images are among the training images. Every test image is scored by the
distance to its nearest training features twice: among all training images, and without those of its own tile. Features
are PatchCore's (of some positions; the largest distance is the score) and those of Mahalanobis AD (one per image).
`--smoke` is the small variant for the tests.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import RESULTS, ROOT, origin, start
from experiments.opening import embedded, grouped
from jaxad.backbones import backbone, load, of_file
from jaxad.base import Frozen
from jaxad.data import Dataset, Preprocess, demo, open_data
from jaxad.files import write_json
from jaxad.metrics import auroc
from jaxad.ops.heatmap import patch_features
from jaxad.settings import Settings

LAYERS = ("layer1", "layer2", "layer3")


@dataclasses.dataclass
class Options:
    """Scores with and without images of the same part."""

    data: str = "mtd"
    weights: Path = Path("resnet18.tv_in1k.safetensors")
    image_size: int = 224
    stride: int = 4
    """Every so many rows and columns of patches count."""
    results: Path = RESULTS
    smoke: bool = False
    """A few small demo images and random weights."""


@jax.jit
def nearest(query: jax.Array, bank: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances of queries (q c) to the nearest rows of a bank (n c): of the own part (n), and of others."""
    squares = (query * query).sum(-1)[:, None] - 2 * query @ bank.T + (bank * bank).sum(-1)
    distances = jnp.sqrt(jnp.maximum(squares, 0))
    return jnp.where(own, distances, jnp.inf).min(1), jnp.where(own, jnp.inf, distances).min(1)


def compared(
    train: np.ndarray, test: np.ndarray, train_parts: np.ndarray, test_parts: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """The AUROC with and without the training images of the own part, and how often they are the nearest.

    Args:
        train: Features n p c.
        test: Features m p c.
        train_parts: Of the training images.
        test_parts: Of the test images.
        labels: Of the test images.
    """
    bank, parts = jnp.asarray(train.reshape(-1, train.shape[-1])), np.repeat(train_parts, train.shape[1])
    found = [
        [np.asarray(part) for part in nearest(jnp.asarray(query), bank, jnp.asarray(parts == own))]
        for query, own in zip(test, test_parts, strict=True)
    ]
    own, others = (np.stack(part) for part in zip(*found, strict=True))
    known = np.isfinite(own).any(1) & (labels == 0)
    return {
        "known_normal_images": int(known.sum()),
        "normal_images": int((labels == 0).sum()),
        "nearest_is_own": float((own < others)[known].mean()),
        "distance_ratio": float(np.median((own / others)[known])),
        "with_own": float(auroc(np.minimum(own, others).max(1), labels)),
        "without_own": float(auroc(others.max(1), labels)),
    }


def opened(options: Options) -> tuple[Dataset, Dataset]:
    """The training and the test images with their groups; of a smoke run, demo images in groups of four."""
    if options.smoke:
        data = open_data("demo", category=next(iter(demo.CATEGORIES)), preprocess=Preprocess((32, 32)))
        (split,) = data.values()

        def four(part: Dataset) -> Dataset:
            records = tuple(record._replace(group=str(i // 4)) for i, record in enumerate(part.records))
            return dataclasses.replace(part, records=records)

        assert split.train is not None and split.test is not None
        return four(split.train), four(split.test)
    (split,) = open_data(options.data, preprocess=Preprocess((options.image_size, options.image_size))).values()
    data, n = grouped(split, ROOT / "data" / "mtd_tiles.csv"), len(split.train)
    return data.subset(np.arange(n)), data.subset(np.arange(n, len(data)))


def main(options: Options) -> None:
    """Compares both features."""
    network = "resnet18" if options.smoke else of_file(options.weights)
    frozen = backbone(network).init(jax.random.key(0)) if options.smoke else load(network, options.weights)
    train, test = opened(options)
    patches, images = (
        Settings.of(name, backbone=network, layers=layers).build(train.image_size)
        for name, layers in (("patchcore", LAYERS[1:]), ("mahalanobis_ad", LAYERS))
    )

    def sampled(frozen: Frozen, image: jax.Array) -> jax.Array:
        maps = patch_features(patches.embed(frozen, image), LAYERS[1:])[..., :: options.stride, :: options.stride, :]
        return maps.reshape(*maps.shape[:-3], -1, maps.shape[-1])

    def averages(frozen: Frozen, image: jax.Array) -> jax.Array:
        return jnp.concatenate(jax.tree.leaves(images.embed(frozen, image)), -1)[..., None, :]

    features: dict[str, Any] = {}
    for name, method in {
        "patches": patches._replace(embed=sampled),
        "averages": images._replace(embed=averages),
    }.items():
        learned, tested = (embedded(method, frozen, part) for part in (train, test))
        features[name] = compared(learned, tested, np.array(train.groups), np.array(test.groups), test.labels)
        print(name, features[name], flush=True)
    write_json(options.results / "known_parts.json", {"experiment": "known_parts", "features": features, **origin()})


if __name__ == "__main__":
    start(main, Options)
