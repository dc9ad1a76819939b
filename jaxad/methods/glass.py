"""GLASS: a discriminator learns from anomalies made of textures and from features that climb its own loss.

Stored: a linear layer that adapts patch features to the images, and a discriminator of two layers. They learn from
three kinds of features (section 3): normal ones; global anomalies, which are normal ones with Gaussian noise that climb
the gradient of the discriminator's loss and are kept in a shell around the normal feature (manifold hypothesis) or the
center of all (hypersphere), by truncated projection; and local anomalies, of images with a texture within a shape of
Perlin noise, of which the half that is told worst counts, by the focal loss. A patch scores the probability of being
anomalous; the heat map is the smoothed upsampling of that, and an image scores the largest of its patches.

Paper: A Unified Anomaly Synthesis Strategy with Gradient Ascent for Industrial Anomaly Detection and Localization,
    ECCV 2024, arXiv:2407.09359.
Reference: https://github.com/cqylunlun/GLASS
Differences: the center is that of the current adaptor at every step, not of the epoch's first; how an anomalous feature
    was moved counts as constant; patch features are means of neighborhoods, side by side, whose channels are not
    pooled; which hypothesis holds is told, not judged from the images' spectrum, and the object is what Otsu's
    threshold finds, not a given mask; an epoch has all images, not 392; no layer before the batch norm has a bias,
    which that takes away; the last epoch counts, not the best on the test images; the running variance is not corrected
    for the size of a batch.
Results: experiments/recipes/glass.py
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.patches import Discriminator
from jaxad.ops.heatmap import patch_features, upsample_blur
from jaxad.ops.losses import focal_loss
from jaxad.synthesis.anomaly import blended, foreground
from jaxad.synthesis.ascent import ascend, into_shell
from jaxad.synthesis.perlin import perlin_mask
from jaxad.synthesis.texture import GENTLE_CHANGES, source
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, of_parts, torch_adam, zero_padding

RADIUS = 0.75
"""Share of the normal features within the hypersphere."""
APART = 0.5
"""Least distance of a global anomaly from its normal feature, and half the largest (manifold hypothesis)."""
TRIES = 64
"""Draws of a shape before an image is left without one."""
STEP, EVERY = 1e-3, 5
"""Length of a step up, and steps from one projection to the next."""


class GlassMeasuring(NamedTuple):
    """The untrained networks, and the normal features summed so far."""

    params: PyTree
    running: PyTree
    total: Float[Array, "h w c"]
    images: Float[Array, ""]


class GlassTraining(NamedTuple):
    """Adaptor and discriminator while they are trained."""

    trained: Trained
    running: PyTree
    """Statistics of the discriminator's batch norm."""
    mean: Float[Array, "h w c"]
    """Of the normal features at every position."""


class GlassDiscriminator(NamedTuple):
    """The trained adaptor and discriminator."""

    params: PyTree
    running: PyTree


