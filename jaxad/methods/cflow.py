"""CFLOW-AD: normalizing flows of features, conditioned on their position, one for each level.

Stored: for every level a flow of affine couplings that maps the feature vector of a position, given a sinusoidal code
of that position, to a standard normal (Eq. 4-6), trained on random batches of positions of all images ("fibers"); and
the largest log-likelihood of a training position. A position has the likelihood exp(log p / c - largest), for c
channels; the heat map is the number of levels less the sum of their upsampled likelihoods, and an image scores the
maximum of its heat map.

Paper: CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows, WACV
    2022, arXiv:2107.12571.
Reference: https://github.com/gudovskiy/cflow-ad
Differences: the largest likelihood is that of the training images, not of the test images, so that an image's score
    does not depend on others; one image size for all classes; epochs are counted plainly (200, not 25 of 8), the
    learning rate changes with every step, and the last epoch counts, not the best on the test images; images are not
    rotated by up to 5 degrees in training, so that their features are computed once; upsampling is by pixel centers;
    biases of the networks begin as zeros.
Results: experiments/recipes/cflow.py
"""

import math
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.bijectors import BlockParams, Invertible1x1, Scan, affine_block, block_params, random_orthogonal
from jaxad.nn.initial import torch_uniform
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.lapack import key_after
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding

WARM_UP, LEAST_RATE = 0.08, 1e-3
"""The learning rate begins at a tenth, rises for this share of the training, and falls to this share of it (cosine)."""


class Level(NamedTuple):
    """The flow of one level."""

    blocks: BlockParams
    rotations: Float[Array, "k c c"]


class CflowTraining(NamedTuple):
    """The flows while they are trained."""

    trained: dict[str, Trained]
    rotations: dict[str, Float[Array, "k c c"]]


class CflowFlows(NamedTuple):
    """The flows of all levels, and the largest log-likelihood of each so far."""

    levels: dict[str, Level]
    largest: dict[str, Float[Array, ""]]


class Subnet(nn.Module):
    """One hidden layer, twice as wide as the input."""

    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """Raw log scales and shifts."""
        hidden = nn.relu(nn.Dense(2 * x.shape[-1], kernel_init=torch_uniform)(x))
        return nn.Dense(self.out, kernel_init=torch_uniform)(hidden)


