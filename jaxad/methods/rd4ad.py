"""RD4AD: a decoder restores a teacher's feature pyramid from its one-class embedding, and cannot restore defects.

Stored: a bottleneck that brings the teacher's maps of three stages to the grid and channels of a fourth (multi-scale
fusion and one-class embedding), and a decoder of transposed residual stages, both trained on the cosine distance
between the maps. A position of a stage scores the cosine distance between the two vectors (Eq. 1). The heat map is the
smoothed sum of the upsampled maps, and an image scores its maximum.

Family: distillation
Paper: Anomaly Detection via Reverse Distillation from One-Class Embedding, CVPR 2022, arXiv:2201.10703.
Reference: https://github.com/hq-deng/RD4AD
Differences: as in the reference, the loss compares each map as one vector, not position by position; upsampling aligns
    pixel centers, not corners (0.15 of a heat map at 256 px, 1.5e-2 of its maximum); every step takes a full batch;
    running variances are biased (torch's are not: 1e-3 of a heat map after three steps). The projections of RD++ are
    left out.
Results: experiments/recipes/rd4ad.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features, residual_blocks
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores
from jaxad.nn import ConvNorm
from jaxad.nn.residual import Residual
from jaxad.ops.cosine import cosine_distance
from jaxad.ops.heatmap import counted, upsample_blur
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more

LAYERS = ("layer1", "layer2", "layer3")
"""The teacher's stages, of strides 4, 8 and 16."""
Maps = dict[str, Float[Array, "b _ _ _"]]


class Rd4adStudent(NamedTuple):
    """The bottleneck and the decoder."""

    params: PyTree
    stats: PyTree
    """Running statistics of their batch norms."""


class Reverse(nn.Module):
    """The bottleneck and the decoder."""

    channels: tuple[int, int, int]
    """Channels of the teacher's maps."""
    blocks: tuple[int, int, int, int]
    """Residual blocks of the bottleneck, and of each stage of the decoder, the deepest first."""
    width: float
    """Inner channels of a block over its output channels; 1 for basic blocks."""

    @nn.compact
    def __call__(self, maps: Maps, *, train: bool) -> Maps:
        """The decoder's maps, of the same shapes as the teacher's."""

        def down(x: Array, features: int) -> Array:
            return nn.relu(ConvNorm(features, 3, 2)(x, train=train))

        def stage(x: Array, features: int, blocks: int, scale: str) -> Array:
            inner = int(features * self.width)
            for i in range(blocks):
                x = Residual(features, inner, "same" if i else scale)(x, train=train)
            return x

        fine, middle, deep = (maps[layer] for layer in LAYERS)
        c1, c2, c3 = self.channels
        fused = jnp.concatenate([down(down(fine, c2), c3), down(middle, c3), deep], -1)
        x, decoded = stage(fused, 2 * c3, self.blocks[0], "down"), {}
        for layer, c, blocks in zip(LAYERS[::-1], (c3, c2, c1), self.blocks[1:], strict=True):
            x = decoded[layer] = stage(x, c, blocks, "up")
        return decoded


def rd4ad(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
    image_size: tuple[int, int] = (256, 256),
    epochs: int = 200,
    train_batch_size: int = 16,
    learning_rate: float = 5e-3,
    sigma: float = 4.0,
) -> Method:
    """RD4AD.

    Args:
        backbone: The teacher, a ResNet, whose layers 1 to 3 the decoder restores.
        image_size: (height, width) of the images and of the heat map, multiples of 32.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range, or the backbone is not a ResNet.
    """
    at_least_one(epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(sigma=sigma)
    multiples_of(32, image_size=image_size)
    blocks, width, _ = residual_blocks(backbone)

    def network(x: PyTree) -> Reverse:
        c1, c2, c3 = (x[layer].shape[-1] for layer in LAYERS)
        return Reverse((c1, c2, c3), (blocks[0], *blocks[:3]), width)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> Rd4adStudent:
        del state, frozen
        maps = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:])), spec)
        variables = network(spec).init(key, maps, train=True)
        return Rd4adStudent(variables["params"], variables["batch_stats"])

    def loss(params: PyTree, model: Rd4adStudent, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key, frozen
        variables = {"params": params, "batch_stats": model.stats}
        maps, changes = network(batch.x).apply(variables, batch.x, train=True, mutable=["batch_stats"])
        value = jnp.zeros(())
        for layer in LAYERS:
            student, teacher = (m[layer].reshape(len(m[layer]), -1) for m in (maps, batch.x))
            value = value + cosine_distance(student, teacher).mean()
        return value, {"stats": changes["batch_stats"]}

    def score(state: Rd4adStudent, frozen: Frozen, x: Maps, ignore: Ignored = None) -> Scores:
        del frozen
        variables = {"params": state.params, "batch_stats": state.stats}
        maps: Any = network(x).apply(variables, x, train=False)
        pixel = jnp.zeros(())
        for layer in LAYERS:
            pixel = pixel + upsample_blur(cosine_distance(x[layer], maps[layer]), image_size, sigma)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    optimizer = optax.adam(learning_rate, b1=0.5)
    stage = gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size)
    return Method(features(backbone, LAYERS), (stage,), score)
