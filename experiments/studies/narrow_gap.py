"""What makes new parts look less strange, chosen on held-out tiles of the training set; narrow_gap.json.

    python -m experiments.studies.narrow_gap --data MTD_FOLDER --weights resnet18.tv_in1k.safetensors

In each split the methods learn from most training tiles of `MTD_TILES`, and score normal images of other tiles, images
of the same tiles, and synthetic anomalies on the former (CutPaste's rectangles and scars). Tried are: scaling every
image to one mean brightness, adding mirrored copies to the training images, and subtracting from the features of an
image their own median over all positions. No test image is read. `--smoke` is the small variant for the tests.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import RESULTS, ROOT, origin, progress, start
from experiments.opening import grouped, split_by_part
from jaxad.backbones import backbone, load, of_file
from jaxad.base import Frozen, Method
from jaxad.data import Dataset, Preprocess, demo, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit
from jaxad.driver.scoring import score_all
from jaxad.files import write_json
from jaxad.metrics import auroc
from jaxad.settings import Settings
from jaxad.synthesis.cutpaste import cutpaste, scar

Change = Callable[[np.ndarray], np.ndarray]
METHODS: dict[str, dict[str, Any]] = {
    "patchcore": {"coreset_sampling_ratio": 0.01},
    "padim": {},
    "mahalanobis_ad": {"layers": ("layer1", "layer2", "layer3")},
}


@dataclasses.dataclass
class Options:
    """Normalization and augmentation for new parts."""

    data: str = "mtd"
    weights: Path = Path("resnet18.tv_in1k.safetensors")
    image_size: int = 160
    learn: int = 450
    """Training images."""
    held_out: int = 90
    """Images of the same tiles, and as many of others."""
    splits: int = 3
    results: Path = RESULTS
    smoke: bool = False
    """A few small demo images and random weights."""


def bright(images: np.ndarray, level: float = 0.4) -> np.ndarray:
    """The images, scaled to one mean brightness."""
    mean = np.maximum(images.mean((1, 2, 3), keepdims=True), 1)
    return (images * (255 * level / mean)).clip(0, 255).astype(np.uint8)


def mirrored(images: np.ndarray) -> np.ndarray:
    """The images and their mirror images, left to right, upside down and both."""
    return np.concatenate([images, images[:, :, ::-1], images[:, ::-1], images[:, ::-1, ::-1]])


def centered(method: Method) -> Method:
    """The method on features without each image's own median."""

    def embed(frozen: Frozen, image: jax.Array) -> Any:
        return jax.tree.map(lambda x: x - jnp.median(x, (-3, -2), keepdims=True), method.embed(frozen, image))

    return method._replace(embed=embed)


def training_tiles(options: Options, size: tuple[int, int], seed: int) -> Dataset:
    """The training images of a split, in groups; of a smoke run, four demo images a group."""
    if options.smoke:
        data = open_data("demo", category=next(iter(demo.CATEGORIES)), preprocess=Preprocess(size))
        train = next(iter(data.values())).train
        records = tuple(record._replace(group=str(i // 4)) for i, record in enumerate(train.records))
        return dataclasses.replace(train, records=records)
    (opened,) = open_data(options.data, preprocess=Preprocess(size)).values()
    return split_by_part(grouped(opened, ROOT / "data" / "mtd_tiles.csv"), seed).train


@jax.jit
def defective(key: jax.Array, images: jax.Array) -> jax.Array:
    """The images (n h w 3, uint8) with a rectangle or a scar pasted into each."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        which, draw = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(which), cutpaste(draw, image)[0], scar(draw, image)[0])

    pasted = jax.vmap(one)(jax.random.split(key, len(images)), images / 255)
    return jnp.round(255 * pasted).astype(jnp.uint8)


def measured(
    method: Method, frozen: Frozen, normalize: Change, augment: Change, sets: dict[str, np.ndarray]
) -> dict[str, float]:
    """How well new tiles are told from their anomalies, and images of known tiles from the same."""

    def data(images: np.ndarray) -> Dataset:
        return next(iter(open_data(images, preprocess=Preprocess(images.shape[1:3])).values())).train

    sets = {name: normalize(images) for name, images in sets.items()}
    learned = data(augment(sets["learn"]))
    state = fit(method, frozen, learned, jax.random.key(0), Execution(progress=progress())).state
    scores = {
        name: np.asarray(score_all(method, state, frozen, data(sets[name])).image)
        for name in ("known", "new", "anomalous")
    }

    def against(normal: str) -> float:
        both = np.concatenate([scores[normal], scores["anomalous"]])
        return auroc(both, np.arange(len(both)) >= len(scores[normal]))

    false_alarms = (scores["new"] > np.quantile(scores["known"], 0.95)).mean()
    return {"new": against("new"), "known": against("known"), "false_alarms": float(false_alarms)}


def main(options: Options) -> None:
    """Tries everything with every method."""
    side = 32 if options.smoke else options.image_size
    learn, held_out, splits = (16, 4, 1) if options.smoke else (options.learn, options.held_out, options.splits)
    network = "resnet18" if options.smoke else of_file(options.weights)
    frozen = backbone(network).init(jax.random.key(0)) if options.smoke else load(network, options.weights)
    tried: dict[str, dict[str, list[dict[str, float]]]] = {}
    methods = {
        name: Settings.of(name, backbone=network, **hyperparameters).build((side, side))
        for name, hyperparameters in METHODS.items()
    }
    medians = {name: centered(methods[name]) for name in ("patchcore", "padim")}  # the third embeds averages
    for seed in range(splits):
        data = training_tiles(options, (side, side), seed)
        order = np.random.default_rng(seed).permutation(sorted({*data.groups}))
        is_new = np.isin(data.groups, order[: len(order) // 5])
        draw = np.random.default_rng(seed).permutation
        rest, new = draw(np.flatnonzero(~is_new)), draw(np.flatnonzero(is_new))[:held_out]
        rows = {"learn": rest[:learn], "known": rest[learn : learn + held_out], "new": new}
        sets = {name: data.images(np.sort(indices)) for name, indices in rows.items()}
        sets["anomalous"] = np.asarray(defective(jax.random.key(seed), jnp.asarray(sets["new"])))
        for name, method in methods.items():
            variants = {
                "nothing": (method, np.asarray, np.asarray),
                "brightness": (method, bright, np.asarray),
                "mirrored": (method, np.asarray, mirrored),
            }
            if name in medians:
                variants["own median"] = medians[name], np.asarray, np.asarray
            for label, (variant, normalize, augment) in variants.items():
                result = measured(variant, frozen, normalize, augment, sets)
                tried.setdefault(name, {}).setdefault(label, []).append(result)
                print(seed, name, label, {k: round(v, 4) for k, v in result.items()}, flush=True)
    write_json(options.results / "narrow_gap.json", {"experiment": "narrow_gap", "tried": tried, **origin()})


if __name__ == "__main__":
    start(main, Options)
