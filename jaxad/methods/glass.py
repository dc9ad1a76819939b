"""GLASS: a discriminator learns from two kinds of synthetic anomalies, pasted textures and features moved by ascent.

Stored: a linear adaptor of patch features, and a discriminator with one hidden layer. They learn from three kinds of
features (section 3): normal ones; global anomalies, which are normal features with Gaussian noise that climb the
gradient of the discriminator's loss, and which truncated projection keeps in a shell around the normal feature
(manifold hypothesis) or around the center of all (hypersphere); and local anomalies, the features of images with a
texture inside a shape of Perlin noise, of which the half with the largest errors counts, by the focal loss. A patch
scores the probability of being anomalous. The heat map is these scores, upsampled and smoothed, and an image scores its
largest patch.

Family: synthetic
Paper: A Unified Anomaly Synthesis Strategy with Gradient Ascent for Industrial Anomaly Detection and Localization,
    ECCV 2024, arXiv:2407.09359.
Reference: https://github.com/cqylunlun/GLASS
Differences: the center is computed with the current adaptor at every step, not once an epoch; patch features are
    stacked means of neighborhoods, without pooling of channels (see SimpleNet); the hypothesis is a hyperparameter, not
    chosen by the spectrum of the images; the object is found by Otsu's threshold, not given as a mask; an epoch has all
    images, not 392; no layer in front of the batch norm has a bias, which batch norm would cancel; the last epoch
    counts, not the best one on the test images; the running variance is the biased one of the batches.
Results: experiments/recipes/glass.py
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Auxiliary, Batch, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.patches import Discriminator
from jaxad.ops.collect import collect
from jaxad.ops.heatmap import counted, patch_features, upsample_blur
from jaxad.ops.knn import squared_distances
from jaxad.ops.losses import focal_loss
from jaxad.synthesis.anomaly import blend, foreground
from jaxad.synthesis.ascent import ascend, project_to_shell
from jaxad.synthesis.perlin import perlin_mask
from jaxad.synthesis.texture import GENTLE_CHANGES, source
from jaxad.training import Descent, gradient_stage, shuffled_parts
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import of_parts, torch_adam

RADIUS_QUANTILE = 0.75
"""Share of the normal features inside the hypersphere."""
MIN_DISTANCE = 0.5
"""Smallest distance of a global anomaly to its normal feature, and half of the largest (manifold hypothesis)."""
MAX_DRAWS = 64
"""Draws of a shape before an image goes without one."""
STEP_LENGTH, STEPS_PER_PROJECTION = 1e-3, 5
"""Of the ascent."""


class Nearest(NamedTuple):
    """Sampled normal features, one an image, and their distances to the nearest ones of the other images so far."""

    sample: Float[Array, "n c"]
    """NaN until the image has been seen."""
    distance: Float[Array, "n"]


class GlassFeatures(NamedTuple):
    """The sum of the normal features of the images so far."""

    total: Float[Array, "h w c"]
    count: Float[Array, ""]
    nearest: Nearest | None
    """Where the shell depends on it."""


class GlassNormal(NamedTuple):
    """What is known of normal features before training."""

    mean: Float[Array, "h w c"]
    """At every position."""
    spacing: Float[Array, ""] | None
    """The median distance of a normal feature to the nearest one of another image, where the shell depends on it."""


class GlassSamples(NamedTuple):
    """What a step learns from: the patches of normal images, and the same of these images with a texture each."""

    normal: Float[Array, "b h w c"]
    local: Float[Array, "b h w c"]
    mask: Bool[Array, "b h w"]
    """Patches with a part of the texture."""
    position: Int[Array, "b h w"]
    """Of the patch in its image, as rows after one another."""


class GlassTraining(NamedTuple):
    """Adaptor and discriminator during training."""

    params: PyTree
    stats: PyTree
    normal: GlassNormal


class GlassDiscriminator(NamedTuple):
    """The trained adaptor and discriminator."""

    params: PyTree
    stats: PyTree


def random_shape(key: Key, allowed: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """A mask of Perlin noise, or the intersection or union of two; redrawn until a pixel of it is allowed."""

    def draw(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        draws, key, _ = state
        key, first, second, which = jax.random.split(key, 4)
        a, b = (perlin_mask(k, (allowed.shape[0], allowed.shape[1])) for k in (first, second))
        mask = jnp.select([jax.random.randint(which, (), 0, 3) == i for i in (0, 1)], [a, a & b], a | b)
        return draws + 1, key, mask & allowed

    def is_empty(state: tuple[Array, Array, Array]) -> Array:
        return (state[0] < MAX_DRAWS) & ~state[2].any()

    return jax.lax.while_loop(is_empty, draw, (jnp.int32(0), key, jnp.zeros_like(allowed)))[2]


def closer(nearest: Nearest, features: Float[Array, "b h w c"], batch: Batch) -> Nearest:
    """Looks for nearer features in a batch, in the second pass over the images; the first one samples features."""
    _, h, w, c = features.shape
    rows = features.reshape(-1, h * w, c)
    own = jax.vmap(lambda row, index: row[index % (h * w)])(rows, batch.index)
    sample = collect(nearest.sample, own, batch)
    squared = squared_distances(nearest.sample, rows.reshape(-1, c)).reshape(len(sample), *rows.shape[:2]).min(-1)
    is_seen = jnp.isfinite(nearest.sample[:, :1])  # the others are room for larger classes
    other = is_seen & batch.valid & (batch.index != jnp.arange(len(sample))[:, None]) & (batch.progress >= 0.5)
    distance = jnp.sqrt(jnp.where(other, squared, jnp.inf).min(1))
    return Nearest(sample, jnp.minimum(nearest.distance, distance))


def pair_distances(rows: Float[Array, "n c"]) -> Float[Array, "n"]:
    """Of every row to the one that is half of them further on."""
    return jnp.linalg.norm(rows - jnp.roll(rows, len(rows) // 2, 0), axis=-1)


def glass(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
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
    rows_per_step: int | None = None,
    shell: float | None = None,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
    sigma: float = 4.0,
) -> Method:
    """GLASS.

    Args:
        backbone: The network of the patch features.
        layers: Its stages, stacked on the grid of the first; None for its patch layers (layer2 and layer3 of a ResNet).
        image_size: (height, width) of the images and of the heat map.
        hypothesis: Normal features lie on a "manifold", or in a "hypersphere" around the mean of their position.
        on_foreground: Textures lie on the object only, which Otsu's threshold finds.
        feature_scale: Factor of the patch features. Noise and distances suit weights like torchvision's; the features
            of Caffe's ResNets are several times as large.
        hidden: Units of the discriminator.
        noise: Standard deviation of the noise that global anomalies start from.
        ascent_steps: Steps of gradient ascent, with a projection after every fifth.
        hard_quantile: Share of the patches of images with textures that the loss ignores, those with the smallest
            errors.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        rows_per_step: Patches per step, of normal images and of the same with textures. The patches of as many images
            are shuffled, or of `train_batch_size` if that is more, and every step takes so many of them. None: all
            patches of `train_batch_size` images, as published.
        shell: Smallest distance of a global anomaly to its normal feature, and half of the largest, in units of the
            median distance of normal features to the nearest one of another image (manifold hypothesis). None: 0.5
            between adapted features, as published, which suits their dimension and scale there.
        learning_rate: Of the adaptor's Adam; the discriminator's AdamW has twice that (and a decay of 0.01).
        weight_decay: Of the adaptor, added to the gradient.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    rows = 1 if rows_per_step is None else rows_per_step
    at_least_one(hidden=hidden, ascent_steps=ascent_steps, epochs=epochs)
    at_least_one(train_batch_size=train_batch_size, rows_per_step=rows)
    above_zero(
        feature_scale=feature_scale, noise=noise, learning_rate=learning_rate, shell=1.0 if shell is None else shell
    )
    zero_or_more(weight_decay=weight_decay, sigma=sigma)
    if not 0 <= hard_quantile < 1:
        raise ValueError(f"hard_quantile must be in [0, 1), got {hard_quantile}")
    if hypothesis not in ("manifold", "hypersphere"):
        raise ValueError(f"hypothesis must be manifold or hypersphere, got {hypothesis}")
    if shell is not None and hypothesis == "hypersphere":
        raise ValueError(f"shell is of the manifold hypothesis only, got {shell} with hypersphere: leave it out")
    network = architecture(backbone)
    layers = network.patch_layers if layers is None else tuple(layers)
    optimizer = of_parts(
        adaptor=torch_adam(learning_rate, weight_decay),
        discriminator=optax.adamw(2 * learning_rate, weight_decay=0.01),
    )
    discriminator, spherical = Discriminator(hidden), hypothesis == "hypersphere"

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return feature_scale * patch_features(x, layers)

    def init_sum(key: Key, state: None, frozen: Frozen, spec: PyTree) -> GlassFeatures:
        del key, state, frozen
        n, *shape = jax.eval_shape(patches, spec).shape
        sample = jnp.full((n, shape[-1]), jnp.nan, jnp.float32)
        nearest = None if shell is None else Nearest(sample, jnp.full(n, jnp.inf, jnp.float32))
        return GlassFeatures(jnp.zeros(shape), jnp.zeros(()), nearest)

    def add(key: Key, state: GlassFeatures, frozen: Frozen, batch: Batch) -> tuple[GlassFeatures, Metrics]:
        del key, frozen
        features = patches(batch.x)
        total = state.total + jnp.where(batch.valid[:, None, None, None], features, 0).sum(0)
        nearest = None if state.nearest is None else closer(state.nearest, features, batch)
        return GlassFeatures(total, state.count + batch.valid.sum().astype(total.dtype), nearest), {}

    def measured(key: Key, state: GlassFeatures, frozen: Frozen) -> GlassNormal:
        del key, frozen
        mean, spacing = state.total / state.count, None
        if state.nearest is not None:
            distance = state.nearest.distance
            spacing = jnp.nanmedian(jnp.where(jnp.isfinite(distance), distance, jnp.nan))
        return GlassNormal(mean, spacing)

    def inner_radius(model: GlassTraining, raw: Float[Array, "b h w c"], adapted: Float[Array, "b h w c"]) -> Array:
        """Of the shell around an adapted feature. The adaptor changes distances, by a factor that pairs show."""
        if shell is None or model.normal.spacing is None:
            return jnp.float32(MIN_DISTANCE)
        before, after = (jnp.median(pair_distances(x.reshape(-1, x.shape[-1]))) for x in (raw, adapted))
        return shell * model.normal.spacing * after / before

    def init(key: Key, normal: GlassNormal, frozen: Frozen, spec: PyTree) -> GlassTraining:
        del frozen, spec
        adaptor_key, discriminator_key = jax.random.split(key)
        c = normal.mean.shape[-1]
        variables = discriminator.init(discriminator_key, jnp.zeros((1, 1, 1, c)), train=True)
        params = {
            "adaptor": jax.nn.initializers.glorot_normal()(adaptor_key, (c, c), jnp.float32),
            "discriminator": variables["params"],
        }
        return GlassTraining(params, variables["batch_stats"], normal)

    def textured(key: Key, image: Float[Array, "h w 3"], photographs: Array | None) -> tuple[Array, Array]:
        """The image with a texture, and the mask of the texture."""
        shape_key, texture_key, opacity_key = jax.random.split(key, 3)
        mask = random_shape(shape_key, foreground(image) if on_foreground else jnp.ones(image_size, bool))
        opacity = jnp.clip(0.5 + 0.1 * jax.random.normal(opacity_key), 0.2, 0.8)
        return blend(image, source(texture_key, image_size, photographs, GENTLE_CHANGES), mask, opacity), mask

    def logits(params: PyTree, stats: PyTree, x: Float[Array, "b h w c"]) -> tuple[Array, PyTree]:
        """Those of a batch in training, and the new statistics."""
        variables = {"params": params["discriminator"], "batch_stats": stats}
        output, updated = discriminator.apply(variables, x, train=True, mutable=["batch_stats"])
        return output, updated["batch_stats"]

    def samples(key: Key, frozen: Frozen, batch: Batch) -> GlassSamples:
        image = batch.x["image"].astype(jnp.float32) / 255
        keys = jax.random.split(key, len(image))
        defective, mask = jax.vmap(lambda key, image: textured(key, image, batch.auxiliary))(keys, image)
        normal = patches(batch.x)
        (h, w), grid = image_size, normal.shape[1:3]
        window = (1, h // grid[0], w // grid[1])
        mask = jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, window, window, "VALID")[:, : grid[0], : grid[1]]
        position = jnp.broadcast_to(jnp.arange(grid[0] * grid[1]).reshape(grid), mask.shape)
        return GlassSamples(normal, patches(network.apply(frozen, defective, layers)), mask, position)

    def shuffled_samples(key: Key, model: GlassTraining, frozen: Frozen, batch: Batch) -> GlassSamples:
        del model
        texture_key, order_key = jax.random.split(key)
        of_images = samples(texture_key, frozen, batch)
        of_patches = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, 1, *leaf.shape[3:]), of_images)
        return shuffled_parts(order_key, of_patches, rows)

    def loss(params: PyTree, model: GlassTraining, key: Key, frozen: Frozen, batch: Any) -> tuple[Array, dict]:
        texture_key, noise_key = jax.random.split(key)
        raw, local, mask, position = samples(texture_key, frozen, batch) if rows_per_step is None else batch
        mean = model.normal.mean.reshape(-1, raw.shape[-1])

        normal, local = raw @ params["adaptor"], local @ params["adaptor"]
        constant, centers, fixed_params = jax.lax.stop_gradient((normal, mean @ params["adaptor"], params))
        center = centers[position]
        distances = jnp.linalg.norm(jnp.stack([jax.lax.stop_gradient(local), constant]) - center, axis=-1)
        is_normal = jnp.stack([~mask, jnp.ones_like(mask)])
        radius = jnp.nanquantile(jnp.where(is_normal, distances, jnp.nan), RADIUS_QUANTILE)

        def normality(x: Array, stats: PyTree) -> tuple[Array, PyTree]:
            output, stats = logits(fixed_params, stats, jnp.concatenate([constant, x]))
            return optax.sigmoid_binary_cross_entropy(jnp.split(output, 2)[1], jnp.ones(())).mean(), stats

        middle, distance = (center, radius) if spherical else (normal, inner_radius(model, raw, constant))
        project = lambda x: project_to_shell(x, middle, distance)  # noqa: E731
        start = normal + noise * jax.random.normal(noise_key, raw.shape)
        moved, stats = ascend(normality, start, model.stats, ascent_steps, STEP_LENGTH, STEPS_PER_PROJECTION, project)
        output, stats = logits(params, stats, jnp.concatenate([normal, moved]))
        of_normal, of_global = (
            optax.sigmoid_binary_cross_entropy(part, label).mean()
            for part, label in zip(jnp.split(output, 2), (jnp.zeros(()), jnp.ones(())), strict=True)
        )

        if spherical:
            local = jnp.where(mask[..., None], project_to_shell(local, center, 2 * radius), local)
        output, stats = logits(params, stats, local)
        probability = jax.nn.sigmoid(output)
        errors = jax.lax.stop_gradient((probability - mask.astype(jnp.float32)) ** 2)
        hard = errors >= jnp.quantile(errors, hard_quantile, method="higher")
        of_local = jnp.mean(focal_loss(probability, mask), where=hard)
        return of_normal + of_global + of_local, {"stats": stats}

    def finish(key: Key, model: GlassTraining, frozen: Frozen) -> GlassDiscriminator:
        del key, frozen
        return GlassDiscriminator(model.params, model.stats)

    def score(state: GlassDiscriminator, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        variables = {"params": state.params["discriminator"], "batch_stats": state.stats}
        output: Any = discriminator.apply(variables, patches(x) @ state.params["adaptor"], train=False)
        probability = jax.nn.sigmoid(output)
        return Scores(counted(probability, ignore).max((1, 2)), upsample_blur(probability, image_size, sigma))

    descent = Descent(loss, optimizer, parts=None if rows_per_step is None else shuffled_samples)
    stages = (
        Stage("measure", init_sum, add, measured, epochs=1 if shell is None else 2),
        gradient_stage("train", init, [descent], epochs=epochs, batch_size=max(train_batch_size, rows), finish=finish),
    )
    return Method(features(network, layers, image=True), stages, score, auxiliary=Auxiliary())
