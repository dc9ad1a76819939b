"""CutPaste: a network learns to tell images with a pasted piece, and a Gaussian of its normal features scores others.

Stored: a network, trained to tell normal images from those with a pasted rectangle or a pasted scar or both (sections
2.1 to 2.3), and the mean and covariance of its pooled features of the training images, or of their patches, each scaled
to unit length. An image scores the Mahalanobis distance of its features, and the heat map is the gradient-weighted
class activation map of that (GradCAM); a network of patches scores every patch of a grid, the heat map spreads each
with a Gaussian, and an image scores the largest (section 2.4).

Paper: CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, CVPR 2021, arXiv:2104.04015.
Reference: https://github.com/Runinho/pytorch-cutpaste (no official code)
Differences: a pretrained network learns without batch norm, which is folded into its convolutions; the hidden layers of
    the head have batch norm; images are changed in color before, not moved; features of unit length, and a pretrained
    network that has no gradient at first, are the reference's, not the paper's; the covariance is shrunk (Ledoit and
    Wolf), as there are fewer images than features; an epoch is one pass over the images, not 256 steps; the running
    variance is not corrected for the size of a batch.
Results: experiments/recipes/cutpaste.py
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from jaxad.backbones import backbone as architecture
from jaxad.backbones import residual_blocks, student
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.ops.cosine import unit
from jaxad.ops.gaussian import ledoit_wolf, mahalanobis
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.image import pixels
from jaxad.synthesis.color import color_jitter
from jaxad.synthesis.cutpaste import cutpaste as with_piece
from jaxad.synthesis.cutpaste import scar as with_scar
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding

JITTER = 0.1
"""Strength of the changes of color."""
WAYS = {"binary": (with_piece,), "scar": (with_scar,), "3way": (with_piece, with_scar)}
"""What is told from normal images."""


class CutpasteTraining(NamedTuple):
    """Network and head while they are trained."""

    trained: Trained
    running: PyTree
    """Statistics of their batch norms."""
    features: Float[Array, "n p d"]
    seen: Bool[Array, "n"]


class CutpasteDescribing(NamedTuple):
    """The trained network, and the features of normal images so far."""

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
    """Hidden layers with batch norm, a projection, and logits of what an image may be."""

    dims: tuple[int, ...]
    ways: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], valid: Bool[Array, "b"]) -> Float[Array, "b w"]:
        """The logits."""
        for dim in self.dims[:-1]:
            norm = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5)
            x = nn.relu(norm(nn.Dense(dim, use_bias=False)(x), mask=(valid | ~valid.any())[:, None]))
        return nn.Dense(self.ways)(nn.Dense(self.dims[-1])(x))


def spread(grid: int, out: int, first: float, apart: int, sigma: float) -> Float[np.ndarray, "out grid"]:
    """The matrix that spreads the scores of patches along an axis: means weighted by Gaussians about their middles."""
    middle = first + apart * np.arange(grid)
    weight = np.exp(-0.5 * ((np.arange(out)[:, None] - middle) / sigma) ** 2) + 1e-30
    return weight / weight.sum(1, keepdims=True)


def cutpaste(
    *,
    backbone: str = "resnet18",
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
        image_size: (height, width) of the images, which is that of the heat map.
        way: What is told from normal images: a rectangle ("binary"), a scar, or both, as two classes ("3way").
        pretrained: The network begins with the weights given, not from scratch.
        frozen_share: Share of the steps, the first ones, in which only the head of a pretrained network learns; the
            network has no gradient then, but its weights decay.
        patch_size: Height and width of the patches that a network of patches learns from; None for whole images.
        stride: Pixels between the patches that are scored.
        head: Units of the layers behind the network, of which the last is the projection.
        epochs: Passes over the training images.
        train_batch_size: Normal images of a step.
        learning_rate: Of SGD; it falls to zero as a cosine does.
        momentum: Of SGD.
        weight_decay: Of SGD, added to the gradient.
        sigma: Smoothing of the heat map of whole images in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the backbone no ResNet.
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
    residual_blocks(backbone)  # raises for what is no ResNet
    network, learner = architecture(backbone), student(backbone, (layer,))
    spoilers = WAYS[way]
    classifier = Head(tuple(head), 1 + len(spoilers))
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))
    grid = (1, 1) if patch_size is None else tuple((side - patch_size) // stride + 1 for side in image_size)

    def described(params: PyTree, frozen: Frozen, image: Array) -> Float[Array, "b h w d"]:
        """The map of the last stage as the trained network gives it."""
        return network.apply(frozen | {"params": params}, image, (layer,))[layer]

    def patches(image: UInt8[Array, "b h w 3"]) -> UInt8[Array, "n p p 3"]:
        """The patches that are scored, image by image."""
        if patch_size is None:
            return image
        cut = [
            image[:, i * stride : i * stride + patch_size, j * stride : j * stride + patch_size]
            for i in range(grid[0])
            for j in range(grid[1])
        ]
        return jnp.stack(cut, 1).reshape(-1, patch_size, patch_size, 3)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> CutpasteTraining:
        first, second = jax.random.split(key)
        variables = {"params": frozen["params"]} if pretrained else learner.init(first)
        params = frozen["params"] if pretrained else learner.freeze(variables)
        d = jax.eval_shape(described, params, frozen, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)).shape[-1]
        made = classifier.init(second, jnp.zeros((1, d)), jnp.ones(1, bool))
        running = {"network": variables.get("batch_stats", {}), "head": made.get("batch_stats", {})}
        trained = begin(optimizer, {"network": variables["params"], "head": made["params"]})
        n = spec.shape[0]
        return CutpasteTraining(trained, running, jnp.zeros((n, grid[0] * grid[1], d)), jnp.zeros(n, bool))

    def drawn(key: Key, image: Float[Array, "h w 3"]) -> Float[Array, "k _ _ 3"]:
        """A normal image or patch, and what is made of it."""
        where, color, *keys = jax.random.split(key, 2 + len(spoilers))
        if patch_size is not None:
            room = jnp.asarray([side - patch_size + 1.0 for side in image_size])
            top, left = jnp.floor(jax.random.uniform(where, (2,)) * room).astype(jnp.int32)
            image = jax.lax.dynamic_slice(image, (top, left, jnp.int32(0)), (patch_size, patch_size, 3))
        image = color_jitter(color, image, JITTER)
        return jnp.stack([image, *(make(k, image)[0] for make, k in zip(spoilers, keys, strict=True))])

    def train(key: Key, state: CutpasteTraining, frozen: Frozen, batch: Batch) -> tuple[CutpasteTraining, Metrics]:
        image = zero_padding(batch.x, batch.valid).astype(jnp.float32) / 255
        made = jax.vmap(drawn)(jax.random.split(key, len(image)), image)
        kinds, made = made.shape[1], made.reshape(-1, *made.shape[2:])
        valid, label = jnp.repeat(batch.valid, kinds), jnp.tile(jnp.arange(kinds), len(image))

        def loss(params: PyTree) -> Any:
            if pretrained:
                still = batch.progress < frozen_share
                own = jax.tree.map(lambda p: jnp.where(still, jax.lax.stop_gradient(p), p), params["network"])
                maps, running = described(own, frozen, made), {}
            else:
                variables = {"params": params["network"], "batch_stats": state.running["network"]}
                found, running = learner.apply(variables, frozen, made, valid)
                maps = found[layer]
            variables = {"params": params["head"], "batch_stats": state.running["head"]}
            logits, new = classifier.apply(variables, maps.mean((1, 2)), valid, mutable=["batch_stats"])
            lost = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return mean_of_valid(lost, valid), {"network": running, "head": new.get("batch_stats", {})}

        rate = 0.5 * (1 + jnp.cos(jnp.pi * batch.progress))
        trained, metrics, running = descend_with(optimizer, state.trained, loss, rate)
        return state._replace(trained=trained, running=running), metrics

    def to_describe(key: Key, state: CutpasteTraining, frozen: Frozen) -> CutpasteDescribing:
        del key, frozen
        params = state.trained.params["network"]
        if not pretrained:
            params = learner.freeze({"params": params, "batch_stats": state.running["network"]})
        return CutpasteDescribing(params, state.features, state.seen)

    def describe(key: Key, state: CutpasteDescribing, frozen: Frozen, batch: Batch) -> tuple[Any, Metrics]:
        del key
        found = unit(described(state.params, frozen, patches(zero_padding(batch.x, batch.valid))).mean((1, 2)))
        row = jnp.where(batch.valid, batch.index, len(state.seen))
        features = state.features.at[row].set(found.reshape(len(row), *state.features.shape[1:]), mode="drop")
        return state._replace(features=features, seen=state.seen.at[row].set(True, mode="drop")), {}

    def finish(key: Key, state: CutpasteDescribing, frozen: Frozen) -> CutpasteGaussian:
        del key, frozen
        rows = state.features.reshape(-1, state.features.shape[-1])
        mean, covariance = ledoit_wolf(rows, jnp.repeat(state.seen, state.features.shape[1]))
        return CutpasteGaussian(state.params, mean, jnp.linalg.cholesky(covariance))

    def score(state: CutpasteGaussian, frozen: Frozen, x: UInt8[Array, "b h w 3"]) -> Scores:
        maps = described(state.params, frozen, patches(x))
        distance = lambda pooled: mahalanobis(unit(pooled), state.mean, state.factor)  # noqa: E731
        if patch_size is None:
            pooled = maps.mean((1, 2))
            weight = jax.grad(lambda pooled: distance(pooled).sum())(pooled)
            shown = nn.relu(jnp.einsum("bhwd,bd->bhw", maps, weight))
            return Scores(distance(pooled), upsample_blur(shown, image_size, sigma))
        found = distance(maps.mean((1, 2))).reshape(-1, *grid)
        rows, columns = (
            jnp.asarray(spread(g, side, (patch_size - 1) / 2, stride, stride), jnp.float32)
            for g, side in zip(grid, image_size, strict=True)
        )
        pixel = jnp.einsum("Hh,bhw,Ww->bHW", rows, found, columns, precision=jax.lax.Precision.HIGHEST)
        return Scores(found.max((1, 2)), pixel)

    stages = (
        Stage("train", train, to_describe, epochs=epochs, batch_size=train_batch_size, shuffle=True),
        Stage("describe", describe, finish),
    )
    return Method(pixels, init, stages, score)