def position_code(height: int, width: int, size: int) -> Float[Array, "h w size"]:
    """Sines and cosines of the column, then of the row, at wavelengths from 2 pi on (a quarter of `size` of each)."""
    frequency = jnp.exp(jnp.arange(0.0, size // 2, 2) * -(math.log(1e4) / (size // 2)))

    def one(n: int) -> Float[Array, "n d"]:
        angle = jnp.arange(float(n))[:, None] * frequency
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(n, -1)

    shape = (height, width, size // 2)
    return jnp.concatenate([jnp.broadcast_to(one(width), shape), jnp.broadcast_to(one(height)[:, None], shape)], -1)


def schedule(progress: Float[Array, ""]) -> Float[Array, ""]:
    """The learning rate over its largest value."""
    cosine = lambda p: LEAST_RATE + (1 - LEAST_RATE) * (1 + jnp.cos(jnp.pi * p)) / 2  # noqa: E731
    return jnp.where(progress < WARM_UP, 0.1 + (cosine(WARM_UP) - 0.1) * progress / WARM_UP, cosine(progress))


def cflow(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (256, 256),
    coupling_blocks: int = 8,
    condition_size: int = 128,
    clamp: float = 1.9,
    fiber_batch_size: int = 256,
    epochs: int = 200,
    train_batch_size: int = 32,
    learning_rate: float = 2e-4,
    sigma: float = 0.0,
) -> Method:
    """CFLOW-AD.

    Args:
        backbone: The network that describes positions.
        layers: Its stages, each with a flow of its own; None for the deepest three.
        image_size: (height, width) of the images, which is that of the heat map.
        coupling_blocks: Couplings of each flow.
        condition_size: Length of the code of a position, a multiple of 4.
        clamp: Bound of the couplings' log scales.
        fiber_batch_size: Positions of a step of gradient descent.
        epochs: Passes over the training images.
        train_batch_size: Images whose positions are mixed.
        learning_rate: Of Adam, at its largest.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(
        coupling_blocks=coupling_blocks,
        fiber_batch_size=fiber_batch_size,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    if condition_size < 4 or condition_size % 4:
        raise ValueError(f"condition_size must be a multiple of 4, got {condition_size}")
    above_zero(clamp=clamp, learning_rate=learning_rate)
    zero_or_more(sigma=sigma)
    layers = architecture(backbone).stages[-3:] if layers is None else tuple(layers)
    optimizer = torch_adam(learning_rate)

    def init_level(key: Key, c: int) -> tuple[BlockParams, Float[Array, "k c c"]]:
        def one(key: Key) -> tuple[BlockParams, Float[Array, "c c"]]:
            subnet_key, rotation_key = jax.random.split(key)
            subnet = Subnet(2 * (c // 2)).init(subnet_key, jnp.zeros((1, c - c // 2 + condition_size)))
            return block_params(subnet, c), random_orthogonal(rotation_key, c)

        return jax.vmap(one)(jax.random.split(key, coupling_blocks))

    def init(key: Key, frozen: Frozen, spec: PyTree) -> CflowTraining:
        del frozen
        made: dict[str, tuple[BlockParams, Float[Array, "k c c"]]] = {}
        for layer, own in zip(layers, jax.random.split(key, len(layers)), strict=True):
            for _, rotations in list(made.values())[-1:]:
                own = key_after(own, rotations)
            made[layer] = init_level(own, spec[layer].shape[-1])
        return CflowTraining(
            {layer: begin(optimizer, blocks) for layer, (blocks, _) in made.items()},
            {layer: rotations for layer, (_, rotations) in made.items()},
        )

    def log_likelihood(level: Level, x: Float[Array, "n c"], code: Float[Array, "n d"]) -> Any:
        """Per channel."""
        c = x.shape[-1]

        def block(given: Level) -> distrax.Bijector:
            def conditioner(half: Array) -> Any:
                return Subnet(2 * (c // 2)).apply(given.blocks.subnet, jnp.concatenate([half, code], -1))

            mix = Invertible1x1(given.rotations, 1, orthogonal=True)
            return affine_block(given.blocks, conditioner, mix, clamp=clamp, event_ndims=1)

        z, log_det = Scan(block, level, 1).forward_and_log_det(x)
        return (log_det - 0.5 * jnp.sum(z**2, -1)) / c - 0.5 * math.log(2 * math.pi)

    def fibers(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "n c"], Float[Array, "n d"]]:
        b, h, w, c = x.shape
        code = jnp.broadcast_to(position_code(h, w, condition_size), (b, h, w, condition_size))
        return x.reshape(-1, c), code.reshape(-1, condition_size)

    def train(key: Key, state: CflowTraining, frozen: Frozen, batch: Batch) -> tuple[CflowTraining, Metrics]:
        del frozen
        done, losses = {}, []
        for number, layer in enumerate(layers):
            x, code = fibers(zero_padding(batch.x[layer], batch.valid))
            valid = jnp.repeat(batch.valid, x.shape[0] // batch.valid.shape[0])
            size = min(fiber_batch_size, x.shape[0])
            order = jax.random.permutation(jax.random.fold_in(key, number), x.shape[0])
            rotations = state.rotations[layer]

            def step(trained: Trained, rows: Array, x=x, code=code, valid=valid, rotations=rotations) -> Any:
                def loss(blocks: BlockParams) -> Float[Array, ""]:
                    likelihood = log_likelihood(Level(blocks, rotations), x[rows], code[rows])
                    return mean_of_valid(-jax.nn.log_sigmoid(likelihood), valid[rows])

                return descend(optimizer, trained, loss, schedule(batch.progress))

            batches = order[: order.shape[0] // size * size].reshape(-1, size)
            done[layer], metrics = jax.lax.scan(step, state.trained[layer], batches)
            losses.append(metrics["loss"].mean())
        return state._replace(trained=done), {"loss": sum(losses[1:], losses[0]) / len(layers)}

    def finish(key: Key, state: CflowTraining, frozen: Frozen) -> CflowFlows:
        del key, frozen
        levels = {layer: Level(state.trained[layer].params, state.rotations[layer]) for layer in layers}
        return CflowFlows(levels, {layer: jnp.full((), -jnp.inf, jnp.float32) for layer in layers})

    def likelihoods(state: CflowFlows, x: dict[str, Array]) -> dict[str, Float[Array, "b h w"]]:
        return {
            layer: log_likelihood(state.levels[layer], *fibers(x[layer])).reshape(x[layer].shape[:3])
            for layer in layers
        }

    def look(key: Key, state: CflowFlows, frozen: Frozen, batch: Batch) -> tuple[CflowFlows, Metrics]:
        del key, frozen
        valid = batch.valid[:, None, None]
        found = likelihoods(state, {layer: jnp.where(valid[..., None], batch.x[layer], 0) for layer in layers})
        largest = {layer: jnp.where(valid, map_, -jnp.inf).max() for layer, map_ in found.items()}
        return state._replace(largest=jax.tree.map(jnp.maximum, state.largest, largest)), {}

    def score(state: CflowFlows, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        total = jnp.zeros(())
        for layer, found in likelihoods(state, x).items():
            total = total + upsample_blur(jnp.exp(found - state.largest[layer]), image_size, sigma)
        pixel = len(layers) - total
        return Scores(pixel.max((1, 2)), pixel)

    stages = (
        Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True),
        Stage("calibrate", look),
    )
    return Method(features(backbone, layers), init, stages, score)
