"""CFA: patch features adapted until they lie within small hyperspheres around memorized ones, and out of the next.

Stored: a 1x1 convolution of patch features and their position (CoordConv), the patch descriptor; and the memory, which
holds for every position the mean of the descriptors of all training images before training, and with `gamma_c` above 1
the centers of their clusters (k-means). Training draws a descriptor into the hyperspheres of its K nearest memorized
ones and pushes it out of those of the J that follow (Eq. 2-5); the memory stays. A position scores the distance to its
nearest neighbor, weighted by its softmin among the K nearest (Eq. 7); the heat map is smoothed, and an image scores its
maximum.

Paper: CFA: Coupled-hypersphere-based Feature Adaptation for Target-Oriented Anomaly Localization, IEEE Access 2022,
    arXiv:2206.04325.
Reference: https://github.com/sungwool/CFA_for_anomaly_localization
Differences: as in the reference, the memory is a mean over images, not clusters of the first of them that follow the
    others; it counts the images of an incomplete last batch too; its clusters come from one seeding by k-means++ and
    at most 300 rounds; the hard negatives follow the K nearest whatever J is; EfficientNets get no treatment of their
    own; the bias of the convolution begins as zeros; the last epoch counts, not the best on the test images.
Results: experiments/recipes/cfa.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.initial import torch_uniform
from jaxad.ops.heatmap import patch_features, upsample_blur
from jaxad.ops.kmeans import kmeans, plus_plus
from jaxad.ops.knn import Sketch, knn, sketch
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_amsgrad_w, zero_padding

MARGIN, SOFTNESS = 0.1, 1e-3
"""Alpha and nu of Eq. 3 and 4."""


class CfaCollecting(NamedTuple):
    """Descriptors of every position, summed over the images so far."""

    descriptor: PyTree
    total: Float[Array, "h w d"]
    images: Float[Array, ""]


class Memory(NamedTuple):
    """What is memorized, with the first pass of its search."""

    centers: Float[Array, "m d"]
    sketch: Sketch | None


class CfaTraining(NamedTuple):
    """Descriptor and radius while they are trained."""

    trained: Trained
    memory: Memory


class CfaSpheres(NamedTuple):
    """The trained descriptor and the memory."""

    descriptor: PyTree
    memory: Memory


def coordinates(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    """Two more channels: the row and the column, from -1 to 1 (CoordConv, arXiv:1807.03247)."""
    b, h, w, _ = x.shape
    rows, columns = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
    position = jnp.broadcast_to(jnp.stack([rows, columns], -1).astype(x.dtype), (b, h, w, 2))
    return jnp.concatenate([x, position], -1)


def cfa(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (224, 224),
    gamma_c: int = 1,
    gamma_d: int = 1,
    feature_scale: float = 1.0,
    num_neighbors: int = 3,
    num_hard_negatives: int = 3,
    epochs: int = 30,
    train_batch_size: int = 4,
    learning_rate: float = 1e-3,
    weight_decay: float = 5e-4,
    sigma: float = 4.0,
) -> Method:
    """CFA.

    Args:
        backbone: The network that describes patches.
        layers: Its stages, stacked on the grid of the first; None for its pyramid (layer1 to layer3 of a ResNet).
        image_size: (height, width) of the images, which is that of the heat map.
        gamma_c: The memory holds one vector for so many positions.
        gamma_d: A descriptor has the channels of the features over this.
        feature_scale: What patch features are multiplied by. The margin, the softmin and the steps suit weights like
            torchvision's; the features of others may be several times as large.
        num_neighbors: Hyperspheres that a descriptor is drawn into, and neighbors that weigh its score (K).
        num_hard_negatives: Hyperspheres that it is pushed out of (J).
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of AdamW with AMSGrad.
        weight_decay: Of the same.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(
        gamma_c=gamma_c,
        gamma_d=gamma_d,
        num_neighbors=num_neighbors,
        num_hard_negatives=num_hard_negatives,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    above_zero(feature_scale=feature_scale, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay, sigma=sigma)
    layers = architecture(backbone).pyramid_layers if layers is None else tuple(layers)
    optimizer = torch_amsgrad_w(learning_rate, weight_decay)

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return coordinates(feature_scale * patch_features(x, layers))

    def describe(descriptor: PyTree, x: dict[str, Array]) -> Any:
        found = patches(x)
        return nn.Dense(max(1, (found.shape[-1] - 2) // gamma_d)).apply(descriptor, found)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> CfaCollecting:
        del frozen
        _, h, w, c = jax.eval_shape(patches, spec).shape
        if h * w // gamma_c < num_neighbors + num_hard_negatives:
            raise ValueError(
                f"gamma_c must leave at least {num_neighbors + num_hard_negatives} (num_neighbors + "
                f"num_hard_negatives) of {h * w} positions, got {gamma_c}"
            )
        size = max(1, (c - 2) // gamma_d)
        descriptor = nn.Dense(size, kernel_init=torch_uniform).init(key, jnp.zeros((1, c)))
        return CfaCollecting(descriptor, jnp.zeros((h, w, size)), jnp.zeros(()))

    def collect(key: Key, state: CfaCollecting, frozen: Frozen, batch: Batch) -> tuple[CfaCollecting, Metrics]:
        del key, frozen
        found = describe(state.descriptor, zero_padding(batch.x, batch.valid))
        total = state.total + zero_padding(found, batch.valid).sum(0)
        return state._replace(total=total, images=state.images + batch.valid.sum().astype(total.dtype)), {}

    def memorize(key: Key, state: CfaCollecting, frozen: Frozen) -> CfaTraining:
        del frozen
        centers = (state.total / state.images).reshape(-1, state.total.shape[-1])
        if gamma_c > 1:
            centers = kmeans(centers, plus_plus(key, centers, centers.shape[0] // gamma_c))
        params = {"descriptor": state.descriptor, "radius": jnp.full((), 1e-5, jnp.float32)}
        memory = Memory(centers, sketch(centers, jnp.ones(centers.shape[0], bool)))
        return CfaTraining(begin(optimizer, params), memory)

    def search(memory: Memory, found: Float[Array, "b h w d"], k: int) -> tuple[Array, Array]:
        return knn(found.reshape(-1, found.shape[-1]), memory.centers, k, sketch=memory.sketch)

    def train(key: Key, state: CfaTraining, frozen: Frozen, batch: Batch) -> tuple[CfaTraining, Metrics]:
        del key, frozen
        x = zero_padding(batch.x, batch.valid)

        def loss(params: PyTree) -> Float[Array, ""]:
            found = describe(params["descriptor"], x)
            _, index = search(state.memory, jax.lax.stop_gradient(found), num_neighbors + num_hard_negatives)

            @jax.checkpoint  # one neighbor's vectors at a time
            def squared_distance(index: Array) -> Float[Array, "b h w"]:
                return jnp.sum((found - state.memory.centers[index].reshape(found.shape)) ** 2, -1)

            squared = jax.lax.map(squared_distance, index.T)
            inside, outside = squared[:num_neighbors], squared[num_neighbors:]
            attraction = jnp.maximum(inside - params["radius"] ** 2, 0).mean((0, 2, 3))
            repulsion = jnp.maximum(params["radius"] ** 2 - outside - MARGIN, 0).mean((0, 2, 3))
            return mean_of_valid((attraction + repulsion) / SOFTNESS, batch.valid)

        trained, metrics = descend(optimizer, state.trained, loss)
        return state._replace(trained=trained), metrics

    def finish(key: Key, state: CfaTraining, frozen: Frozen) -> CfaSpheres:
        del key, frozen
        return CfaSpheres(state.trained.params["descriptor"], state.memory)

    def score(state: CfaSpheres, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        found = describe(state.descriptor, x)
        distance, _ = search(state.memory, found, num_neighbors)
        weighted = jax.nn.softmax(-distance, -1)[:, 0] * distance[:, 0]
        pixel = upsample_blur(weighted.reshape(found.shape[:3]), image_size, sigma)
        return Scores(pixel.max((1, 2)), pixel)

    stages = (
        Stage("memorize", collect, memorize),
        Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True),
    )
    return Method(features(backbone, layers), init, stages, score)
