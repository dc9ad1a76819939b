"""CFA: patch features adapted to lie within small hyperspheres around memorized ones, and outside of the next nearest.

Stored: a 1x1 convolution of patch features and their position (CoordConv), the patch descriptor; and the memory, which
holds for every position the mean of the descriptors of all training images before training, or with `gamma_c` above 1
the centers of their clusters (k-means). Training draws a descriptor into the hyperspheres of its K nearest memorized
ones and pushes it out of those of the J that follow (Eq. 2-5); the memory stays fixed. A position scores the distance
to its nearest neighbor, weighted by its softmin among the K nearest (Eq. 7); the heat map is smoothed, and an image
scores its maximum.

Family: features
Paper: CFA: Coupled-hypersphere-based Feature Adaptation for Target-Oriented Anomaly Localization, IEEE Access 2022,
    arXiv:2206.04325.
Reference: https://github.com/sungwool/CFA_for_anomaly_localization
Differences: as in the reference, the memory is a mean over images, not the clusters of the first image updated by the
    others; it counts the images of an incomplete last batch too; its clusters come from a single k-means++ seeding and
    at most 300 iterations; the hard negatives follow the K nearest whatever J is; EfficientNets get no special
    treatment; the last epoch is kept, not the best on the test images, and scores are not scaled to their range there.
Results: experiments/recipes/cfa.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage, State
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.heatmap import counted, patch_features, upsample_blur
from jaxad.ops.kmeans import kmeans, plus_plus
from jaxad.ops.knn import Sketch, knn, sketch
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_amsgrad_w

MARGIN, SOFTNESS, RADIUS = 0.1, 1e-3, 1e-5
"""Alpha and nu of Eq. 3 and 4, and the radius of the hyperspheres before training."""


class CfaSums(NamedTuple):
    """The untrained descriptor, and its output at every position, summed over the images so far."""

    descriptor: PyTree
    total: Float[Array, "h w d"]
    images: Float[Array, ""]


class Memory(NamedTuple):
    """The memorized descriptors, with the first pass of their nearest-neighbor search."""

    centers: Float[Array, "m d"]
    sketch: Sketch | None


class CfaModel(NamedTuple):
    """The parameters of the descriptor (and in training the radius of the hyperspheres), and the memory."""

    params: dict[str, PyTree]
    memory: Memory


def add_coordinates(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    """Two more channels: the row and the column, from -1 to 1 (CoordConv, arXiv:1807.03247)."""
    b, h, w, _ = x.shape
    rows, columns = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
    position = jnp.broadcast_to(jnp.stack([rows, columns], -1).astype(x.dtype), (b, h, w, 2))
    return jnp.concatenate([x, position], -1)


def cfa(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
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
        backbone: The network that extracts the features.
        layers: Its stages, stacked on the grid of the first; None for its pyramid (layer1 to layer3 of a ResNet).
        image_size: (height, width) of the images and of the heat map.
        gamma_c: Positions per memorized vector.
        gamma_d: Channels of the features divided by those of a descriptor.
        feature_scale: Factor of the patch features. The margin, the softmin and the learning rate suit weights like
            torchvision's; the features of others may be several times as large.
        num_neighbors: Hyperspheres that a descriptor is drawn into, and neighbors that weight its score (K).
        num_hard_negatives: Hyperspheres that it is pushed out of (J).
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of AdamW with AMSGrad.
        weight_decay: Of the same.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of its range.
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

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return add_coordinates(feature_scale * patch_features(x, layers))

    def describe(descriptor: PyTree, x: dict[str, Array]) -> Any:
        inputs = patches(x)
        return nn.Dense(max(1, (inputs.shape[-1] - 2) // gamma_d)).apply(descriptor, inputs)

    def init(key: Key, state: State, frozen: Frozen, spec: PyTree) -> CfaSums:
        del state, frozen
        _, h, w, c = jax.eval_shape(patches, spec).shape
        if h * w // gamma_c < num_neighbors + num_hard_negatives:
            raise ValueError(
                f"gamma_c must leave at least {num_neighbors + num_hard_negatives} (num_neighbors + "
                f"num_hard_negatives) of {h * w} positions, got {gamma_c}"
            )
        size = max(1, (c - 2) // gamma_d)
        dense = nn.Dense(size, kernel_init=torch_uniform, bias_init=torch_bias(c))
        descriptor = dense.init(key, jnp.zeros((1, c)))
        return CfaSums(descriptor, jnp.zeros((h, w, size)), jnp.zeros(()))

    def collect(key: Key, state: CfaSums, frozen: Frozen, batch: Batch) -> tuple[CfaSums, Metrics]:
        del key, frozen
        outputs = describe(state.descriptor, batch.x)
        total = state.total + jnp.where(batch.valid[:, None, None, None], outputs, 0).sum(0)
        return state._replace(total=total, images=state.images + batch.valid.sum().astype(total.dtype)), {}

    def memorize(key: Key, state: CfaSums, frozen: Frozen) -> CfaModel:
        del frozen
        centers = (state.total / state.images).reshape(-1, state.total.shape[-1])
        if gamma_c > 1:
            centers = kmeans(centers, plus_plus(key, centers, centers.shape[0] // gamma_c))
        memory = Memory(centers, sketch(centers, jnp.ones(centers.shape[0], bool)))
        return CfaModel({"descriptor": state.descriptor}, memory)

    def init_training(key: Key, model: CfaModel, frozen: Frozen, spec: PyTree) -> CfaModel:
        del key, frozen, spec
        return model._replace(params=model.params | {"radius": jnp.full((), RADIUS, jnp.float32)})

    def search(memory: Memory, descriptors: Float[Array, "b h w d"], k: int) -> tuple[Array, Array]:
        return knn(descriptors.reshape(-1, descriptors.shape[-1]), memory.centers, k, sketch=memory.sketch)

    def loss(params: PyTree, model: CfaModel, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key, frozen
        descriptors = describe(params["descriptor"], batch.x)
        _, index = search(model.memory, jax.lax.stop_gradient(descriptors), num_neighbors + num_hard_negatives)

        @jax.checkpoint  # one neighbor's vectors at a time
        def squared_distance(index: Array) -> Float[Array, "b h w"]:
            return jnp.sum((descriptors - model.memory.centers[index].reshape(descriptors.shape)) ** 2, -1)

        squared = jax.lax.map(squared_distance, index.T)
        inside, outside = squared[:num_neighbors], squared[num_neighbors:]
        attraction = jnp.maximum(inside - params["radius"] ** 2, 0).mean()
        repulsion = jnp.maximum(params["radius"] ** 2 - outside - MARGIN, 0).mean()
        return (attraction + repulsion) / SOFTNESS, {}

    def finish(key: Key, model: CfaModel, frozen: Frozen) -> CfaModel:
        del key, frozen
        return model._replace(params={"descriptor": model.params["descriptor"]})

    def score(state: CfaModel, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        descriptors = describe(state.params["descriptor"], x)
        distance, _ = search(state.memory, descriptors, num_neighbors)
        weighted = jax.nn.softmax(-distance, -1)[:, 0] * distance[:, 0]
        pixel = upsample_blur(weighted.reshape(descriptors.shape[:3]), image_size, sigma)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    optimizer = torch_amsgrad_w(learning_rate, weight_decay)
    stages = (
        Stage("memorize", init, collect, memorize),
        gradient_stage(
            "train", init_training, loss, optimizer, epochs=epochs, batch_size=train_batch_size, finish=finish
        ),
    )
    return Method(features(backbone, layers), stages, score)
