"""CFLOW-AD: normalizing flows of features, conditioned on their position, one for each level.

Stored: for every level a flow of affine couplings that maps the feature vector of a position, given a sinusoidal
encoding of that position, to a standard normal (Eq. 4-6), trained on random batches of positions of all images
("fibers"); and the largest log-likelihood of a training position. A position has the likelihood exp(log p / c -
largest), for c channels; the heat map is the number of levels minus the sum of their upsampled likelihoods, and an
image scores the maximum of its heat map.

Family: flows
Paper: CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows, WACV
    2022, arXiv:2107.12571.
Reference: https://github.com/gudovskiy/cflow-ad
Differences: the largest likelihood is taken over the training images, not the test images, so that an image's score
    does not depend on other test images; one image size for all classes; 200 plain epochs in place of 25 of 8; the
    learning rate changes with every step; the last epoch is kept, not the best on the test images; images are not
    rotated by up to 5 degrees in training, so that their features are computed once; upsampling aligns pixel centers,
    not corners (on bottle, -0.002 of pixel and +0.002 of image AUROC); positions that fill no step are left out, not
    added to the last step. The flows share one Adam in the reference, which with PyTorch 2 leaves the others alone in
    the step of one, as an Adam for each does; before, its momentum moved them too (0.0002 of pixel AUROC after 3
    epochs on bottle).
Results: experiments/recipes/cflow.py
"""

import math
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage, State
from jaxad.bijectors import (
    BlockParams,
    Invertible1x1,
    Scan,
    affine_block,
    block_params,
    init_in_order,
    random_orthogonal,
)
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.heatmap import counted, upsample_blur
from jaxad.training import Descent, cosine, gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_adam

WARM_UP, FIRST_RATE, LAST_RATE = 0.08, 0.1, 1e-3
"""The share of the training in which the learning rate rises, and its first and last value over the largest."""


class CflowFlows(NamedTuple):
    """The flows of all levels."""

    params: dict[str, BlockParams]
    """Stacked over the blocks, as the rotations are."""
    rotations: dict[str, Float[Array, "k c c"]]


class CflowState(NamedTuple):
    """The trained flows, and the largest log-likelihood of a training position at each level."""

    flows: CflowFlows
    largest: dict[str, Float[Array, ""]]


class Subnet(nn.Module):
    """One hidden layer, twice as wide as the input."""

    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """Unbounded log scales and shifts."""
        n = x.shape[-1]
        hidden = nn.relu(nn.Dense(2 * n, kernel_init=torch_uniform, bias_init=torch_bias(n))(x))
        return nn.Dense(self.out, kernel_init=torch_uniform, bias_init=torch_bias(2 * n))(hidden)


