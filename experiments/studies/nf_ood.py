"""Whether flows recognize foreign images: likelihoods of CIFAR-10 against those of simpler images; nf_ood.json.

    python -m experiments.studies.nf_ood --cifar TFDS_FOLDER --embeddings CV_BY_RESNET18_FOLDER --photos MT_FREE_FOLDER
        --textures DTD_FOLDER --weights resnet18.tv_in1k.safetensors

Every flow trains on CIFAR-10, all classes. The AUROC is that of its scores (higher is more anomalous) for foreign
images against CIFAR-10's test images; below 0.5, the flow finds the foreign images more likely. Source: Why Normalizing
Flows Fail to Detect Out-of-Distribution Data, arXiv:2006.08545. Foreign images are: images of one color, each the mean
of a test image; digits in the style of SVHN, rendered because SVHN is not available as images; photographs of magnetic
tiles and of textures. Flows on embeddings get the ResNet-18's features of the same images, and ADBench's embeddings of
CIFAR-10's first class and of SVHN. `--smoke` is the small variant for the tests, on noise.

`--aligned CLASS_FOLDER` trains on the normal images of a class in MVTec's layout instead, where one part of an image
predicts another, and writes nf_ood_CLASS.json. There, foreign images are also the background without the object (each
of the color in a test image's corner), CIFAR-10's images, and images with defects.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from experiments.command import RESULTS, command_line, machine, progress, start
from experiments.distill.photographs import photographs
from jaxad.backbones import backbone, load, of_file
from jaxad.base import Frozen, Method, PyTree
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.fit import Fitted, fit
from jaxad.driver.program import Program
from jaxad.driver.scoring import score_all
from jaxad.files import read_json, write_json
from jaxad.methods.nf import nf
from jaxad.metrics import auroc

SIZE = 32
ENLARGED = 224
"""Height and width of the images that a backbone sees."""
DEEP = 4
"""Residual blocks of the networks that must see half an image."""
ADBENCH = "RealNVP on ADBench's embeddings"


@dataclasses.dataclass
class Options:
    """Likelihoods of foreign images."""

    cifar: Path = Path("tensorflow_datasets")
    """A folder of TensorFlow Datasets with CIFAR-10 as array_record."""
    aligned: Path | None = None
    """A class in MVTec's layout to train on instead of CIFAR-10."""
    photos: Path = Path("mtd/MT_Free")
    """A folder of photographs of plain surfaces (MTD's defect-free tiles)."""
    textures: Path = Path("dtd")
    """A folder of photographs of textures (DTD)."""
    embeddings: Path = Path("CV_by_ResNet18")
    """ADBench's folder."""
    weights: Path = Path("resnet18.tv_in1k.safetensors")
    """The weights of a ResNet-18."""
    train: int = 20_000
    """Training images."""
    test: int = 1_000
    """Test images, and at most as many foreign images of each kind."""
    hidden: int = 32
    """Width of the networks of flows on pixels."""
    epochs: int = 1
    """Epochs of flows on pixels."""
    batch_size: int = 32
    learning_rate: float = 1e-3
    flows: tuple[str, ...] = ()
    """By name; none: all. Rows of other flows of the same images in the result file are kept."""
    results: Path = RESULTS
    smoke: bool = False
    """A few images of noise."""


