"""CutPaste: a network learns to detect pasted pieces, and a Gaussian of its features of normal images scores others.

Stored: a network, trained to classify normal images and those with a pasted rectangle or a pasted scar or both
(sections 2.1 to 2.3), and the mean and covariance of its pooled features of the training images, or of their patches,
each scaled to unit length. An image scores the Mahalanobis distance of its features, and the heat map is the
gradient-weighted class activation map of that distance (GradCAM). A network of patches scores every patch of a grid;
the heat map spreads the scores with Gaussians, and an image scores its largest patch (section 2.4).

Family: synthetic
Paper: CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, CVPR 2021, arXiv:2104.04015.
Reference: https://github.com/Runinho/pytorch-cutpaste (no official code)
Differences: a pretrained network is trained without batch norm, which is folded into its convolutions, and its weights
    decay while it has no gradient (by 1e-4 of themselves); before the batch norms of the head there is no bias, which
    they would cancel; images are augmented by color jitter, not by translation, and its four changes come in a fixed
    order (which moves pixels by a 29th of what the jitter does); features of unit length, the shrinkage of their
    covariance (Ledoit and Wolf), and a pretrained network without a gradient at first are the reference's, not the
    paper's; the sizes of a scar are shares of the image's, in the reference those of 256 px; a piece is drawn from all
    places where it fits, while the reference leaves out the last row and column, and takes a scar's width for its
    height and its height for its width; an epoch is one pass over the images, not 256 steps; the rate falls one step
    earlier; the running variance is the biased one of the batches (1.6e-4 less in the last stage).
Results: experiments/recipes/cutpaste.py
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from jaxad.backbones import Backbone, residual_blocks, student
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.collect import collect
from jaxad.ops.cosine import unit
from jaxad.ops.gaussian import ledoit_wolf, mahalanobis
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.image import pixels
from jaxad.synthesis.color import color_jitter
from jaxad.synthesis.cutpaste import cutpaste as with_rectangle
from jaxad.synthesis.cutpaste import scar as with_scar
from jaxad.training import cosine, gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_sgd

JITTER = 0.1
"""Strength of the color jitter."""
WAYS = {"binary": (with_rectangle,), "scar": (with_scar,), "3way": (with_rectangle, with_scar)}
"""The classes other than normal."""


class CutpasteTraining(NamedTuple):
    """Network and head during training."""

    params: PyTree
    stats: PyTree
    """Running statistics of the batch norms."""


class CutpasteFeatures(NamedTuple):
    """The trained network, and its features of the training images so far."""

    params: PyTree
    features: Float[Array, "n p d"]
    seen: Bool[Array, "n"]


class CutpasteGaussian(NamedTuple):
    """The trained network and the Gaussian of its features."""

    params: PyTree
    mean: Float[Array, "d"]
    factor: Float[Array, "d d"]
    """Lower Cholesky factor of the covariance."""


class Head(nn.Module):
    """Layers with batch norm, and the logits of the classes; it exists in training only."""

    dims: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """The logits, by the batch norm of this batch."""
        for dim in self.dims:
            x = nn.Dense(dim, use_bias=False, kernel_init=torch_uniform)(x)
            x = nn.relu(nn.BatchNorm(False, momentum=0.9, epsilon=1e-5)(x))
        return nn.Dense(self.classes, kernel_init=torch_uniform, bias_init=torch_bias(x.shape[-1]))(x)


def spread_matrix(grid: int, out: int, first: float, step: int, sigma: float) -> Float[np.ndarray, "out grid"]:
    """The matrix that spreads patch scores along an axis, to means weighted by Gaussians around the patch centers.

    Args:
        grid: Patches along the axis.
        out: Pixels along the axis.
        first: Center of the first patch in pixels.
        step: Pixels between the centers.
        sigma: Standard deviation of the Gaussians in pixels.
    """
    center = first + step * np.arange(grid)
    weight = np.exp(-0.5 * ((np.arange(out)[:, None] - center) / sigma) ** 2) + 1e-30
    return weight / weight.sum(1, keepdims=True)


def cutpaste(
    *,
    backbone: str | Backbone = "resnet18",
    layer: str = "layer4",
    image_size: tuple[int, int] = (256, 256),
    way: Literal["binary", "scar", "3way"] = "3way",
    pretrained: bool = False,
    frozen_share: float = 20 / 256,
    patch_size: int | None = None,
    stride: int = 32,
    head: tuple[int, ...] = (*(512,) * 8, 128),
    epochs: int = 256,
    train_batch_size: int = 32,
    learning_rate: float = 0.03,
    momentum: float = 0.9,
    weight_decay: float = 3e-5,
    sigma: float = 4.0,
) -> Method:
    """CutPaste.

    Args:
        backbone: The network, a ResNet.
        layer: Its last stage.
        image_size: (height, width) of the images and of the heat map.
        way: The classes other than normal: a rectangle ("binary"), a scar, or both as two classes ("3way").
        pretrained: The network starts from the given weights, not from scratch.
        frozen_share: Share of the steps, from the first on, in which only the head of a pretrained network learns; the
            network has no gradient then, but its weights decay.
        patch_size: Height and width of the patches that the network learns from; None for whole images.
        stride: Pixels between the patches that are scored.
        head: Units of the layers behind the network.
        epochs: Passes over the training images.
        train_batch_size: Normal images per step.
        learning_rate: Of SGD; it falls to zero as a cosine does.
        momentum: Of SGD.
        weight_decay: Of SGD, added to the gradient.
        sigma: Smoothing of the heat map of whole images in pixels.

    Raises:
        ValueError: A hyperparameter is out of range, or the backbone is no ResNet.
    """
    at_least_one(stride=stride, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(momentum=momentum, weight_decay=weight_decay, sigma=sigma)
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way}")
    if not head or min(head) < 1:
        raise ValueError(f"head must be numbers of units, one or more, got {head}")
    if not 0 <= frozen_share <= 1:
        raise ValueError(f"frozen_share must be in [0, 1], got {frozen_share}")
    if patch_size is not None and not 1 <= patch_size <= min(image_size):
        raise ValueError(f"patch_size must be in [1, {min(image_size)}], got {patch_size}")
    residual_blocks(backbone)  # raises for other backbones
    network, learner = architecture(backbone), student(backbone, (layer,))
    anomalies = WAYS[way]
    classifier = Head(tuple(head), 1 + len(anomalies))
    grid = (1, 1) if patch_size is None else tuple((side - patch_size) // stride + 1 for side in image_size)

    def feature_map(params: PyTree, frozen: Frozen, image: Array) -> Float[Array, "b h w d"]:
        """The map of the last stage, by parameters that batch norm is folded into."""
        return network.apply(frozen | {"params": params}, image, (layer,))[layer]

    def folded(params: PyTree, stats: PyTree) -> PyTree:
        return params if pretrained else learner.freeze(params, stats)

    def num_features(params: PyTree, frozen: Frozen) -> int:
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return jax.eval_shape(feature_map, params, frozen, image).shape[-1]

    def patches(image: UInt8[Array, "b h w 3"]) -> UInt8[Array, "n p q 3"]:
        """The patches that are scored, image by image."""
        if patch_size is None:
            return image
        crops = [
            image[:, i * stride : i * stride + patch_size, j * stride : j * stride + patch_size]
            for i in range(grid[0])
            for j in range(grid[1])
        ]
        return jnp.stack(crops, 1).reshape(-1, patch_size, patch_size, 3)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> CutpasteTraining:
        del state, spec
        network_key, head_key = jax.random.split(key)
        params, stats = (frozen["params"], {}) if pretrained else learner.init(network_key)
        variables = classifier.init(head_key, jnp.zeros((1, num_features(folded(params, stats), frozen))))
        return CutpasteTraining(
            {"network": params, "head": variables["params"]},
            {"network": stats, "head": variables.get("batch_stats", {})},
        )

    def examples(key: Key, image: Float[Array, "h w 3"]) -> Float[Array, "k _ _ 3"]:
        """A normal image, or a random patch of it, and its copy with an anomaly of every class."""
        crop_key, color_key, *keys = jax.random.split(key, 2 + len(anomalies))
        if patch_size is not None:
            corners = jnp.asarray([side - patch_size + 1.0 for side in image_size])
            top, left = jnp.floor(jax.random.uniform(crop_key, (2,)) * corners).astype(jnp.int32)
            image = jax.lax.dynamic_slice(image, (top, left, jnp.int32(0)), (patch_size, patch_size, 3))
        image = color_jitter(color_key, image, JITTER)
        return jnp.stack([image, *(anomaly(k, image)[0] for anomaly, k in zip(anomalies, keys, strict=True))])

    def loss(
        params: PyTree, model: CutpasteTraining, key: Key, frozen: Frozen, batch: Batch
    ) -> tuple[Float[Array, ""], dict]:
        image = batch.x.astype(jnp.float32) / 255
        image = jax.vmap(examples)(jax.random.split(key, len(image)), image)
        label = jnp.tile(jnp.arange(image.shape[1]), len(image))
        image = image.reshape(-1, *image.shape[2:])
        if pretrained:
            still = batch.progress < frozen_share
            weights = jax.tree.map(lambda p: jnp.where(still, jax.lax.stop_gradient(p), p), params["network"])
            features, stats = feature_map(weights, frozen, image), {}
        else:
            maps, stats = learner.apply(params["network"], model.stats["network"], frozen, image, train=True)
            features = maps[layer]
        variables = {"params": params["head"], "batch_stats": model.stats["head"]}
        logits, changes = classifier.apply(variables, features.mean((1, 2)), mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return value, {"stats": {"network": stats, "head": changes.get("batch_stats", {})}}

    def finish(key: Key, model: CutpasteTraining, frozen: Frozen) -> PyTree:
        del key, frozen
        return folded(model.params["network"], model.stats["network"])

    def init_features(key: Key, params: PyTree, frozen: Frozen, spec: PyTree) -> CutpasteFeatures:
        del key
        n, p, d = spec.shape[0], grid[0] * grid[1], num_features(params, frozen)
        return CutpasteFeatures(params, jnp.zeros((n, p, d)), jnp.zeros(n, bool))

    def describe(key: Key, state: CutpasteFeatures, frozen: Frozen, batch: Batch) -> tuple[CutpasteFeatures, Metrics]:
        del key
        features = unit(feature_map(state.params, frozen, patches(batch.x)).mean((1, 2)))
        features = features.reshape(-1, *state.features.shape[1:])
        return CutpasteFeatures(
            state.params, collect(state.features, features, batch), collect(state.seen, batch.valid, batch)
        ), {}

    def fit_gaussian(key: Key, state: CutpasteFeatures, frozen: Frozen) -> CutpasteGaussian:
        del key, frozen
        _, p, d = state.features.shape
        mean, covariance = ledoit_wolf(state.features.reshape(-1, d), jnp.repeat(state.seen, p))
        return CutpasteGaussian(state.params, mean, jnp.linalg.cholesky(covariance))

    def score(state: CutpasteGaussian, frozen: Frozen, x: UInt8[Array, "b h w 3"], ignore: Ignored = None) -> Scores:
        maps = feature_map(state.params, frozen, patches(x))
        distance = lambda maps: mahalanobis(unit(maps.mean((1, 2))), state.mean, state.factor)  # noqa: E731
        if patch_size is None:
            weight = jax.grad(lambda maps: distance(maps).sum())(maps).mean((1, 2))
            activation = nn.relu(jnp.einsum("bhwd,bd->bhw", maps, weight))
            return Scores(distance(maps), upsample_blur(activation, image_size, sigma))
        patch_scores = distance(maps).reshape(-1, *grid)
        rows, columns = (
            jnp.asarray(spread_matrix(n, side, (patch_size - 1) / 2, stride, stride), jnp.float32)
            for n, side in zip(grid, image_size, strict=True)
        )
        pixel = jnp.einsum("Hh,bhw,Ww->bHW", rows, patch_scores, columns, precision=jax.lax.Precision.HIGHEST)
        if ignore is not None:
            window, steps = (1, patch_size, patch_size), (1, stride, stride)
            counts = jax.lax.reduce_window(~ignore, False, jax.lax.bitwise_or, window, steps, "VALID")
            patch_scores = jnp.where(counts, patch_scores, -jnp.inf)
        return Scores(patch_scores.max((1, 2)), pixel)

    optimizer = torch_sgd(learning_rate, momentum, weight_decay)
    train = gradient_stage(
        "train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size, schedule=cosine, finish=finish
    )
    return Method(pixels, (train, Stage("describe", init_features, describe, fit_gaussian)), score)
