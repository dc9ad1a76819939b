"""FastFlow: a fully convolutional normalizing flow on each level of a feature pyramid.

Stored: for every level a layer norm over channels and positions, and a flow of affine couplings whose networks are 3x3
and 1x1 convolutions in turn, trained to map the features of normal images to a standard normal (Eq. 3-5). A position
of a level has the likelihood exp(-|z|^2 / 2 c) of its c latent channels; the heat map is 1 minus the mean of the
upsampled likelihoods of all levels, and an image scores the maximum of its heat map. A transformer's features have
passed its own layer norm, and no other is learned. The published setting for `deit_base_distilled_patch16_384` and
`cait_m48_448` is 20 `flow_steps`, 3x3 and 1x1 in turn, a `hidden_ratio` of 0.16 and images of 384 and 448 pixels.

Paper: FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows, 2021, arXiv:2111.07677.
Reference: none official; https://github.com/gathierry/FastFlow (FrEIA's AllInOneBlock, layer norm, likelihoods).
Differences: biases of the networks begin as zeros; 3x3 and 1x1 in turn take an even number of couplings.
Results: experiments/recipes/fastflow.py
"""

import functools
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.bijectors import Permutation, Scan, affine_block, block_params
from jaxad.nn.initial import torch_uniform
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding


class FastflowTraining(NamedTuple):
    """The flows while they are trained."""

    trained: Trained
    permutations: dict[str, Int[Array, "n k c"]]


class FastflowFlows(NamedTuple):
    """The flows of all levels."""

    params: dict[str, PyTree]
    permutations: dict[str, Int[Array, "n k c"]]
    """Of every pair of blocks, or block."""


class Subnet(nn.Module):
    """Two convolutions, which see as far as their kernels reach."""

    kernel: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w d"]:
        """Raw log scales and shifts."""
        window = (self.kernel, self.kernel)
        x = nn.relu(nn.Conv(self.hidden, window, kernel_init=torch_uniform)(x))
        return nn.Conv(self.out, window, kernel_init=torch_uniform)(x)


def fastflow(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (256, 256),
    flow_steps: int = 8,
    conv3x3_only: bool = False,
    hidden_ratio: float = 1.0,
    clamp: float = 2.0,
    epochs: int = 500,
    train_batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
) -> Method:
    """FastFlow.

    Args:
        backbone: The network that describes images.
        layers: Its stages, each with a flow of its own; None for its pyramid (layer1 to layer3 of a ResNet, one block
            of a transformer).
        image_size: (height, width) of the images, which is that of the heat map.
        flow_steps: Couplings of each flow.
        conv3x3_only: Networks of 3x3 convolutions alone (the reference's choice for a ResNet-18) instead of 3x3 and 1x1
            in turn.
        hidden_ratio: Width of the networks over that of their input.
        clamp: Bound of the couplings' log scales.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    kernels = (3,) if conv3x3_only else (3, 1)
    at_least_one(flow_steps=flow_steps, epochs=epochs, train_batch_size=train_batch_size)
    if flow_steps % len(kernels):
        raise ValueError(f"flow_steps must be even, or conv3x3_only be set, got {flow_steps}")
    above_zero(hidden_ratio=hidden_ratio, clamp=clamp, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    network = architecture(backbone)
    layers = network.pyramid_layers if layers is None else tuple(layers)
    optimizer = torch_adam(learning_rate, weight_decay)

    def subnet(kernel: int, channels: int) -> Subnet:
        kept = channels - channels // 2
        return Subnet(kernel, max(1, int(kept * hidden_ratio)), 2 * (channels // 2))

    def init_level(key: Key, shape: tuple[int, ...]) -> tuple[PyTree, Int[Array, "n k c"]]:
        h, w, c = shape

        def one(key: Key) -> tuple[tuple, Int[Array, "k c"]]:
            keys = jax.random.split(key, 2 * len(kernels)).reshape(2, -1)
            given = jnp.zeros((1, h, w, c - c // 2))
            blocks = (block_params(subnet(k, c).init(own, given), c) for k, own in zip(kernels, keys[0], strict=True))
            return tuple(blocks), jax.vmap(lambda own: jax.random.permutation(own, c))(keys[1])

        blocks, permutations = jax.vmap(one)(jax.random.split(key, flow_steps // len(kernels)))
        norm = {} if network.normalized else {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}
        return norm | {"blocks": blocks}, permutations

    def init(key: Key, frozen: Frozen, spec: PyTree) -> FastflowTraining:
        del frozen
        keys = jax.random.split(key, len(layers))
        made = {layer: init_level(own, spec[layer].shape[1:]) for layer, own in zip(layers, keys, strict=True)}
        return FastflowTraining(
            begin(optimizer, {layer: params for layer, (params, _) in made.items()}),
            {layer: permutations for layer, (_, permutations) in made.items()},
        )

    def flow(blocks: tuple, permutations: Int[Array, "n k c"]) -> distrax.Bijector:
        def blocks_in_turn(given: tuple) -> distrax.Bijector:
            params, index = given
            chain = [
                affine_block(
                    own,
                    functools.partial(subnet(kernel, index.shape[-1]).apply, own.subnet),
                    Permutation(index[i], 3),
                    clamp=clamp,
                    event_ndims=3,
                )
                for i, (kernel, own) in enumerate(zip(kernels, params, strict=True))
            ]
            return distrax.Chain(chain[::-1])

        return Scan(blocks_in_turn, (blocks, permutations), 3)

    def latent(params: PyTree, permutations: Int[Array, "n k c"], x: Float[Array, "b h w c"]) -> tuple[Any, Any]:
        if not network.normalized:
            mean, variance = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]
        return flow(params["blocks"], permutations).forward_and_log_det(x)

    def train(key: Key, state: FastflowTraining, frozen: Frozen, batch: Batch) -> tuple[FastflowTraining, Metrics]:
        del key, frozen

        def loss(params: PyTree) -> Float[Array, ""]:
            total = jnp.zeros(batch.valid.shape)
            for layer in layers:
                x = zero_padding(batch.x[layer], batch.valid)
                z, log_det = latent(params[layer], state.permutations[layer], x)
                total = total + 0.5 * jnp.sum(z**2, (1, 2, 3)) - log_det
            return mean_of_valid(total, batch.valid)

        trained, metrics = descend(optimizer, state.trained, loss)
        return state._replace(trained=trained), metrics

    def finish(key: Key, state: FastflowTraining, frozen: Frozen) -> FastflowFlows:
        del key, frozen
        return FastflowFlows(state.trained.params, state.permutations)

    def score(state: FastflowFlows, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        likelihoods = []
        for layer in layers:
            z, _ = latent(state.params[layer], state.permutations[layer], x[layer])
            likelihoods.append(upsample_blur(jnp.exp(-0.5 * jnp.mean(z**2, -1)), image_size, 0.0))
        pixel = 1 - sum(likelihoods[1:], likelihoods[0]) / len(layers)
        return Scores(pixel.max((1, 2)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(features(backbone, layers), init, (stage,), score)