def flows(options: Options) -> dict[str, dict[str, Any]]:
    """The hyperparameters of every flow that the options ask for.

    Raises:
        ValueError: There is no flow of such a name.
    """
    training: dict[str, Any] = dict(train_batch_size=options.batch_size, learning_rate=options.learning_rate)
    pixels = training | dict(on="pixels", hidden=options.hidden, epochs=options.epochs)
    small: dict[str, Any] = dict(couplings=2, blocks=1) if options.smoke else {}
    one_scale = pixels | dict(scales=1, couplings=8) | small
    known = {
        "RealNVP, 3 scales": pixels | dict(scales=3, couplings=4),
        "Glow, 3 scales": pixels | dict(flow="glow", scales=3, couplings=8),
        "RealNVP, checkerboard": one_scale,
        "RealNVP, checkerboard, as deep": one_scale | dict(blocks=DEEP),
        "RealNVP, horizontal mask": one_scale | dict(mask="horizontal", blocks=DEEP),
        "RealNVP, cycle mask": one_scale | dict(mask="cycle", blocks=DEEP),
        "RealNVP on embeddings": training
        | dict(layers=("layer1", "layer2", "layer3"), epochs=2 * options.epochs)
        | small,
        ADBENCH: training | dict(layers=("layer3",), epochs=5 * options.epochs) | small,
    }
    if options.aligned is not None:
        del known[ADBENCH]
    if not set(options.flows) <= set(known):
        raise ValueError(f"flows must be of {', '.join(known)}, got {', '.join(options.flows)}")
    return {name: known[name] for name in options.flows or known}


def cifar(options: Options, split: str, n: int) -> np.ndarray:
    """The first n images of a split of CIFAR-10, uint8 n h w 3."""
    if options.smoke:
        return np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
    source: Any = tfds.data_source("cifar10", split=split, data_dir=str(options.cifar), download=False)
    return np.stack([source[i]["image"] for i in range(min(n, len(source)))])


def resized(options: Options, folder: Path, n: int) -> np.ndarray:
    """At most n photographs of a folder and those below it, at CIFAR's size (uint8 n h w 3), evenly chosen."""
    if options.smoke:
        return digits(n)
    paths = photographs(folder)
    paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(n, len(paths))).astype(int)]
    opened = (Image.open(path).convert("RGB") for path in paths)
    return np.stack([np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) for image in opened])


