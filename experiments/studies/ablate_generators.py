"""Which synthetic defect transfers to which real one: the same simple discriminator learns from each generator.

    python -m experiments.studies.ablate_generators --data MTD_FOLDER --name mtd
        --weights resnet50.caffe_in1k.safetensors

The discriminator has one hidden layer on the backbone's patch features (layer2 and layer3). Cross-entropy trains it to
tell patches of a generator's anomalies from patches of normal images; a patch scores its logit, an image the largest.
Only the generator differs. DRAEM's textures come from `--auxiliary`, or are generated. Two generators work on features:
"feature noise" is SimpleNet's, and "feature ascent" is GLASS's, whose features then climb the discriminator's loss.
Writes ablate_generators_NAME.json: the AUROC of every kind of defect against the normal test images. The last epoch
counts, whatever the test images say. `--smoke` is the small variant for the tests.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.generators import MASKS, ON_OBJECTS, generators
from experiments.command import RESULTS, origin, progress, start
from jaxad.backbones import backbone, features, load, of_file
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, State
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit
from jaxad.driver.scoring import score_all
from jaxad.files import write_json
from jaxad.metrics import auroc
from jaxad.nn.patches import Discriminator
from jaxad.ops.heatmap import patch_features, upsample_blur
from jaxad.synthesis import anomaly, texture
from jaxad.synthesis.ascent import ascend, project_to_shell
from jaxad.training import gradient_stage
from jaxad.training.checks import multiples_of

LAYERS = ("layer2", "layer3")
ON_FEATURES = {"feature noise": 0, "feature ascent": 10}
"""Generators that work on features, and their steps of ascent."""
DEVIATION = 0.25
"""Standard deviation of the noise, as a share of that of a patch's features; a step of ascent is a tenth as long."""
TEXTURES = 200
"""Textures of a folder that are used, at most."""


@dataclasses.dataclass
class Options:
    """Compare generators of anomalies."""

    data: str = "demo"
    """The data set: a folder, or whatever `jaxad fit` takes."""
    name: str = "demo"
    """Name of the data set, for the result file."""
    weights: Path = Path("resnet50.caffe_in1k.safetensors")
    """The weights of a ResNet."""
    auxiliary: Path | None = None
    """A folder of textures; None: they are generated."""
    mask_threshold: int = 0
    image_size: int = 128
    hidden: int = 256
    epochs: int = 5
    batch_size: int = 8
    learning_rate: float = 1e-3
    generators: tuple[str, ...] = ()
    """By name; none: all."""
    seed: int = 0
    results: Path = RESULTS
    smoke: bool = False
    """A few small images, random weights."""


class DiscriminatorState(NamedTuple):
    """The discriminator's parameters and its batch norm's statistics."""

    params: PyTree
    stats: PyTree


