"""Which synthetic defect transfers to which real one: each generator trains the same simple discriminator.

    python experiments/ablate_generators.py --data MTD_FOLDER --name mtd --weights resnet50.caffe_in1k.safetensors

The discriminator is one hidden layer on the backbone's patch features (layer2 and layer3), trained by cross-entropy to
tell the patches of a generator's anomalies from those of normal images; a patch scores its logit, an image the largest.
Everything but the generator stays as it is. DRAEM's textures are those of `--auxiliary`, or made-up ones. Two never see
a pixel: "feature noise", that of SimpleNet, and "feature ascent", GLASS's, which lets such features climb the loss of
the discriminator. Writes ablate_generators_NAME.json: the AUROC of every kind of defect against the normal test images.
The last epoch counts, whatever the test images say. `--smoke` is the small variant that the tests run.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import run
from bench_generators import MASKS, ON_OBJECTS, generators
from command import origin, start
from jaxad.files import write_json
from jaxad.backbones import backbone, features, load, of_file
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.fit import fit, score_all
from jaxad.metrics import auroc
from jaxad.nn.patches import Discriminator
from jaxad.synthesis import texture
from jaxad.synthesis import anomaly
from jaxad.synthesis.ascent import ascend, into_shell
from jaxad.training.gradient import begin, descend_with, zero_padding
from jaxad.ops.heatmap import patch_features, upsample_blur
from jaxad.training.checks import multiples_of

LAYERS = ("layer2", "layer3")
ON_FEATURES = {"feature noise": 0, "feature ascent": 10}
"""Steps up of those that need no image."""
DEVIATION = 0.25
"""Of the noise, as a share of the deviation of a patch's features; a step up is a tenth as long as the noise."""
TEXTURES = 200
"""Of a folder, at most."""


@dataclasses.dataclass
class Options:
    """Compare generators of anomalies."""

    data: str = "demo"
    """The data set: a folder, or whatever `jaxad fit` takes."""
    name: str = "demo"
    """Of the data set, for the file of results."""
    weights: Path = Path("resnet50.caffe_in1k.safetensors")
    """A ResNet's."""
    auxiliary: Path | None = None
    """A folder of textures; none: made-up ones."""
    mask_threshold: int = 0
    image_size: int = 128
    hidden: int = 256
    epochs: int = 5
    batch_size: int = 8
    learning_rate: float = 1e-3
    generators: tuple[str, ...] = ()
    """By name; none: all."""
    seed: int = 0
    results: Path = Path(__file__).parent / "results"
    smoke: bool = False
    """Few small images, random weights."""