def adbench(options: Options, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n c) and labels (n) of a data set of ADBench."""
    if options.smoke:
        return np.random.default_rng(0).normal(size=(80, 16)).astype(np.float32), np.arange(80) % 2
    with np.load(options.embeddings / f"{name}.npz") as file:
        return file["X"].astype(np.float32), file["y"]


def digits(n: int) -> np.ndarray:
    """House numbers (uint8 n h w 3): blurred digits of one muted color on another, cut off at the sides."""
    rng, images = np.random.default_rng(0), []
    for _ in range(n):
        gray, tint = rng.normal(115, 50, (2, 1)), rng.normal(0, 10, (2, 3))
        back, front = (tuple(int(v) for v in color) for color in np.clip(gray + tint, 0, 255))
        image = Image.new("RGB", (SIZE, SIZE), back)
        font = ImageFont.load_default(size=int(rng.integers(22, 32)))
        word = " ".join(str(d) for d in rng.integers(0, 10, 3))
        ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), word, fill=front, font=font, anchor="mm")
        images.append(np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))))
    return np.stack(images)


def data_of(images: np.ndarray, size: int) -> Dataset:
    """A data set of images, resized to `size` x `size` pixels."""
    train = open_data(images, preprocess=Preprocess((size, size)))["arrays"].train
    assert train is not None
    return train


def foreign_auroc(scores: np.ndarray, foreign: np.ndarray) -> float:
    """The AUROC of the scores of foreign images against those of normal ones."""
    labels = np.r_[np.zeros(len(scores), int), np.ones(len(foreign), int)]
    return auroc(np.r_[scores, foreign], labels)


def fit_vectors(method: Method, vectors: np.ndarray, layer: str) -> Fitted:
    """Fits a method to embeddings (n c) that are there in advance.

    The driver reads images: each is a single pixel, whose bytes are the number of a vector.

    Args:
        method: Its `embed` is not used.
        vectors: The embeddings.
        layer: The name of the stage that they stand for.
    """
    numbers = np.arange(len(vectors), dtype=">u4").view(np.uint8).reshape(-1, 1, 1, 4)[..., 1:]
    train = open_data(numbers, preprocess=Preprocess(None))["arrays"].train
    assert train is not None

    def embed(frozen: Frozen, image: jax.Array) -> PyTree:
        high, middle, low = jnp.moveaxis(image[:, 0, 0].astype(jnp.int32), -1, 0)
        return {layer: frozen[(high * 256 + middle) * 256 + low]}

    return fit(method._replace(embed=embed), jnp.asarray(vectors), train, jax.random.key(0))


def main(options: Options) -> None:
    """Trains all flows and writes their AUROC."""
    further = {}
    if options.aligned is None:
        name, train, test = "nf_ood", cifar(options, "train", options.train), cifar(options, "test", options.test)
    else:
        name = f"nf_ood_{options.aligned.name}"
        parts = {"train": options.train, "test": options.test}
        train, test = (resized(options, options.aligned / part / "good", n) for part, n in parts.items())
        kinds = sorted(path for path in (options.aligned / "test").iterdir() if path.name != "good")
        further["background"] = np.tile(test[:, :1, :1], (1, SIZE, SIZE, 1))
        further["CIFAR-10"] = cifar(options, "test", options.test)
        further["defects"] = np.concatenate([resized(options, kind, options.test) for kind in kinds])
    colors = np.round(test.mean((1, 2), keepdims=True)).astype(np.uint8)
    foreign = {
        "one color": np.tile(colors, (1, SIZE, SIZE, 1)),
        "digits": digits(options.test),
        "tiles": resized(options, options.photos, options.test),
        "textures": resized(options, options.textures, options.test),
        **further,
    }
    network = of_file(options.weights)
    frozen = backbone(network).init(jax.random.key(0)) if options.smoke else load(network, options.weights)
    chosen = flows(options)
    record: dict[str, Any] = {
        "experiment": name,
        "train_images": len(train),
        "test_images": len(test),
        "foreign_images": {k: len(v) for k, v in foreign.items()},
        **machine(),
    }
    rows, path = {}, options.results / f"{name}.json"
    old = read_json(path) if path.exists() else {}
    if record.items() <= old.items():
        rows = old["flows"]

    def on_images(flow: str) -> dict[str, Any]:
        method, pixels = nf(backbone=network, **chosen[flow]), chosen[flow].get("on") == "pixels"
        side = SIZE if pixels or options.smoke else ENLARGED
        fitted = fit(method, frozen, data_of(train, side), jax.random.key(0), Execution(progress=progress()))
        execution = Execution(batch_size=min(64, options.test))

        def scores_of(images: np.ndarray) -> np.ndarray:
            return np.asarray(score_all(method, fitted.state, frozen, data_of(images, side), execution).image)

        scores = scores_of(test)
        return {
            "bits_per_dimension": float(scores.mean()) if pixels else None,
            "auroc": {kind: foreign_auroc(scores, scores_of(images)) for kind, images in foreign.items()},
            "seconds": fitted.run_seconds,
        }

    def on_adbench() -> dict[str, Any]:
        x, y = adbench(options, "CIFAR10_0")
        normal, other = x[y == 0], x[y == 1]
        held_out = len(normal) // 5
        method = nf(backbone=network, **chosen[ADBENCH])
        fitted = fit_vectors(method, normal[held_out:], "layer3")
        score = Program(lambda x: method.score(fitted.state, None, {"layer3": x}).image)
        scores, svhn = score(normal[:held_out]), score(adbench(options, "SVHN_0")[0])
        auroc = {"SVHN": foreign_auroc(scores, svhn), "other classes of CIFAR-10": foreign_auroc(scores, score(other))}
        return {"bits_per_dimension": None, "auroc": auroc, "seconds": fitted.run_seconds}

    for flow, hyperparameters in chosen.items():
        print(flow, file=sys.stderr, flush=True)
        row = on_adbench() if flow == ADBENCH else on_images(flow)
        rows[flow] = {"hyperparameters": hyperparameters, **row, "command": command_line()}
        print(f"\n{flow}", row, flush=True)
        write_json(path, record | {"flows": rows})


if __name__ == "__main__":
    start(main, Options)