def known_generators(size: tuple[int, int], textures: jax.Array | None) -> dict[str, Any]:
    """The generators by name: (key, image, another image) -> image and mask, or the steps of ascent of features."""

    def textured(key: Key, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        del other
        draw_key, texture_key = jax.random.split(key)
        source = texture.source(texture_key, size, textures, texture.BOLD_CHANGES)
        return anomaly.add_texture(draw_key, image, source)

    def tiles(key: Key, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        del other
        draw_key, order_key = jax.random.split(key)
        return anomaly.add_texture(draw_key, image, anomaly.shuffled_tiles(order_key, image), opacity=(0.15, 1.0))

    known = {name: generator for name, generator in generators(size).items() if name not in MASKS + ON_OBJECTS}
    return known | {"texture (DRAEM)": textured, "tiles, anywhere": tiles} | ON_FEATURES


def standardized(x: jax.Array) -> jax.Array:
    """The features of every patch (... c), minus their mean and over their standard deviation."""
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-6)


def described(x: dict[str, jax.Array]) -> jax.Array:
    """The standardized patch features of embedded images, b h w c."""
    return standardized(patch_features(x, LAYERS))


def discriminator(options: Options, network: str, generator: Any) -> Method:
    """The method that learns from a generator's anomalies.

    Args:
        options: Sizes and learning rate.
        network: The name of the backbone.
        generator: One of `known_generators`.
    """
    size, module = (options.image_size, options.image_size), Discriminator(options.hidden)

    def climbed(model: DiscriminatorState, normal: jax.Array, noise: jax.Array) -> jax.Array:
        """Normal features with noise, after steps up the loss of calling them anomalous; they stay in a shell."""
        variables = {"params": model.params, "batch_stats": model.stats}
        distance = DEVIATION * math.sqrt(normal.shape[-1])

        def normality(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            logits: Any = module.apply(variables, x, train=False)
            return optax.sigmoid_binary_cross_entropy(logits, jnp.ones(())).mean(), None

        def project(x: jax.Array) -> jax.Array:
            return project_to_shell(x, normal, jnp.float32(distance))

        return ascend(normality, normal + noise, None, generator, 0.1 * distance, 5, project)[0]

    def anomalies(
        key: Key, model: DiscriminatorState, frozen: Frozen, x: PyTree, normal: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Anomalous features (b h w c), and which patches are anomalous (b h w)."""
        if isinstance(generator, int):
            moved = climbed(model, normal, DEVIATION * jax.random.normal(key, normal.shape))
            return standardized(moved), jnp.ones(moved.shape[:3], bool)
        image = x["image"].astype(jnp.float32) / 255
        keys = jax.random.split(key, len(image))
        images, mask = jax.vmap(generator)(keys, image, jnp.roll(image, 1, 0))
        anomalous = described(backbone(network).apply(frozen, images, LAYERS))
        window = (1, *(s // g for s, g in zip(size, anomalous.shape[1:3], strict=True)))
        return anomalous, jax.lax.reduce_window(mask > 0.5, False, jax.lax.bitwise_or, window, window, "VALID")

    def init(key: Key, state: State, frozen: Frozen, spec: PyTree) -> DiscriminatorState:
        del state, frozen
        channels = jax.eval_shape(described, spec).shape[-1]
        variables = module.init(key, jnp.zeros((1, 1, 1, channels)), train=False)
        return DiscriminatorState(variables["params"], variables["batch_stats"])

    def loss(
        params: PyTree, model: DiscriminatorState, key: Key, frozen: Frozen, batch: Batch
    ) -> tuple[jax.Array, dict[str, PyTree]]:
        normal = described(batch.x)
        anomalous, labels = anomalies(key, model, frozen, batch.x, normal)
        label = jnp.concatenate([jnp.zeros_like(labels), labels])
        weight = label / jnp.maximum(label.sum(), 1) + ~label / jnp.maximum((~label).sum(), 1)
        variables, x = {"params": params, "batch_stats": model.stats}, jnp.concatenate([normal, anomalous])
        logits, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
        losses = optax.sigmoid_binary_cross_entropy(logits, label.astype(jnp.float32))
        return (weight * losses).sum(), {"stats": updated["batch_stats"]}

    def score(state: DiscriminatorState, frozen: Frozen, x: dict[str, jax.Array]) -> Scores:
        del frozen
        variables = {"params": state.params, "batch_stats": state.stats}
        logits: Any = module.apply(variables, described(x), train=False)
        return Scores(logits.max((1, 2)), upsample_blur(logits, size, 4.0))

    optimizer = optax.adam(options.learning_rate)
    stage = gradient_stage("train", init, loss, optimizer, epochs=options.epochs, batch_size=options.batch_size)
    return Method(features(network, LAYERS, image=True), (stage,), score)


def by_defect(scores: Scores, test: Dataset) -> dict[str, dict[str, float]]:
    """The AUROC of images and of pixels, of every kind of defect against the normal images, and of all."""
    defects, image, pixel = np.array(test.defects), np.asarray(scores.image), np.asarray(scores.pixel)
    masks = test.masks(range(len(test)))
    rows = {}
    for kind in ["all", *sorted(set(defects) - {"good"})]:
        chosen = np.ones(len(defects), bool) if kind == "all" else (defects == "good") | (defects == kind)
        row = {"image_AUROC": auroc(image[chosen], (defects[chosen] != "good").astype(int))}
        if masks is not None:
            row["pixel_AUROC"] = auroc(pixel[chosen].ravel(), masks[chosen].ravel().astype(int))
        rows[kind] = row
    return rows


def main(options: Options) -> None:
    """Trains one discriminator for each generator and category, and writes their AUROC."""
    if options.smoke:
        options.data, options.image_size, options.hidden, options.epochs = "demo", 64, 8, 1
    multiples_of(8, image_size=(options.image_size, options.image_size))
    size, textures = (options.image_size, options.image_size), None
    if options.auxiliary is not None and not options.smoke:
        (split,) = open_data(options.auxiliary, preprocess=Preprocess(size), layout="flat").values()
        assert split.train is not None
        chosen = np.unique(np.linspace(0, len(split.train) - 1, TEXTURES).astype(int))
        textures = jnp.asarray(split.train.images(chosen))
    known = known_generators(size, textures)
    if not set(options.generators) <= set(known):
        raise ValueError(f"generators must be of {', '.join(known)}; got {', '.join(options.generators)}")
    network = "resnet18" if options.smoke else of_file(options.weights)
    frozen = backbone(network).init(jax.random.key(0)) if options.smoke else load(network, options.weights)
    splits = open_data(options.data, preprocess=Preprocess(size), mask_threshold=options.mask_threshold)
    rows: dict[str, Any] = {}
    for generator in options.generators or known:
        method, rows[generator] = discriminator(options, network, known[generator]), {}
        for category, (train, test) in splits.items():
            if train is None or test is None:
                raise ValueError(f"the data need a training and a test split, got one of them ({category})")
            if options.smoke:
                train, test = train.subset(slice(None, None, 4)), test.subset(slice(None, None, 4))
            key = jax.random.key(options.seed)
            state = fit(method, frozen, train, key, Execution(progress=progress())).state
            rows[generator][category] = by_defect(score_all(method, state, frozen, test), test)
            print(generator, category, rows[generator][category]["all"], flush=True)
    settings = ("image_size", "hidden", "epochs", "batch_size", "learning_rate", "seed")
    record = {
        "experiment": f"ablate_generators_{options.name}",
        "settings": {name: getattr(options, name) for name in settings},
        "backbone": network,
        "generators": rows,
        **origin(),
    }
    write_json(options.results / f"ablate_generators_{options.name}.json", record)


if __name__ == "__main__":
    start(main, Options)