def position_encoding(height: int, width: int, size: int) -> Float[Array, "h w size"]:
    """Sines and cosines of the column, then of the row, at wavelengths from 2 pi up (a quarter of `size` of each)."""
    frequency = jnp.exp(jnp.arange(0.0, size // 2, 2) * -(math.log(1e4) / (size // 2)))

    def encode(n: int) -> Float[Array, "n d"]:
        angle = jnp.arange(float(n))[:, None] * frequency
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(n, -1)

    shape = (height, width, size // 2)
    columns, rows = encode(width), encode(height)[:, None]
    return jnp.concatenate([jnp.broadcast_to(columns, shape), jnp.broadcast_to(rows, shape)], -1)


def warm_up_cosine(progress: Float[Array, ""]) -> Float[Array, ""]:
    """The learning rate over its largest value: a linear warm-up, then a cosine."""
    warm_up = FIRST_RATE + (cosine(jnp.float32(WARM_UP), LAST_RATE) - FIRST_RATE) * progress / WARM_UP
    return jnp.where(progress < WARM_UP, warm_up, cosine(progress, LAST_RATE))


def cflow(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
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
        backbone: The network that extracts the features.
        layers: Its stages, each with its own flow; None for the deepest three.
        image_size: (height, width) of the images and of the heat map.
        coupling_blocks: Couplings of each flow.
        condition_size: Length of the encoding of a position, a multiple of 4.
        clamp: Bound of the couplings' log scales.
        fiber_batch_size: Positions per step of gradient descent.
        epochs: Passes over the training images.
        train_batch_size: Images whose positions are shuffled together.
        learning_rate: The largest of Adam's.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of its range.
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

    def init_level(key: Key, c: int) -> tuple[BlockParams, Float[Array, "k c c"]]:
        def init_block(key: Key) -> tuple[BlockParams, Float[Array, "c c"]]:
            subnet_key, rotation_key = jax.random.split(key)
            subnet = Subnet(2 * (c // 2)).init(subnet_key, jnp.zeros((1, c - c // 2 + condition_size)))
            return block_params(subnet, c), random_orthogonal(rotation_key, c)

        return jax.vmap(init_block)(jax.random.split(key, coupling_blocks))

    def init(key: Key, state: State, frozen: Frozen, spec: PyTree) -> CflowFlows:
        del state, frozen
        levels = init_in_order(init_level, key, [spec[layer].shape[-1] for layer in layers])
        params, rotations = (dict(zip(layers, part, strict=True)) for part in zip(*levels, strict=True))
        return CflowFlows(params, rotations)

    def log_likelihood(
        params: BlockParams, rotations: Float[Array, "k c c"], x: Float[Array, "n c"], position: Float[Array, "n d"]
    ) -> Float[Array, "n"]:
        """Per channel."""
        c = x.shape[-1]

        def block(arrays: tuple[BlockParams, Float[Array, "c c"]]) -> distrax.Bijector:
            params, rotation = arrays

            def conditioner(half: Array) -> Any:
                return Subnet(2 * (c // 2)).apply(params.subnet, jnp.concatenate([half, position], -1))

            rotate = Invertible1x1(rotation, 1, orthogonal=True)
            return affine_block(params, conditioner, rotate, clamp=clamp, event_ndims=1)

        z, log_det = Scan(block, (params, rotations), 1).forward_and_log_det(x)
        return (log_det - 0.5 * jnp.sum(z**2, -1)) / c - 0.5 * math.log(2 * math.pi)

    def fibers(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "n c"], Float[Array, "n d"]]:
        """The features of all positions, and the encodings of the positions."""
        b, h, w, c = x.shape
        position = jnp.broadcast_to(position_encoding(h, w, condition_size), (b, h, w, condition_size))
        return x.reshape(-1, c), position.reshape(-1, condition_size)

    def descent(layer: str) -> Descent:
        def fiber_batches(key: Key, model: CflowFlows, frozen: Frozen, batch: Batch) -> PyTree:
            del model, frozen
            x, position = fibers(batch.x[layer])
            n = x.shape[0]
            size = min(fiber_batch_size, n)
            rows = jax.random.permutation(key, n)[: n // size * size].reshape(-1, size)
            return x[rows], position[rows]

        def loss(
            params: BlockParams, model: CflowFlows, key: Key, frozen: Frozen, fiber_batch: tuple[Array, Array]
        ) -> tuple[Array, dict]:
            del key, frozen
            return -jax.nn.log_sigmoid(log_likelihood(params, model.rotations[layer], *fiber_batch)).mean(), {}

        return Descent(loss, torch_adam(learning_rate), layer, fiber_batches)

    def init_calibration(key: Key, flows: CflowFlows, frozen: Frozen, spec: PyTree) -> CflowState:
        del key, frozen, spec
        return CflowState(flows, {layer: jnp.full((), -jnp.inf, jnp.float32) for layer in layers})

    def log_likelihoods(flows: CflowFlows, x: dict[str, Array]) -> dict[str, Float[Array, "b h w"]]:
        params, rotations = flows
        log_p = {layer: log_likelihood(params[layer], rotations[layer], *fibers(x[layer])) for layer in layers}
        return {layer: values.reshape(x[layer].shape[:3]) for layer, values in log_p.items()}

    def calibrate(key: Key, state: CflowState, frozen: Frozen, batch: Batch) -> tuple[CflowState, Metrics]:
        del key, frozen
        valid = batch.valid[:, None, None]
        log_p = log_likelihoods(state.flows, batch.x)
        largest = jax.tree.map(lambda a, b: jnp.maximum(a, jnp.where(valid, b, -jnp.inf).max()), state.largest, log_p)
        return state._replace(largest=largest), {}

    def score(state: CflowState, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        total = jnp.zeros(())
        for layer, log_p in log_likelihoods(state.flows, x).items():
            total = total + upsample_blur(jnp.exp(log_p - state.largest[layer]), image_size, sigma)
        pixel = len(layers) - total
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    descents = [descent(layer) for layer in layers]
    stages = (
        gradient_stage("train", init, descents, epochs=epochs, batch_size=train_batch_size, schedule=warm_up_cosine),
        Stage("calibrate", init_calibration, calibrate),
    )
    return Method(features(backbone, layers), stages, score)