def drawn_mask(key: Key, within: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """A shape of Perlin noise, or what two have in common, or both; drawn until some of it is within."""

    def draw(given: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, key, _ = given
        key, first, second, which = jax.random.split(key, 4)
        a, b = (perlin_mask(k, (within.shape[0], within.shape[1])) for k in (first, second))
        mask = jnp.select([jax.random.randint(which, (), 0, 3) == i for i in (0, 1)], [a, a & b], a | b)
        return tries + 1, key, mask & within

    def empty(given: tuple[Array, Array, Array]) -> Array:
        return (given[0] < TRIES) & ~given[2].any()

    return jax.lax.while_loop(empty, draw, (jnp.int32(0), key, jnp.zeros_like(within)))[2]


def glass(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (288, 288),
    hypothesis: Literal["manifold", "hypersphere"] = "manifold",
    on_foreground: bool = False,
    feature_scale: float = 1.0,
    hidden: int = 1024,
    noise: float = 0.015,
    ascent_steps: int = 20,
    hard_quantile: float = 0.5,
    epochs: int = 640,
    train_batch_size: int = 8,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
    sigma: float = 4.0,
) -> Method:
    """GLASS.

    Args:
        backbone: The network that describes patches.
        layers: Its stages, stacked on the grid of the first; None for those of patches (layer2 and layer3 of a ResNet).
        image_size: (height, width) of the images, which is that of the heat map.
        hypothesis: Normal features lie on a "manifold", or in a "hypersphere" about their mean at a position.
        on_foreground: Textures lie on the object only, which Otsu's threshold finds.
        feature_scale: What patch features are multiplied by. Noise and distances suit weights like torchvision's; the
            features of Caffe's ResNets are several times as large.
        hidden: Units of the discriminator.
        noise: Standard deviation of what global anomalies begin with.
        ascent_steps: Steps up that they take; they are projected after every fifth.
        hard_quantile: Share of the patches of images with textures that teach nothing, those that are told best.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of the adaptor's Adam; the discriminator's AdamW has twice that (and a decay of 0.01).
        weight_decay: Of the adaptor, added to the gradient.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(hidden=hidden, ascent_steps=ascent_steps, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(feature_scale=feature_scale, noise=noise, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay, sigma=sigma)
    if not 0 <= hard_quantile < 1:
        raise ValueError(f"hard_quantile must be in [0, 1), got {hard_quantile}")
    if hypothesis not in ("manifold", "hypersphere"):
        raise ValueError(f"hypothesis must be manifold or hypersphere, got {hypothesis}")
    network = architecture(backbone)
    layers = network.patch_layers if layers is None else tuple(layers)
    optimizer = of_parts(
        adaptor=torch_adam(learning_rate, weight_decay),
        discriminator=optax.adamw(2 * learning_rate, weight_decay=0.01),
    )
    discriminator, spherical = Discriminator(hidden), hypothesis == "hypersphere"
    often = (1 - 0.9 ** (ascent_steps + 1)) / (1 - 0.9)  # the batch norm sees those features at every step up

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return feature_scale * patch_features(x, layers)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> GlassMeasuring:
        del frozen
        first, second = jax.random.split(key)
        _, h, w, c = jax.eval_shape(patches, spec).shape
        made = discriminator.init(second, jnp.zeros((1, 1, 1, c)), valid=jnp.ones(1, bool))
        params = {
            "adaptor": jax.nn.initializers.glorot_normal()(first, (c, c), jnp.float32),
            "discriminator": made["params"],
        }
        return GlassMeasuring(params, made["batch_stats"], jnp.zeros((h, w, c)), jnp.zeros(()))

    def measure(key: Key, state: GlassMeasuring, frozen: Frozen, batch: Batch) -> tuple[GlassMeasuring, Metrics]:
        del key, frozen
        total = state.total + zero_padding(patches(zero_padding(batch.x, batch.valid)), batch.valid).sum(0)
        return state._replace(total=total, images=state.images + batch.valid.sum().astype(total.dtype)), {}

    def to_train(key: Key, state: GlassMeasuring, frozen: Frozen) -> GlassTraining:
        del key, frozen
        return GlassTraining(begin(optimizer, state.params), state.running, state.total / state.images)

    def spoiled(key: Key, image: Float[Array, "h w 3"], textures: Array | None) -> tuple[Array, Array]:
        """The image with a texture, and where that is."""
        shape, texture, how = jax.random.split(key, 3)
        mask = drawn_mask(shape, foreground(image) if on_foreground else jnp.ones(image_size, bool))
        opacity = jnp.clip(0.5 + 0.1 * jax.random.normal(how), 0.2, 0.8)
        return blended(image, source(texture, image_size, textures, GENTLE_CHANGES), mask, opacity), mask

    def train(key: Key, state: GlassTraining, frozen: Frozen, batch: Batch) -> tuple[GlassTraining, Metrics]:
        draw, shake = jax.random.split(key)
        x = zero_padding(batch.x, batch.valid)
        image, textures = x["image"].astype(jnp.float32) / 255, frozen.get("auxiliary")
        keys = jax.random.split(draw, len(image))
        made, mask = jax.vmap(lambda key, image: spoiled(key, image, textures))(keys, image)
        normal, local = patches(x), patches(network.apply(frozen, made, layers))
        (h, w), grid = image_size, normal.shape[1:3]
        window = (1, h // grid[0], w // grid[1])
        there = jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, window, window, "VALID")[:, : grid[0], : grid[1]]
        shift = noise * jax.random.normal(shake, normal.shape)
        every = jnp.broadcast_to(batch.valid[:, None, None], normal.shape[:3])

        def logits(params: PyTree, running: PyTree, x: Array) -> tuple[Array, PyTree]:
            variables = {"params": params["discriminator"], "batch_stats": running}
            valid = jnp.tile(batch.valid, len(x) // len(batch.valid))
            found, new = discriminator.apply(variables, x, valid=valid, mutable=["batch_stats"])
            return found, new["batch_stats"]

        def loss(params: PyTree) -> Any:
            own, other = normal @ params["adaptor"], local @ params["adaptor"]
            fixed, at, still = jax.lax.stop_gradient((own, state.mean @ params["adaptor"], params))
            distances = jnp.linalg.norm(jnp.concatenate([jax.lax.stop_gradient(other), fixed]) - at, axis=-1)
            counted = jnp.concatenate([every & ~there, every])
            radius = jnp.nanquantile(jnp.where(counted, distances, jnp.nan), RADIUS)

            def normality(moved: Array) -> Array:
                found, _ = logits(still, state.running, jnp.concatenate([fixed, moved]))
                of_anomalous = optax.sigmoid_binary_cross_entropy(jnp.split(found, 2)[1], jnp.ones(()))
                return mean_of_valid(of_anomalous.mean((1, 2)), batch.valid)

            middle, least = (at, radius) if spherical else (fixed, jnp.float32(APART))
            moved = ascend(normality, fixed + shift, ascent_steps, STEP, EVERY, lambda x: into_shell(x, middle, least))
            moved = own + (moved - fixed)
            found, once = logits(params, state.running, jnp.concatenate([own, moved]))
            running = jax.tree.map(lambda old, new: old + often * (new - old), state.running, once)
            of_normal, of_anomalous = (
                optax.sigmoid_binary_cross_entropy(part, label).mean((1, 2))
                for part, label in zip(jnp.split(found, 2), (jnp.zeros(()), jnp.ones(())), strict=True)
            )
            if spherical:
                other = jnp.where(there[..., None], into_shell(other, at, 2 * radius), other)
            found, running = logits(params, running, other)
            probability = jax.nn.sigmoid(found)
            wrong = jax.lax.stop_gradient(jnp.where(every, (probability - there.astype(jnp.float32)) ** 2, jnp.nan))
            hard = wrong >= jnp.nanquantile(wrong, hard_quantile)
            focal = jnp.mean(focal_loss(probability, there), where=hard | ~hard.any())
            return mean_of_valid(of_normal + of_anomalous, batch.valid) + focal, running

        trained, metrics, running = descend_with(optimizer, state.trained, loss)
        return state._replace(trained=trained, running=running), metrics

    def finish(key: Key, state: GlassTraining, frozen: Frozen) -> GlassDiscriminator:
        del key, frozen
        return GlassDiscriminator(state.trained.params, state.running)

    def score(state: GlassDiscriminator, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        variables = {"params": state.params["discriminator"], "batch_stats": state.running}
        found: Any = discriminator.apply(variables, patches(x) @ state.params["adaptor"], valid=None)
        probability = jax.nn.sigmoid(found)
        return Scores(probability.max((1, 2)), upsample_blur(probability, image_size, sigma))

    stages = (
        Stage("measure", measure, to_train),
        Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True),
    )
    return Method(features(backbone, layers, image=True), init, stages, score, auxiliary="optional")