def known_generators(size: tuple[int, int], textures: jax.Array | None) -> dict[str, Any]:
    """What makes an anomaly and its mask, of a key, an image and another one; or how many steps features climb."""

    def textured(key: Key, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        del other
        draw, made = jax.random.split(key)
        return anomaly.textured(draw, image, texture.source(made, size, textures, texture.BOLD_CHANGES))

    def tiles(key: Key, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        del other
        draw, order = jax.random.split(key)
        return anomaly.textured(draw, image, anomaly.shuffled(order, image), opacity=(0.15, 1.0))

    known = {name: make for name, make in generators(size).items() if name not in MASKS + ON_OBJECTS}
    return known | {"texture (DRAEM)": textured, "tiles, anywhere": tiles} | ON_FEATURES


def discriminator(options: Options, network: str, generator: Any) -> Method:
    """The method that learns from a generator's anomalies, or from features that climb (a number of steps)."""
    size = (options.image_size, options.image_size)
    optimizer, module = optax.adam(options.learning_rate), Discriminator(options.hidden)

    def described(x: dict[str, jax.Array]) -> jax.Array:
        return standardized(patch_features(x, LAYERS))

    def standardized(found: jax.Array) -> jax.Array:
        """Features of every patch about their mean, in units of their deviation."""
        return (found - found.mean(-1, keepdims=True)) / (found.std(-1, keepdims=True) + 1e-6)

    def climbed(state: PyTree, normal: jax.Array, noise: jax.Array) -> jax.Array:
        """Normal features with noise, after steps up the loss that calls them anomalous, kept in a shell."""
        variables = {"params": state["trained"].params, "batch_stats": state["running"]}
        least = DEVIATION * math.sqrt(normal.shape[-1])

        def normality(moved: jax.Array) -> jax.Array:
            found: Any = module.apply(variables, moved, valid=None)
            return optax.sigmoid_binary_cross_entropy(found, jnp.ones(())).mean()

        def into(x: jax.Array) -> jax.Array:
            return into_shell(x, normal, jnp.float32(least))

        return ascend(normality, normal + noise, generator, 0.1 * least, 5, into)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> PyTree:
        c = jax.eval_shape(described, spec).shape[-1]
        made = module.init(key, jnp.zeros((1, 1, 1, c)), valid=jnp.ones(1, bool))
        return {"trained": begin(optimizer, made["params"]), "running": made["batch_stats"]}

    def train(key: Key, state: PyTree, frozen: Frozen, batch: Batch) -> tuple[PyTree, Metrics]:
        x = zero_padding(batch.x, batch.valid)
        normal = described(x)
        if isinstance(generator, int):
            made = standardized(climbed(state, normal, DEVIATION * jax.random.normal(key, normal.shape)))
            there = jnp.ones(made.shape[:3], bool)
        else:
            image = x["image"].astype(jnp.float32) / 255
            shown, mask = jax.vmap(generator)(jax.random.split(key, len(image)), image, jnp.roll(image, 1, 0))
            made = described(backbone(network).apply(frozen, shown, LAYERS))
            window = (1, *(s // g for s, g in zip(size, made.shape[1:3], strict=True)))
            there = jax.lax.reduce_window(mask > 0.5, False, jax.lax.bitwise_or, window, window, "VALID")
        both = jnp.concatenate([normal, made])
        label = jnp.concatenate([jnp.zeros_like(there), there])
        valid = jnp.concatenate([batch.valid, batch.valid])
        one, other = (kind & valid[:, None, None] for kind in (label, ~label))
        weight = one / jnp.maximum(one.sum(), 1) + other / jnp.maximum(other.sum(), 1)

        def loss(params: PyTree) -> Any:
            variables = {"params": params, "batch_stats": state["running"]}
            found, new = module.apply(variables, both, valid=valid, mutable=["batch_stats"])
            lost = optax.sigmoid_binary_cross_entropy(found, label.astype(jnp.float32))
            return (weight * lost).sum(), new["batch_stats"]

        trained, metrics, running = descend_with(optimizer, state["trained"], loss)
        return {"trained": trained, "running": running}, metrics

    def score(state: PyTree, frozen: Frozen, x: dict[str, jax.Array]) -> Scores:
        variables = {"params": state["trained"].params, "batch_stats": state["running"]}
        found: Any = module.apply(variables, described(x), valid=None)
        return Scores(found.max((1, 2)), upsample_blur(found, size, 4.0))

    stage = Stage("train", train, epochs=options.epochs, batch_size=options.batch_size, shuffle=True)
    return Method(features(network, LAYERS, image=True), init, (stage,), score)


def by_defect(scores: Scores, test: Dataset) -> dict[str, dict[str, float]]:
    """The AUROC of every kind of defect against the normal images, and of all; of images and of pixels."""
    defects, image, pixel = np.array(test.defects), np.asarray(scores.image), np.asarray(scores.pixel)
    masks = test.masks(range(len(test)))
    found = {}
    for kind in ["all", *sorted(set(defects) - {"good"})]:
        chosen = np.ones(len(defects), bool) if kind == "all" else (defects == "good") | (defects == kind)
        entry = {"image_AUROC": auroc(image[chosen], (defects[chosen] != "good").astype(int))}
        if masks is not None:
            entry["pixel_AUROC"] = auroc(pixel[chosen].ravel(), masks[chosen].ravel().astype(int))
        found[kind] = entry
    return found


def main(options: Options) -> None:
    """Trains one discriminator a generator and category."""
    if options.smoke:
        options.data, options.image_size, options.hidden, options.epochs = "demo", 64, 8, 1
    multiples_of(8, image_size=(options.image_size, options.image_size))
    size, textures = (options.image_size, options.image_size), None
    if options.auxiliary is not None and not options.smoke:
        (split,) = open_data(options.auxiliary, preprocess=Preprocess(size), layout="flat").values()
        assert split.train is not None
        chosen = np.unique(np.linspace(0, len(split.train) - 1, TEXTURES).astype(int))
        textures = jnp.asarray(split.train.images(chosen))
    makes = known_generators(size, textures)
    if not set(options.generators) <= set(makes):
        raise ValueError(f"generators must be of {', '.join(makes)}; got {', '.join(options.generators)}")
    network = "resnet18" if options.smoke else of_file(options.weights)
    frozen = backbone(network).init(jax.random.key(0)) if options.smoke else load(network, options.weights)
    splits = open_data(options.data, preprocess=Preprocess(size), mask_threshold=options.mask_threshold)
    rows: dict[str, Any] = {}
    for generator in options.generators or makes:
        method, rows[generator] = discriminator(options, network, makes[generator]), {}
        for category, (train, test) in splits.items():
            if train is None or test is None:
                raise ValueError(f"images to learn from and a test split are needed, got one of them ({category})")
            if options.smoke:
                train, test = train.subset(slice(None, None, 4)), test.subset(slice(None, None, 4))
            fitted = fit(method, frozen, train, jax.random.key(options.seed), progress=run.progress())
            rows[generator][category] = by_defect(score_all(method, fitted.state, frozen, test), test)
            print(generator, category, rows[generator][category]["all"], flush=True)
    record = {
        "experiment": f"ablate_generators_{options.name}",
        "settings": {
            name: getattr(options, name)
            for name in ("image_size", "hidden", "epochs", "batch_size", "learning_rate", "seed")
        },
        "backbone": network,
        "generators": rows,
        **origin(),
    }
    write_json(options.results / f"ablate_generators_{options.name}.json", record)


if __name__ == "__main__":
    start(main, Options)
