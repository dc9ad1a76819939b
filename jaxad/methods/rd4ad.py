"""RD4AD: a decoder restores a teacher's feature pyramid from its one-class embedding, and cannot restore defects.

Stored: a bottleneck that brings the teacher's maps of three stages to the grid and channels of a fourth (multi-scale
fusion and one-class embedding), and a decoder of transposed residual stages, both trained on the cosine distance of the
maps. A position of a stage scores the cosine distance of both vectors (Eq. 1); the heat map is the smoothed sum of the
upsampled maps, and an image scores its maximum.

Paper: Anomaly Detection via Reverse Distillation from One-Class Embedding, CVPR 2022, arXiv:2201.10703.
Reference: https://github.com/hq-deng/RD4AD
Differences: as in the reference, the loss takes each map as one vector, not position by position; upsampling is by
    pixel centers; steps are of full batches; the running variance is not corrected for the size of a batch. The
    projections of RD++ are not here.
Results: experiments/recipes/rd4ad.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxad.backbones import features, residual_blocks
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn import ConvNorm
from jaxad.nn.residual import Residual
from jaxad.ops.cosine import cosine_distance
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding

LAYERS = ("layer1", "layer2", "layer3")
"""The teacher's stages, of strides 4, 8 and 16."""
Maps = dict[str, Float[Array, "b _ _ _"]]


class Rd4adTraining(NamedTuple):
    """Bottleneck and decoder while they are trained."""

    trained: Trained
    running: PyTree
    """Statistics of their batch norms."""


class Rd4adStudent(NamedTuple):
    """The trained bottleneck and decoder."""

    params: PyTree
    running: PyTree


class Reverse(nn.Module):
    """The bottleneck and the decoder."""

    channels: tuple[int, int, int]
    """Of the teacher's maps."""
    blocks: tuple[int, int, int, int]
    """In the bottleneck, and in the decoder's stages, the deepest first."""
    width: float
    """Channels within a block over those of its output; 1 for basic blocks."""

    @nn.compact
    def __call__(self, maps: Maps, valid: Bool[Array, "b"] | None) -> Maps:
        """The decoder's maps, of the same shapes."""

        def down(x: Array, features: int) -> Array:
            return nn.relu(ConvNorm(features, 3, 2)(x, valid=valid))

        def stage(x: Array, features: int, blocks: int, scale: str) -> Array:
            inner = int(features * self.width)
            for i in range(blocks):
                x = Residual(features, inner, "same" if i else scale)(x, valid)
            return x

        fine, middle, deep = (maps[layer] for layer in LAYERS)
        c1, c2, c3 = self.channels
        fused = jnp.concatenate([down(down(fine, c2), c3), down(middle, c3), deep], -1)
        x, found = stage(fused, 2 * c3, self.blocks[0], "down"), {}
        for layer, c, blocks in zip(LAYERS[::-1], (c3, c2, c1), self.blocks[1:], strict=True):
            x = found[layer] = stage(x, c, blocks, "up")
        return found


def rd4ad(
    *,
    backbone: str = "wide_resnet50_2",
    image_size: tuple[int, int] = (256, 256),
    epochs: int = 200,
    train_batch_size: int = 16,
    learning_rate: float = 5e-3,
    sigma: float = 4.0,
) -> Method:
    """RD4AD.

    Args:
        backbone: The teacher, a ResNet, whose layers 1 to 3 are restored.
        image_size: (height, width) of the images, multiples of 32; that of the heat map.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the backbone no ResNet.
    """
    at_least_one(epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(sigma=sigma)
    multiples_of(32, image_size=image_size)
    blocks, width, _ = residual_blocks(backbone)
    optimizer = optax.adam(learning_rate, b1=0.5)

    def network(x: Maps) -> Reverse:
        c1, c2, c3 = (x[layer].shape[-1] for layer in LAYERS)
        return Reverse((c1, c2, c3), (blocks[0], *blocks[:3]), width)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> Rd4adTraining:
        del frozen
        one = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:])), spec)
        variables = network(one).init(key, one, jnp.ones(1, bool))
        return Rd4adTraining(begin(optimizer, variables["params"]), variables["batch_stats"])

    def train(key: Key, state: Rd4adTraining, frozen: Frozen, batch: Batch) -> tuple[Rd4adTraining, Metrics]:
        del key, frozen
        x = zero_padding(batch.x, batch.valid)

        def loss(params: PyTree) -> Any:
            variables = {"params": params, "batch_stats": state.running}
            found, new = network(x).apply(variables, x, batch.valid, mutable=["batch_stats"])
            total = jnp.zeros(batch.valid.shape)
            for layer in LAYERS:
                total = total + cosine_distance(*(m[layer].reshape(len(total), -1) for m in (x, found)))
            return mean_of_valid(total, batch.valid), new["batch_stats"]

        trained, metrics, running = descend_with(optimizer, state.trained, loss)
        return Rd4adTraining(trained, running), metrics

    def finish(key: Key, state: Rd4adTraining, frozen: Frozen) -> Rd4adStudent:
        del key, frozen
        return Rd4adStudent(state.trained.params, state.running)

    def score(state: Rd4adStudent, frozen: Frozen, x: Maps) -> Scores:
        del frozen
        found: Any = network(x).apply({"params": state.params, "batch_stats": state.running}, x, None)
        pixel = jnp.zeros(())
        for layer in LAYERS:
            pixel = pixel + upsample_blur(cosine_distance(x[layer], found[layer]), image_size, sigma)
        return Scores(pixel.max((1, 2)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(features(backbone, LAYERS), init, (stage,), score)
